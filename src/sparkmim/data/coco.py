"""Images with boxes and masks in COCO's format: where they are, what is wrong with them, and how they are read."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import pickle
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sparkmim.data.arrays import MissingPackage
from sparkmim.data.decoding import UnreadableImage, decode_annotated, size_text, stored_size, strict_pillow
from sparkmim.data.labelled import PART_NAMES, PURPOSE, Part
from sparkmim.data.problems import Findings, counted, few
from sparkmim.errors import MissingPath, UserError

Target = dict[str, Any]
Sample = tuple[Tensor, Target]
"""An image `[3, H, W]`, and what is to be found on it."""

HEADERS_READ = 100
"""So many images are opened to compare their size with the one in the annotations."""


def coco_tools(part: str) -> Any:
    """A module of pycocotools: `mask`, `coco` or `cocoeval`.

    Raises:
        MissingPackage: if it is not installed.
    """
    try:
        return importlib.import_module(f"pycocotools.{part}")
    except ImportError as error:
        raise MissingPackage("data in COCO format needs pycocotools: `pip install 'sparkmim[detect]'`") from error


@contextmanager
def quiet_tools() -> Iterator[None]:
    """Keeps in what pycocotools prints as it goes, and what numpy thinks of its code."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# Where they are


class CocoFiles(NamedTuple):
    """An annotation file, and the folder that the names of images in it are relative to."""

    annotations: Path
    images: Path


def find_coco(root: str | Path, part: Part) -> CocoFiles:
    """A part of a data set, to train or to validate on, by the names that are in use.

    - COCO's own: `annotations/instances_train2017.json` and `train2017/`, of any year or none; also
      `annotations/train.json`, and the images in `images/train2017/`, `images/train/` or, all of them, `images/`;
    - a folder per part with a JSON file and the images in it: `train/_annotations.coco.json`.

    `val`, `valid`, `validation` and `test` are names of what is validated on, in this order.

    Raises:
        FileNotFoundError: if there is no such folder, no annotation file of this part, or no images for it.
    """
    root = Path(root).expanduser().absolute()
    if not root.is_dir():
        raise MissingPath(f"there is no folder {root}")
    for name in PART_NAMES[part]:
        found = [
            file
            for folder in (root / "annotations", root)
            for pattern in (f"instances_{name}[0-9]*.json", f"instances_{name}.json", f"{name}[0-9]*.json",
                            f"{name}.json", f"{name}_coco.json")
            for file in sorted(folder.glob(pattern))
        ]  # fmt: skip
        if found:
            file = found[0]
            stem = file.stem.removeprefix("instances_").removesuffix("_coco")
            folders = [root / stem, root / name, root / "images" / stem, root / "images" / name, root / "images"]
            images = next((folder for folder in folders if folder.is_dir()), None)
            if images is None:
                looked = ", ".join(dict.fromkeys(f"{folder.relative_to(root)}/" for folder in folders))
                raise MissingPath(f"{root} has no folder of images for {file.name}: none of {looked} exists")
            return CocoFiles(file, images)
        inside = sorted((root / name).glob("*.json"))
        if inside:
            return CocoFiles(inside[0], root / name)
    raise MissingPath(
        f"{root} holds no annotations to {PURPOSE[part]}: there is neither "
        f"annotations/instances_{part}2017.json, nor annotations/{part}.json, nor {part}/_annotations.coco.json; name "
        "the file and the folder of images"
    )


# What they say


def box_of(annotation: Mapping[str, Any]) -> list[float]:
    """The box of an annotation: left, top, width, height; four times NaN where there is none of four numbers."""
    box = annotation.get("bbox")
    if isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box):
        return box
    return [math.nan] * 4


def mask_of(annotation: Mapping[str, Any], height: int, width: int) -> Any:
    """The segmentation of an annotation, as pycocotools takes it: polygons, a run-length encoding, or None.

    Polygons of fewer than three points are left out. None stands for no mask: nothing given, no polygon left, or an
    encoding that is not of this image's size.
    """
    given = annotation.get("segmentation")
    if isinstance(given, Mapping):
        size, counts = given.get("size"), given.get("counts")
        if not isinstance(size, list) or size != [height, width]:
            return None
        if isinstance(counts, list):
            return given if sum(counts) == height * width else None
        return given if isinstance(counts, str | bytes) and counts else None
    if isinstance(given, list):
        polygons = [polygon for polygon in given if isinstance(polygon, list) and len(polygon) >= 6]
        return [polygon if len(polygon) % 2 == 0 else polygon[:-1] for polygon in polygons] or None
    return None


def category_names(categories: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """The name of each category id, in the order of the ids; of two categories alike, with the id.

    Example:
        >>> category_names([{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}])
        {2: 'dog', 7: 'cat'}
    """
    named = {int(category["id"]): str(category.get("name", category["id"])) for category in categories}
    often = Counter(named.values())
    return {place: name if often[name] == 1 else f"{name} ({place})" for place, name in sorted(named.items())}


def read_coco(file: str | Path) -> dict[str, Any]:
    """Reads an annotation file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not in COCO's format: lists `images`, `annotations` and `categories`, with integers for
            ids, and none of the first and last empty.
    """
    file = Path(file)
    if not file.is_file():
        raise MissingPath(f"there is no annotation file {file}")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:  # of JSON, or of the encoding
        raise UserError(f"{file} is no JSON file: {error}") from error
    for part in ("images", "annotations", "categories"):
        records = content.get(part) if isinstance(content, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise UserError(f"{file} is not in COCO's format: it has no list `{part}` of objects")
        if part != "annotations":
            if not records:
                raise UserError(f"{file} lists no {part}")
            wrong = [record.get("id") for record in records if type(record.get("id")) is not int]
            if wrong:
                raise UserError(f"ids in {file} must be integers, but one of its {part} has {wrong[0]!r}")
    nameless = [image["id"] for image in content["images"] if not isinstance(image.get("file_name"), str)]
    if nameless:
        number = counted(len(nameless), "image")
        raise UserError(f"{file} lists {number} without a file_name; the first has id {nameless[0]}")
    checked: dict[str, Any] = content
    return checked


class CocoImages(Dataset[Any]):
    """The images of an annotation file, with what is to be found on them. Made by `open_coco`.

    An item is an image, uint8 `tv_tensors.Image [3, H, W]`, and a target as torchvision's detectors take it:

    - `boxes`: float32 `tv_tensors.BoundingBoxes [n, 4]`, left, top, right, bottom, in pixels;
    - `labels`: long `[n]`, from 1 to the number of classes;
    - `masks`: uint8 `tv_tensors.Mask [n, H, W]`, where `has_masks`;
    - `image_id`: the image's id in the file;
    - `size`: its height and width, which a resize leaves as they were.

    Images with nothing on them are items as well. Left out are crowds, which only the evaluation knows, and the
    annotations that `check_coco` reports. Boxes that reach beyond the image are clipped to it.

    Images are turned upright by their EXIF orientation, as those who drew the boxes saw them. Some files were
    annotated by tools that ignore it; there, height and width in the file are those of the image as it is stored, and
    so it is not turned. An image of a third size is unreadable.

    Attributes:
        annotations: the annotation file.
        images: the folder of images.
        image_ids: ids in the file, by item.
        file_names: of the images, relative to the folder.
        sizes: long `[images, 2]`, height and width by the file.
        category_ids: ids in the file, ascending: label 1 is the first of them.
        classes: their names.
        has_masks: whether targets have masks.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        content: Mapping[str, Any],
        masks: bool | None = None,
    ) -> None:
        self.annotations, self.images = annotations, images
        self.findings = Findings()
        names = category_names(content["categories"])
        self.category_ids, self.classes = list(names), list(names.values())
        records = content["images"]
        self.image_ids = np.array([record["id"] for record in records], np.int64)
        # One block of memory, which worker processes share. Strings would be copied by counting references.
        self._names = np.array([os.fsencode(record["file_name"]) for record in records])
        self.sizes = np.array([[_whole(record.get(side)) for side in ("height", "width")] for record in records])
        self._check_records(content)
        self._take(content["annotations"], masks)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def file_names(self) -> list[str]:
        return [os.fsdecode(name) for name in self._names]

    def path(self, place: int) -> Path:
        """The file of an image."""
        return self.images / os.fsdecode(self._names[place])

    def __getitem__(self, place: int) -> Any:
        image = tv_tensors.Image(self.read(place))
        height, width = image.shape[1:]
        mine = slice(self._starts[place], self._starts[place + 1])
        boxes, labels = torch.from_numpy(self._boxes[mine].copy()), torch.from_numpy(self._labels[mine].copy())
        target: Target = {}
        if self.has_masks:
            masks = self._masks(mine, height, width)  # [n, h, w]
            drawn = masks.flatten(1).any(1).bool()  # a polygon may cover no pixel
            boxes, labels = boxes[drawn], labels[drawn]
            target["masks"] = tv_tensors.Mask(masks[drawn])
        target["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))
        target |= {"labels": labels, "image_id": int(self.image_ids[place]), "size": (height, width)}
        return image, target

    def read(self, place: int) -> Tensor:
        """An image, uint8 `[3, H, W]`.

        Raises:
            UnreadableImage: if it cannot be decoded, or is of another size than the file says.
        """
        height, width = self.sizes[place].tolist()
        return decode_annotated(self.path(place), (height, width), self.annotations.name)

    def take_categories(self, category_ids: Sequence[int], classes: Sequence[str], of: str | Path) -> None:
        """Counts labels as another set or a detector does, of whose categories these images may have some only.

        Args:
            category_ids: ascending; label 1 is the first of them from now on.
            classes: their names.
            of: whose they are, for the message.

        Raises:
            ValueError: if there is a category here that is not there, or has another name there.
        """
        known = dict(zip(category_ids, classes, strict=True))
        own = list(zip(self.category_ids, self.classes, strict=True))
        other = [f"{name} (id {number})" for number, name in own if known.get(number) != name]
        if other:
            raise UserError(
                f"{self.annotations} has {counted(len(other), 'category', 'categories')} that {of} does not have by "
                f"that id and name: {few(other)}"
            )
        places = np.array([0, *(category_ids.index(number) + 1 for number in self.category_ids)], np.int64)
        self._labels: npt.NDArray[np.int64] = places[self._labels]
        self.category_ids, self.classes = list(category_ids), list(classes)

    def _masks(self, mine: slice, height: int, width: int) -> Tensor:
        if mine.start == mine.stop:
            return torch.zeros((0, height, width), dtype=torch.uint8)
        tools = coco_tools("mask")
        encoded = []
        for number in range(mine.start, mine.stop):
            given = pickle.loads(self._packed[self._ends[number] : self._ends[number + 1]].data)
            if isinstance(given, list):
                encoded.append(tools.merge(tools.frPyObjects(given, height, width)))
            elif isinstance(given["counts"], list):
                encoded.append(tools.frPyObjects(given, height, width))
            else:
                encoded.append(given)
        with quiet_tools():
            decoded: npt.NDArray[np.uint8] = tools.decode(encoded)  # [h, w, n]
        return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)))

    def _check_records(self, content: Mapping[str, Any]) -> None:
        fatal, notes = self.findings.fatal, self.findings.notes
        for kind, found in (
            ("image", self.image_ids.tolist()),
            ("category", [category["id"] for category in content["categories"]]),
        ):
            twice = [place for place, count in Counter(found).items() if count > 1]
            if twice:
                fatal.append(f"{counted(len(twice), f'{kind} id')} given more than once: {few(twice)}")
        ids = [annotation.get("id") for annotation in content["annotations"]]
        twice = [place for place, count in Counter(ids).items() if count > 1 and place is not None]
        if twice:
            notes.append(f"{counted(len(twice), 'annotation id')} given more than once: {few(twice)}; all are used")
        sizeless = self.image_ids[(self.sizes < 1).any(1)].tolist()
        if sizeless:
            fatal.append(f"{counted(len(sizeless), 'image')} without height and width: id {few(sizeless)}")
        names = [name for name, count in Counter(self.file_names).items() if count > 1]
        if names:
            notes.append(f"{counted(len(names), 'file')} named by several images: {few(names)}")
        if self.category_ids != list(range(1, len(self.category_ids) + 1)):
            first, last = self.category_ids[0], self.category_ids[-1]
            number = counted(len(self.classes), "class", "classes")
            notes.append(
                f"category ids run from {first} to {last} for {number}; labels count from 1 without gaps, and results "
                "are written with the ids of the file"
            )

    def _take(self, records: Sequence[Mapping[str, Any]], masks: bool | None) -> None:
        """Keeps what is trained on, in the order of the images, and notes what is not."""
        fatal, notes = self.findings.fatal, self.findings.notes
        place_of: dict[Any, int] = {number: place for place, number in enumerate(self.image_ids.tolist())}
        label_of: dict[Any, int] = {number: label for label, number in enumerate(self.category_ids, 1)}
        places = np.array([place_of.get(record.get("image_id"), -1) for record in records], np.int64)
        labels = np.array([label_of.get(record.get("category_id"), 0) for record in records], np.int64)
        crowd = np.array([bool(record.get("iscrowd", 0)) for record in records], bool)
        given = np.array([box_of(record) for record in records], np.float64).reshape(-1, 4)

        left_out = "; left out"
        keep = places >= 0
        _note(notes, ~keep, "annotation", "of images that are not in the file" + left_out)
        unknown = sorted({str(records[place].get("category_id")) for place in np.flatnonzero(labels == 0).tolist()})
        if unknown:
            fatal.append(f"{counted(int((labels == 0).sum()), 'annotation')} of unknown categories: {few(unknown)}")
        keep &= labels > 0
        _note(notes, keep & crowd, "crowd", "not trained on, but known to the evaluation", "crowds")
        keep &= ~crowd

        known = np.isfinite(given).all(1)  # NaN where there is no box
        _note(notes, keep & ~known, "annotation", "without a box of four numbers" + left_out)
        keep &= known
        flat = (given[:, 2:] <= 0).any(1)
        _note(notes, keep & flat, "box", "of zero area" + left_out, "boxes")
        keep &= ~flat
        limits = self.sizes[places][:, [1, 0, 1, 0]] if len(records) else given  # width, height, twice
        corners = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], 1)
        clipped = np.clip(corners, 0, limits)
        outside = (clipped[:, 2:] <= clipped[:, :2]).any(1)
        _note(notes, keep & outside, "box", "wholly outside the image" + left_out, "boxes")
        keep &= ~outside
        # Annotation tools round to a tenth of a pixel or so
        _note(notes, keep & (np.abs(corners - clipped) > 1).any(1), "box", "partly outside the image; clipped", "boxes")

        segmentations: list[Any] = [None] * len(records)
        if masks is None or masks:
            for number in np.flatnonzero(keep).tolist():
                segmentations[number] = mask_of(records[number], *self.sizes[places[number]].tolist())
            short = sum(
                isinstance(record.get("segmentation"), list) and len(record["segmentation"]) != len(polygons or [])
                for kept, record, polygons in zip(keep, records, segmentations, strict=True)
                if kept
            )
            if short:
                notes.append(f"{counted(short, 'annotation')} with polygons of fewer than three points; those left out")
        bare = np.array([segmentation is None for segmentation in segmentations], bool)
        self.has_masks = not bare.all()
        if self.has_masks:
            _note(notes, keep & bare, "annotation", "with a box but no mask; left out while masks are trained on")
            keep &= ~bare
        elif masks:
            fatal.append("there are no masks; train on boxes alone")

        chosen = np.flatnonzero(keep)
        chosen = chosen[np.argsort(places[chosen], kind="stable")]
        self._boxes = clipped[chosen].astype(np.float32)
        self._labels = labels[chosen]
        self._starts = np.searchsorted(places[chosen], np.arange(len(self) + 1))
        pieces = [pickle.dumps(segmentations[number]) if self.has_masks else b"" for number in chosen.tolist()]
        self._packed = np.frombuffer(b"".join(pieces), np.uint8)
        self._ends = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)

        if not len(chosen):
            fatal.append("nothing to find on the images: no annotation is left")
            return
        counts = np.bincount(self._labels, minlength=len(self.classes) + 1)[1:]
        without = [self.classes[place] for place in np.flatnonzero(counts == 0)]
        if without:
            notes.append(f"{counted(len(without), 'class', 'classes')} without annotations: {few(without)}")
        _note(notes, np.diff(self._starts) == 0, "image", "with nothing on them; kept as background")


def open_coco(
    annotations: str | Path,
    images: str | Path,
    masks: bool | None = None,
) -> CocoImages:
    """Opens a data set in COCO's format. What is wrong with it, `check_coco` tells.

    Args:
        annotations: the JSON file. Masks are polygons, or run-length encodings of either form.
        images: the folder that file names are relative to.
        masks: whether targets have masks; None for whether the file has any.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if the file is not in COCO's format.
        MissingPackage: if pycocotools is not installed.
    """
    coco_tools("mask")
    annotations, images = Path(annotations).expanduser().absolute(), Path(images).expanduser().absolute()
    if not images.is_dir():
        raise MissingPath(f"there is no folder of images {images}")
    return CocoImages(annotations, images, read_coco(annotations), masks)


def check_coco(data: CocoImages) -> list[str]:
    """Looks for everything that can be wrong with a data set, without decoding an image.

    Fatal are missing image files; images or categories with the same id; annotations of unknown categories; images
    whose height and width are not given, or, among some hundred that are opened, differ from the file's; no
    annotation to train on. All else is left out, or mended, as the notes say.

    Returns:
        The notes, a line each.

    Raises:
        ValueError: if something is fatal, with all of it and the notes.
    """
    fatal, notes = list(data.findings.fatal), list(data.findings.notes)
    missing = _missing(data)
    if missing:
        fatal.insert(
            0, f"{counted(len(missing), 'image file')} missing of {len(data):,} in {data.images}: {few(missing)}"
        )
    absent = set(missing)
    looked, wrong, unreadable = 0, [], []
    for place in np.unique(np.linspace(0, len(data) - 1, HEADERS_READ).astype(int)).tolist():
        if os.fsdecode(data._names[place]) in absent or (data.sizes[place] < 1).any():
            continue
        looked += 1
        try:
            with strict_pillow():
                found, turned = stored_size(data.path(place))
        except UnreadableImage:
            unreadable.append(os.fsdecode(data._names[place]))
            continue
        size = tuple(data.sizes[place].tolist())
        if size != found and not (turned and size == found[::-1]):
            wrong.append(f"{os.fsdecode(data._names[place])} is {size_text(found)}, not {size_text(size)}")
    if unreadable:
        number = counted(len(unreadable), "file")
        notes.append(f"{number} of {looked} looked into that hold no readable image: {few(unreadable)}")
    if wrong:
        fatal.append(f"{counted(len(wrong), 'image')} of another size than the annotations say: {few(wrong)}")
    return Findings(fatal, notes).check(data.annotations)


def _missing(data: CocoImages) -> list[str]:
    """Names of files that do not exist; each folder is listed once."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in data.file_names:
        by_folder[os.path.dirname(name)].append(name)  # noqa: PTH120 (a hundred thousand of them)
    missing = []
    for folder, names in by_folder.items():
        try:
            with os.scandir(data.images / folder) as entries:
                there = {entry.name for entry in entries}
        except OSError:
            there = set()
        missing += [name for name in names if os.path.basename(name) not in there]  # noqa: PTH119
    return missing


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) and value >= 1 else 0


def _note(notes: list[str], which: npt.NDArray[np.bool_], word: str, what: str, words: str | None = None) -> None:
    number = int(which.sum())
    if number:
        notes.append(f"{counted(number, word, words)} {what}")


# Samples to train on


def collate_detection(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of samples of a `TargetDataset`: lists `image` and `target`, for images differ in size; tensors
    `index` and `skipped`; and one list `unreadable`."""
    return {
        "image": [sample["image"] for sample in samples],
        "target": [sample["target"] for sample in samples],
        "index": torch.tensor([sample["index"] for sample in samples]),
        "skipped": torch.tensor([sample["skipped"] for sample in samples]),
        "unreadable": [complaint for sample in samples for complaint in sample["unreadable"]],
    }
