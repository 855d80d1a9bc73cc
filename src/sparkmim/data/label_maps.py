"""Images with label maps: finding, reading and checking them."""

from __future__ import annotations

import copy
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.markup import escape
from rich.progress import track
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sparkmim.data.arrays import ARRAY_SUFFIXES, to_array
from sparkmim.data.dataset import SharedPaths
from sparkmim.data.decoding import (
    UnreadableImage,
    decode_annotated,
    open_picture,
    size_text,
    stored_size,
)
from sparkmim.data.discovery import SUFFIXES, existing_folder, find_images
from sparkmim.data.labelled import PART_NAMES, PURPOSE, Part
from sparkmim.data.problems import Problems, counted, few, report
from sparkmim.data.source import Source
from sparkmim.errors import MissingPath, UserError
from sparkmim.terminal import Terminal, printable

IGNORED = -1
"""Class of ignored pixels, in label maps as read."""

LABEL_FOLDERS = ("labels", "annotations", "masks")
"""Names of the folder of label maps; the first that exists is used."""

LABEL_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of label maps' names: formats without loss."""

_LABEL_ENDING = re.compile(r"[-_. ](masks?|labels?|lbl|seg|segmentation|annotations?|gt)$", re.IGNORECASE)
_IMAGE_ENDING = re.compile(r"[-_. ](images?|img|rgb|sat)$", re.IGNORECASE)
"""What stems may end in, so that `01.jpg` or `01_image.jpg` has the label map `01_mask.png`."""

_GREY = {"L", "P", "1", "I", "I;16", "I;16B", "I;16L"}
"""Pillow's modes of images whose pixels are single integers."""

_SPREAD = {"L;2": 85, "L;4": 17}
"""Factors by which Pillow spreads grey values of 2 and 4 bits over the range of 8."""

_THREADS = 8

MOST_CLASSES = 1000
"""More classes than this have to be named: a single stray value would make tens of thousands."""


# Finding


class SegmentationFiles(NamedTuple):
    """Folder of images, and folder of their label maps."""

    images: Path
    labels: Path


def find_segmentation(root: str | Path, part: Part) -> SegmentationFiles:
    """Finds a part of a data set by the usual names.

    - `images/train/` and `labels/train/`, or `train/images/` and `train/labels/`;
    - `train/`, with label maps beside the images: `01_mask.png` beside `01.jpg`;
    - to train on, all of a folder without parts: `images/` and `labels/`, or label maps beside the images.

    Instead of `labels/`, `annotations/` (as in ADE20K) or `masks/`. Names of the part to train on are `train` and
    `training`; of the part to validate on `val`, `valid`, `validation` and `test`.
    """
    root = existing_folder(root)
    for name in PART_NAMES[part]:
        for images, pattern in ((f"images/{name}", f"{{}}/{name}"), (f"{name}/images", f"{name}/{{}}")):
            if (root / images).is_dir():
                return _with_labels(root, images, pattern)
        if _is_mixed(root / name):
            return SegmentationFiles(root / name, root / name)
    names = [name for names in PART_NAMES.values() for name in names]
    if part == "train" and not any((root / folder / name).is_dir() for name in names for folder in ("", "images")):
        if (root / "images").is_dir():
            return _with_labels(root, "images", "{}")
        if _is_mixed(root):
            return SegmentationFiles(root, root)
    remedy = ", or set some apart with --val-split 0.2" if part == "val" else ""
    raise MissingPath(
        f"{root} holds no images to {PURPOSE[part]}: there is no images/{part}/, nor a folder of another usual name; "
        f"name the folders of images and of label maps{remedy}"
    )


def _with_labels(root: Path, images: str, pattern: str) -> SegmentationFiles:
    """Finds the folder of label maps; `pattern` gives its path by its name."""
    looked = [pattern.format(folder) for folder in LABEL_FOLDERS]
    labels = next((root / folder for folder in looked if (root / folder).is_dir()), None)
    if labels is None:
        raise MissingPath(f"{root} has no label maps for {images}/: none of {'/, '.join(looked)}/ exists")
    return SegmentationFiles(root / images, labels)


def _is_mixed(folder: Path) -> bool:
    """Tells by their names whether a folder holds images with label maps beside them."""
    return folder.is_dir() and any(
        path.suffix.lower() in LABEL_SUFFIXES and _LABEL_ENDING.search(path.stem) for path in folder.iterdir()
    )


def read_class_names(file: str | Path) -> list[str]:
    """Reads the names of classes, one per line, from class 0 on; empty lines at the end are ignored."""
    file = Path(file).expanduser()
    if not file.is_file():
        raise MissingPath(f"there is no file of class names {file}")
    names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    if not all(names):
        raise UserError(f"{file} must name one class per line, but line {names.index('') + 1} is empty")
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise UserError(f"{file} names a class twice: {few(twice)}")
    return names


# Reading


class SegmentationImages(Dataset[Any]):
    """Images with their label maps, which have the same path and name, except for the ending, and words like `_mask`.

    `open_segmentation` makes it. An item is an image, `tv_tensors.Image [C, H, W]`, and its classes, int32
    `tv_tensors.Mask [H, W]`, `IGNORED` for ignored pixels. Images are uint8, upright by their EXIF orientation unless
    the label map is not; arrays are float32, in their own units. `problems` are those of the folders;
    `check_segmentation` finds those of the files' content.

    Attributes:
        label_values: values of the classes in label maps; None if they are the classes' numbers.
    """

    def __init__(
        self, files: SegmentationFiles, channels: int, ignore: int, reduce: bool, label_values: Sequence[int] | None
    ) -> None:
        self.files, self.channels, self.ignore, self.reduce = files, channels, ignore, reduce
        self.label_values = label_values
        self.problems = Problems()
        found = Source([], False, channels, 2)
        label_paths: list[str] = []
        try:
            found = Source.of_files(files.images, channels, 2)
        except UserError as error:
            self.problems.fatal.append(str(error))
        try:
            label_paths = find_images(files.labels, suffixes=LABEL_SUFFIXES)
        except UserError as error:
            self.problems.fatal.append(str(error))
        self.arrays = found.arrays
        images, labels = _by_stem(found.items, files.images), _by_stem(label_paths, files.labels)
        if files.images == files.labels:
            labels = {stem: paths for stem, paths in labels.items() if _LABEL_ENDING.search(stem)}
            images = {stem: paths for stem, paths in images.items() if stem not in labels}
            if not labels:
                self.problems.fatal.append("no label map beside the images is named like 01_mask.png")
        labels = _named_as_images(labels, images)
        both = sorted(images.keys() & labels.keys())
        for what, stems in (("image", images), ("label map", labels)):
            twice = [few(paths) for stem in both if len(paths := stems[stem]) > 1]
            if twice:
                self.problems.fatal.append(f"{counted(len(twice), what)} with another of the same name: {twice[0]}")
        if images and labels:
            for what, other, these in (("image", "label map", images), ("label map", "image", labels)):
                alone = [these[stem][0] for stem in sorted(these.keys() - set(both))]
                report(self.problems.fatal, alone, f"without {other}", what)
        self._images = SharedPaths(images[stem][0] for stem in both)
        self._labels = SharedPaths(labels[stem][0] for stem in both)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, place: int) -> str:
        """Returns an image's path, relative to the folder."""
        return self._images[place]

    @property
    def names(self) -> list[str]:
        """Paths of the images, relative to the folder."""
        return list(self._images)

    @property
    def source(self) -> Source:
        """The images without their label maps."""
        return Source([str(self.files.images / name) for name in self._images], self.arrays, self.channels, 2)

    def split(self, share: float, seed: int) -> tuple[SegmentationImages, SegmentationImages]:
        """Sets apart a share of the images, at least one; returns the remaining images, and those set apart."""
        if len(self) < 2:
            self.problems.fatal.append("there are fewer than 2 images, so none can be set apart for validation")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        count = min(len(self) - 1, max(1, round(share * len(self))))
        apart = self._take(sorted(order[:count]))
        apart.problems = Problems()
        return self._take(sorted(order[count:])), apart

    def _take(self, places: Sequence[int]) -> SegmentationImages:
        taken = copy.copy(self)
        taken._images, taken._labels = (
            SharedPaths(paths[place] for place in places) for paths in (self._images, self._labels)
        )
        return taken

    def label_path(self, place: int) -> Path:
        """Returns the path of a label map."""
        return self.files.labels / self._labels[place]

    def __getitem__(self, place: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        path = self.files.images / self.name(place)
        values = read_values(self.label_path(place))  # [h, w]
        size = (values.shape[0], values.shape[1])
        if self.arrays:
            array = to_array(path, self.channels, 2)
            if array.shape[1:] != size:
                raise UnreadableImage(path, f"is {size_text(array.shape[1:])}, but its label map is {size_text(size)}")
            image = torch.from_numpy(np.array(array, dtype=np.float32))  # [c, h, w]
            if not bool(torch.isfinite(image).all()):
                raise UnreadableImage(path, "holds values that are not finite")
        else:
            image = decode_annotated(path, size, "its label map", self.channels)
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(self.classes_of(values)))

    def classes_of(self, values: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        """Converts values of label maps, in any shape, to classes; with `label_values`, others are the next number."""
        classes = values.astype(np.int32) - self.reduce
        if self.label_values is not None:
            classes[:] = len(self.label_values)
        classes[values == self.ignore] = IGNORED  # and where 0 was reduced
        for number, value in enumerate(self.label_values or ()):
            classes[values == value] = number
        return classes

    def look(self, place: int) -> _Look:
        """Looks at a label map, and checks that it fits the image, by the image's header."""
        label, name = self._labels[place], self.name(place)
        try:
            values = read_values(self.label_path(place))
        except UnreadableImage as error:
            return _Look("unreadable", f"{label} ({error.reason})", [])
        except NotIndices as error:
            return _Look("colours", f"{label} ({error})", [])
        present = np.flatnonzero(np.bincount(values.ravel())).tolist()
        try:
            if self.arrays:
                sizes = [to_array(self.files.images / name, self.channels, 2).shape[1:]]
            else:
                stored, turned = stored_size(self.files.images / name)
                sizes = [stored, stored[::-1]] if turned else [stored]
        except UnreadableImage as error:
            return _Look("image", f"{name} ({error.reason})", present)
        if values.shape not in sizes:
            return _Look("size", f"{name} is {size_text(sizes[0])}, {label} {size_text(values.shape)}", present)
        return _Look("", label, present)


def _by_stem(paths: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Groups names relative to a folder by their stem."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        name = os.path.relpath(path, folder)
        ending = next(end for end in (*SUFFIXES, *ARRAY_SUFFIXES) if name.lower().endswith(end))
        found[name[: -len(ending)]].append(name)
    return found


def _named_as_images(labels: dict[str, list[str]], images: dict[str, list[str]]) -> dict[str, list[str]]:
    """Replaces stems of label maps that are no image's by those of images, where usual words at their ends differ."""
    bare = {_IMAGE_ENDING.sub("", stem): stem for stem in images if stem not in labels}
    bare |= {stem: stem for stem in images}
    found: dict[str, list[str]] = defaultdict(list)
    for stem, paths in labels.items():
        found[stem if stem in images else bare.get(_LABEL_ENDING.sub("", stem), stem)] += paths
    return found


class NotIndices(UserError):
    """A label map whose pixels are colours."""


def read_values(path: Path) -> npt.NDArray[Any]:
    """Reads the integers `[h, w]` of a label map: grey values, also of opaque RGB, or indices into a palette.

    Raises:
        NotIndices: if it holds colours.
    """
    with open_picture(path) as image:
        if image.mode in ("LA", "RGB", "RGBA"):
            bands: npt.NDArray[np.uint8] = np.array(image.convert("RGBA"))  # [h, w, 4]
            if (bands[..., :3] == bands[..., :1]).all() and (bands[..., 3] == 255).all():
                return bands[..., 0]
        if image.mode not in _GREY:
            raise NotIndices(image.mode)
        spread = next((_SPREAD[tile[3]] for tile in image.tile if tile[3] in _SPREAD), 1)
        values = np.array(image).astype(np.uint8 if image.mode in ("L", "P", "1") else np.int32)
        if image.mode.startswith("I") and values.size and not 0 <= values.min() <= values.max() < 2**16:
            raise UnreadableImage(path, f"holds values from {values.min()} to {values.max()}; classes are 0 to 65535")
        return values // spread if spread > 1 else values


def open_segmentation(
    images: str | Path,
    labels: str | Path,
    channels: int = 3,
    ignore: int = 255,
    reduce: bool = False,
    label_values: Sequence[int] | None = None,
) -> SegmentationImages:
    """Opens a folder of images or arrays, and one of label maps. `check_segmentation` reports problems with them.

    Label maps are PNG, BMP, GIF or TIFF files whose values are classes: grey, or with a palette. `ignore` is the value
    of ignored pixels. With `reduce`, pixels of value 0 are ignored too, and class 0 has the value 1, as in ADE20K.
    `label_values` are the values of the classes, if these are not numbered.
    """
    files = SegmentationFiles(
        existing_folder(images, "folder of images"), existing_folder(labels, "folder of label maps")
    )
    return SegmentationImages(files, channels, ignore, reduce, label_values)


# Checking


class _Look(NamedTuple):
    """What was seen in one label map, and the values in it."""

    wrong: str  # key of `_WRONG`, `image` for an image that cannot be read, or "" if nothing is wrong
    what: str  # name of the file, and details
    values: list[int]


_WRONG = {
    "unreadable": ("label map that cannot be read", "label maps that cannot be read"),
    "colours": ("label map of colours, not of class numbers", "label maps of colours, not of class numbers"),
    "size": ("label map of another size than its image", "label maps of another size than their images"),
}


def check_segmentation(
    parts: Sequence[SegmentationImages], names: Sequence[str] | None = None, numbered: bool = False
) -> tuple[list[str], list[str]]:
    """Checks every label map, and the header of every image, and raises an error that lists all problems.

    Fatal are images without label map; label maps without image, of another size than it, of colours instead of class
    numbers, or unreadable; values that are no class; a part without images or classes; a single class; without names,
    classes most of which have no pixel, or more than `MOST_CLASSES`. Shows progress on stderr if that is a terminal.

    If there are just two values in all label maps, such as 0 and 255, they are two classes, and become the parts'
    `label_values`; unless values are known to be `numbered`.

    Returns:
        Names of the classes, their values unless given; and notes, a line each.
    """
    every = Problems()
    looks = [_look_through(part, names) for part in parts]
    pair = None if numbered else _two_values(parts, [value for look in looks for value in look.values], names)
    seen: list[set[int]] = []
    for part, look in zip(parts, looks, strict=True):
        if pair is not None:
            part.label_values = pair
        else:
            outside = f"with values that are none of the {len(names or ())} classes"
            report(look.problems.fatal, look.outside, outside, "label map")
        seen.append(set(part.classes_of(np.array([*look.values], np.int64)).tolist()) - {IGNORED})
        for lines, of_part in ((every.fatal, look.problems.fatal), (every.notes, look.problems.notes)):
            lines += [f"{part.files.labels}: {line}" for line in of_part]
    count = max((number for classes in seen for number in classes), default=-1) + 1
    used = len(set().union(*seen))
    if names is None and pair is None and (used < count / 2 or count > MOST_CLASSES):
        value = count - 1 + parts[0].reduce
        file = next(look.values[value] for look in looks if value in look.values)
        raise UserError(
            f"{file} has the value {value}, which makes {count:,} classes, of which {used:,} have a pixel; correct it, "
            "or name the classes in a file by --classes"
        )
    listed = list(names) if names is not None else [str(value) for value in pair or range(count)]
    count = len(listed)
    if pair is not None:
        naming = "; --classes names them" if names is None else f", {listed[0]} and {listed[1]}"
        every.notes.append(f"{pair[0]} and {pair[1]} are the only values in the label maps, and so two classes{naming}")
    if count < 2 and not every.fatal:
        only = f"class {listed[0]}" if listed else "no class"
        every.fatal.append(
            f"there is {only} alone, but segmentation needs 2 or more classes, the background included; pixels of "
            f"value {parts[0].ignore} are ignored, unless ignore is another value"
        )
    for part, classes in zip(parts, seen, strict=True):
        if not classes and not every.fatal:
            every.fatal.append(f"{part.files.labels}: every pixel of every label map is ignored")
    without = [name for number, name in enumerate(listed) if number not in seen[0]]
    report(every.notes, without, f"without a pixel in {parts[0].files.labels}", "class", "classes")
    return listed, every.check(" and ".join(dict.fromkeys(str(part.files.images) for part in parts)))


class _PartLook(NamedTuple):
    """What was seen in the label maps of a part."""

    problems: Problems
    values: dict[int, Path]  # the first label map with each value
    outside: list[str]  # label maps with values that are no class, and these values


def _two_values(
    parts: Sequence[SegmentationImages], values: Iterable[int], names: Sequence[str] | None
) -> list[int] | None:
    """Returns the values of label maps of two classes that are not numbered, such as 0 and 255; else None."""
    pair = sorted(set(values))
    numbered = pair == [0, 1] or any(part.reduce for part in parts)
    return pair if len(pair) == 2 == len(names or pair) and not numbered else None


def _look_through(part: SegmentationImages, names: Sequence[str] | None) -> _PartLook:
    """Looks at all label maps of a part."""
    found = Problems(list(part.problems.fatal), list(part.problems.notes))
    wrong: dict[str, list[str]] = defaultdict(list)
    values: dict[int, Path] = {}
    console = Terminal()
    with ThreadPoolExecutor(_THREADS) as pool:
        looks = pool.map(part.look, range(len(part)))
        doing = f"checking {escape(printable(part.files.labels.name))}"
        for place, look in enumerate(
            track(looks, doing, len(part), console=console, transient=True, disable=not console.is_terminal)
        ):
            if look.wrong:
                wrong[look.wrong].append(look.what)
            for value in look.values:
                values.setdefault(value, part.label_path(place))
            if names is not None:
                present = np.array(look.values, np.int64)
                if outside := present[part.classes_of(present) >= len(names)].tolist():
                    wrong["outside"].append(f"{look.what} has {few(outside)}")
    for kind, (word, words) in _WRONG.items():
        if wrong[kind]:
            found.fatal.append(f"{counted(len(wrong[kind]), word, words)}: {few(wrong[kind])}")
    report(found.notes, wrong["image"], "that cannot be read", "image")
    return _PartLook(found, values, wrong["outside"])
