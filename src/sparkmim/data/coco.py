"""Images with boxes and masks in COCO's format: finding, reading and checking them."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import pickle
import warnings
from collections import defaultdict
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
from sparkmim.data.coco_masks import FAULTS, as_number, polygons, read_segmentation
from sparkmim.data.dataset import SharedPaths
from sparkmim.data.decoding import UnreadableImage, decode_annotated, size_text, stored_size
from sparkmim.data.discovery import existing_folder
from sparkmim.data.labelled import PART_NAMES, PURPOSE, Part
from sparkmim.data.problems import Problems, counted, few, repeated, report
from sparkmim.errors import MissingPath, UserError

Target = dict[str, Any]
Sample = tuple[Tensor, Target]
"""An image `[3, H, W]`, and the objects on it."""

HEADERS_READ = 100
"""Number of images whose headers are compared with the sizes in the annotations."""


def coco_tools(part: str) -> Any:
    """Imports a module of pycocotools: `mask`, `coco` or `cocoeval`."""
    try:
        return importlib.import_module(f"pycocotools.{part}")
    except ImportError as error:
        raise MissingPackage("data in COCO format needs pycocotools: `pip install 'sparkmim[detect]'`") from error


@contextmanager
def quiet_tools() -> Iterator[None]:
    """Silences pycocotools' prints, and numpy's warnings about its code."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# Finding


class CocoFiles(NamedTuple):
    """Annotation file, and the folder that its image names are relative to."""

    annotations: Path
    images: Path


def find_coco(root: str | Path, part: Part) -> CocoFiles:
    """Finds a part of a data set by the usual names.

    - COCO's own: `annotations/instances_train2017.json` and `train2017/`, of any year or none; also
      `annotations/train.json`, and the images in `images/train2017/`, `images/train/` or, for all parts, `images/`;
    - a folder per part that holds a JSON file and the images: `train/_annotations.coco.json`.

    Names of the part to validate on are `val`, `valid`, `validation` and `test`, in this order.
    """
    root = existing_folder(root)
    for name in PART_NAMES[part]:
        stems = f"instances_{name}[0-9]*", f"instances_{name}", f"{name}[0-9]*", name, f"{name}_coco"
        patterns = [f"{folder}{stem}.json" for folder in ("annotations/", "") for stem in stems]
        found = [file for pattern in patterns for file in sorted(root.glob(pattern))]
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
        f"{root} holds no annotations to {PURPOSE[part]}, such as annotations/instances_{part}2017.json or "
        f"{part}/_annotations.coco.json; name the file and the folder of images"
    )


# Reading


def box_of(annotation: Mapping[str, Any]) -> list[float]:
    """Returns the box of an annotation: left, top, width, height; NaN four times if it has no such box.

    If none is given, it is that of the polygons.
    """
    box = annotation.get("bbox")
    if isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box):
        return box
    outlines = None if box else polygons(annotation.get("segmentation"))
    if not outlines:
        return [math.nan] * 4
    x, y = ([value for outline in outlines for value in outline[axis::2]] for axis in (0, 1))
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)] if x else [math.nan] * 4


def mask_of(annotation: Mapping[str, Any], height: int, width: int) -> Any:
    """Returns the segmentation of an annotation for pycocotools: polygons, a run-length encoding, or None."""
    return read_segmentation(annotation.get("segmentation"), height, width)[0]


def category_names(categories: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Returns names by category id, in the order of ids; equal names get the id appended."""
    named = {int(category["id"]): str(category.get("name", category["id"])) for category in categories}
    often = repeated(named.values())
    return {place: f"{name} ({place})" if name in often else name for place, name in sorted(named.items())}


_NUMBERS = ("id", "image_id", "category_id", "height", "width", "iscrowd", "area")
"""Fields of records that hold numbers."""


def read_coco(file: str | Path, notes: list[str] | None = None) -> dict[str, Any]:
    """Reads an annotation file, whose lists `images` and `categories` are not empty and whose ids are integers.

    Numbers that are written as texts are read as numbers; `notes` receives a line about them.
    """
    file = Path(file)
    if not file.is_file():
        raise MissingPath(f"there is no annotation file {file}")
    try:
        content = json.loads(file.read_bytes())
    except (RecursionError, ValueError) as error:  # of JSON, or of the encoding
        raise UserError(f"{file} is no JSON file: {error}") from error
    for part in ("images", "annotations", "categories"):
        records = content.get(part) if isinstance(content, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise UserError(f"{file} is not in COCO's format: it has no list `{part}` of objects")
        texts = _parse_numbers(records)
        if texts and notes is not None:
            notes.append(f"{counted(texts, 'record')} of {part} with numbers written as texts; read as numbers")
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


def _parse_numbers(records: Sequence[dict[str, Any]]) -> int:
    """Replaces texts in records that stand for numbers; returns in how many records there were some."""
    count = 0
    for record in records:
        texts = {name: as_number(record[name]) for name in _NUMBERS if isinstance(record.get(name), str)}
        box = record.get("bbox")
        if isinstance(box, list) and any(isinstance(value, str) for value in box):
            texts["bbox"] = [as_number(value) for value in box]
        count += any(record[name] != value for name, value in texts.items())
        record |= texts
    return count


class CocoImages(Dataset[Any]):
    """The images of an annotation file, with the objects on them.

    `open_coco` makes it. An item is an image, uint8 `tv_tensors.Image [3, H, W]`, and a target for torchvision's
    detectors:

    - `boxes`: float32 `tv_tensors.BoundingBoxes [n, 4]`, left, top, right, bottom, in pixels;
    - `labels`: long `[n]`, from 1 to the number of classes;
    - `masks`: uint8 `tv_tensors.Mask [n, H, W]`, where `has_masks`;
    - `image_id`: the image's id in the file;
    - `size`: original height and width, which a resize leaves unchanged.

    Images without annotations are items too. Crowds, which only the evaluation uses, and broken annotations are left
    out. Boxes that reach beyond the image are clipped to it. For the orientation of images, see `decode_annotated`.

    Attributes:
        image_ids: ids in the file, by item.
        names: paths of the images, relative to the folder.
        sizes: long `[images, 2]`, height and width in the file.
        category_ids: ids in the file, ascending: label 1 is the first of them.
        problems: problems of the annotation file; `check_coco` adds those of the image files.
    """

    def __init__(self, annotations: Path, images: Path, content: Mapping[str, Any], masks: bool | None = None) -> None:
        self.annotations, self.images = annotations, images
        self.problems = Problems()
        names = category_names(content["categories"])
        self.category_ids, self.classes = list(names), list(names.values())
        records = content["images"]
        self.image_ids = np.array([record["id"] for record in records], np.int64)
        self._names = SharedPaths(self._turned([record["file_name"] for record in records]))
        sides = [[record.get(side) for side in ("height", "width")] for record in records]
        self.sizes = np.array(
            [[int(x) if isinstance(x, int | float) and x >= 1 else 0 for x in pair] for pair in sides]
        )
        self._check_records(content)
        self._take(content["annotations"], masks)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def names(self) -> list[str]:
        """Names of the image files, as in the annotations."""
        return list(self._names)

    def path(self, place: int) -> Path:
        """Returns the path of an image."""
        return self.images / self._names[place]

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
        """Reads an image as uint8 `[3, H, W]`, which is unreadable if of another size than in the annotations."""
        height, width = self.sizes[place].tolist()
        return decode_annotated(self.path(place), (height, width), self.annotations.name)

    def take_categories(self, category_ids: Sequence[int], classes: Sequence[str], of: str | Path) -> None:
        """Takes over the labels of `of`, another data set or a detector, which may have more categories.

        `category_ids` ascend; label 1 becomes the first of them.
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

    def _turned(self, names: list[str]) -> list[str]:
        """Turns the separators of Windows in names of files that do not exist otherwise."""
        turned = [
            name.replace("\\", "/") if "\\" in name and not (self.images / name).is_file() else name for name in names
        ]
        changed = [name for name, now in zip(names, turned, strict=True) if name != now]
        report(self.problems.notes, changed, "with the separators of Windows; read as /", "file name")
        return turned

    def _check_records(self, content: Mapping[str, Any]) -> None:
        fatal, notes = self.problems.fatal, self.problems.notes
        for kind, records in (("image", content["images"]), ("category", content["categories"])):
            report(fatal, repeated(record["id"] for record in records), "given more than once", f"{kind} id")
        twice = [
            number for number in repeated(record.get("id") for record in content["annotations"]) if number is not None
        ]
        if twice:
            notes.append(f"{counted(len(twice), 'annotation id')} given more than once: {few(twice)}; all are used")
        sizeless = self.image_ids[(self.sizes < 1).any(1)].tolist()
        if sizeless:
            fatal.append(f"{counted(len(sizeless), 'image')} without height and width: id {few(sizeless)}")
        report(notes, repeated(self.names), "named by several images", "file")
        if self.category_ids != list(range(1, len(self.category_ids) + 1)):
            first, last = self.category_ids[0], self.category_ids[-1]
            number = counted(len(self.classes), "class", "classes")
            notes.append(
                f"category ids run from {first} to {last} for {number}; labels count from 1 without gaps, and results "
                "are written with the ids of the file"
            )

    def _take(self, records: Sequence[Mapping[str, Any]], masks: bool | None) -> None:
        """Keeps the annotations to train on, in the order of the images, and notes the others."""
        fatal, notes = self.problems.fatal, self.problems.notes
        place_of: dict[Any, int] = {number: place for place, number in enumerate(self.image_ids.tolist())}
        label_of: dict[Any, int] = {number: label for label, number in enumerate(self.category_ids, 1)}
        places = np.array([place_of.get(record.get("image_id"), -1) for record in records], np.int64)
        labels = np.array([label_of.get(record.get("category_id"), 0) for record in records], np.int64)
        crowd = np.array([bool(record.get("iscrowd", 0)) for record in records], bool)
        given = np.array([box_of(record) for record in records], np.float64).reshape(-1, 4)

        keep = places >= 0
        _note(notes, ~keep, "annotation", "of images that are not in the file; left out")
        unknown = sorted({str(records[place].get("category_id")) for place in np.flatnonzero(labels == 0).tolist()})
        if unknown:
            fatal.append(f"{counted(int((labels == 0).sum()), 'annotation')} of unknown categories: {few(unknown)}")
        keep &= labels > 0
        _note(notes, keep & crowd, "crowd", "not trained on, but used by the evaluation", "crowds")
        keep &= ~crowd

        known = np.isfinite(given).all(1)  # NaN where there is no box
        boxless = np.array([not record.get("bbox") for record in records], bool)
        _note(notes, keep & known & boxless, "annotation", "without a box; that of the polygons is taken")
        _note(notes, keep & ~known, "annotation", "without a box of four numbers; left out")
        keep &= known
        flat = (given[:, 2:] <= 0).any(1)
        _note(notes, keep & flat, "box", "of zero area; left out", "boxes")
        keep &= ~flat
        limits = self.sizes[places][:, [1, 0, 1, 0]] if len(records) else given  # width, height, twice
        corners = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], 1)
        clipped = np.clip(corners, 0, limits)
        outside = (clipped[:, 2:] <= clipped[:, :2]).any(1)
        _note(notes, keep & outside, "box", "wholly outside the image; left out", "boxes")
        keep &= ~outside
        # Annotation tools round to about a tenth of a pixel
        _note(notes, keep & (np.abs(corners - clipped) > 1).any(1), "box", "partly outside the image; clipped", "boxes")

        segmentations: list[Any] = [None] * len(records)
        faulty: dict[str, list[str]] = defaultdict(list)
        useless = np.zeros(len(records), bool)
        if masks is None or masks:
            for row in np.flatnonzero(keep).tolist():
                height, width = self.sizes[places[row]].tolist()
                segmentations[row], fault = read_segmentation(records[row].get("segmentation"), height, width)
                if fault:
                    faulty[fault].append(f"id {records[row].get('id')} of {self._names[places[row]]}")
                    useless[row] = segmentations[row] is None
        bare = np.array([segmentation is None for segmentation in segmentations], bool)
        self.has_masks = not bare.all()
        for fault, which in faulty.items():
            report(notes if self.has_masks else fatal, which, FAULTS[fault], "annotation")
        if self.has_masks:
            without = keep & bare & ~useless
            _note(notes, without, "annotation", "with a box but no mask; left out while masks are trained on")
            keep &= ~bare
        elif useless.any():
            fatal.append("none of the masks can be used; correct them, or train on boxes alone with --masks false")
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
            fatal.append("there are no objects on the images: no annotation is left")
            return
        counts = np.bincount(self._labels, minlength=len(self.classes) + 1)[1:]
        without = [self.classes[place] for place in np.flatnonzero(counts == 0)]
        report(notes, without, "without annotations", "class", "classes")
        _note(notes, np.diff(self._starts) == 0, "image", "without annotations; kept as background")


def open_coco(annotations: str | Path, images: str | Path, masks: bool | None = None) -> CocoImages:
    """Opens a data set in COCO's format. `check_coco` reports problems with it.

    Masks are polygons, or run-length encodings of either form. File names are relative to `images`. Targets have masks
    if `masks`; None if they have them whenever the file does.
    """
    coco_tools("mask")
    annotations, images = Path(annotations).expanduser().absolute(), existing_folder(images, "folder of images")
    notes: list[str] = []
    opened = CocoImages(annotations, images, read_coco(annotations, notes), masks)
    opened.problems.notes[:0] = notes
    return opened


def check_coco(data: CocoImages) -> list[str]:
    """Checks a data set, without decoding an image; returns notes, and raises an error that lists all problems.

    Fatal are missing image files; images or categories with equal ids; annotations of unknown categories; images
    without height and width, or, among a hundred whose headers are read, of other ones; no annotation to train on.
    Other faulty annotations are left out or corrected, as the notes say.
    """
    fatal, notes = list(data.problems.fatal), list(data.problems.notes)
    missing = _missing(data)
    if missing:
        number = counted(len(missing), "image file")
        fatal.insert(0, f"{number} missing of {len(data):,} in {data.images}: {few(missing)}")
    names, absent = data.names, set(missing)
    looked, wrong, unreadable = 0, [], []
    for place in np.unique(np.linspace(0, len(data) - 1, HEADERS_READ).astype(int)).tolist():
        name = names[place]
        if name in absent or (data.sizes[place] < 1).any():
            continue
        looked += 1
        try:
            found, turned = stored_size(data.path(place))
        except UnreadableImage:
            unreadable.append(name)
            continue
        size = tuple(data.sizes[place].tolist())
        if size != found and not (turned and size == found[::-1]):
            wrong.append(f"{name} is {size_text(found)}, not {size_text(size)}")
    report(notes, unreadable, f"without a readable image, among {looked} checked", "file")
    report(fatal, wrong, "of another size than in the annotations", "image")
    return Problems(fatal, notes).check(data.annotations)


def _missing(data: CocoImages) -> list[str]:
    """Returns the names of files that do not exist; lists each folder once."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in data.names:
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


def _note(notes: list[str], which: npt.NDArray[np.bool_], word: str, what: str, words: str | None = None) -> None:
    if number := int(which.sum()):
        notes.append(f"{counted(number, word, words)} {what}")
