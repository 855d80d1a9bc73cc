"""Images with label maps: finding, reading and checking them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
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

    `images/train/` and `labels/train/`, or `training`; `images/val/` and `labels/val/`, or `valid`, `validation`,
    `test`. Instead of `labels/`, `annotations/` (as in ADE20K) or `masks/`.
    """
    root = existing_folder(root)
    name = next((name for name in PART_NAMES[part] if (root / "images" / name).is_dir()), None)
    if name is None:
        raise MissingPath(
            f"{root} holds no images to {PURPOSE[part]}: there is no images/{part}/, "
            "nor a folder of another usual name; name the folders of images and of label maps"
        )
    labels = next((root / folder / name for folder in LABEL_FOLDERS if (root / folder / name).is_dir()), None)
    if labels is None:
        looked = ", ".join(f"{folder}/{name}/" for folder in LABEL_FOLDERS)
        raise MissingPath(f"{root} has no label maps for images/{name}/: none of {looked} exists")
    return SegmentationFiles(root / "images" / name, labels)


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
    """Images with their label maps, which have the same path and name, except for the ending.

    `open_segmentation` makes it. An item is an image, `tv_tensors.Image [C, H, W]`, and its classes, int32
    `tv_tensors.Mask [H, W]`, `IGNORED` for ignored pixels. Images are uint8, upright by their EXIF orientation unless
    the label map is not; arrays are float32, in their own units. `problems` are those of the folders;
    `check_segmentation` finds those of the files' content.
    """

    def __init__(self, files: SegmentationFiles, channels: int, ignore: int, reduce: bool) -> None:
        self.files, self.channels, self.ignore, self.reduce = files, channels, ignore, reduce
        self.problems = Problems()
        found = Source([], False, channels, 2)
        label_paths: list[str] = []
        try:
            found = Source.of_files(files.images, channels, 2)
        except UserError as error:
            self.problems.fatal.append(str(error))
        try:
            label_paths = find_images(files.labels, suffixes=(".png",))
        except UserError as error:
            self.problems.fatal.append(str(error))
        self.arrays = found.arrays
        images, labels = _by_stem(found.items, files.images), _by_stem(label_paths, files.labels)
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
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(self._classes(values)))

    def _classes(self, values: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        """Converts values of label maps, in any shape, to classes."""
        ignored = values == self.ignore
        classes = values.astype(np.int32) - self.reduce
        classes[ignored] = IGNORED  # and where 0 was reduced
        return classes

    def look(self, place: int) -> _Look:
        """Looks at a label map, and checks that it fits the image, by the image's header."""
        label, name = self._labels[place], self.name(place)
        try:
            values = read_values(self.label_path(place))
        except UnreadableImage as error:
            return _Look("unreadable", f"{label} ({error.reason})", {})
        except NotIndices as error:
            return _Look("colours", f"{label} ({error})", {})
        counts = np.bincount(values.ravel())
        present = np.flatnonzero(counts)
        classes = dict(zip(self._classes(present).tolist(), counts[present].tolist(), strict=True))
        classes.pop(IGNORED, None)
        try:
            if self.arrays:
                sizes = [to_array(self.files.images / name, self.channels, 2).shape[1:]]
            else:
                stored, turned = stored_size(self.files.images / name)
                sizes = [stored, stored[::-1]] if turned else [stored]
        except UnreadableImage as error:
            return _Look("image", f"{name} ({error.reason})", classes)
        if values.shape not in sizes:
            return _Look("size", f"{name} is {size_text(sizes[0])}, {label} {size_text(values.shape)}", classes)
        return _Look("", label, classes)


def _by_stem(paths: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Groups names relative to a folder by their stem."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        name = os.path.relpath(path, folder)
        ending = next(end for end in (*SUFFIXES, *ARRAY_SUFFIXES) if name.lower().endswith(end))
        found[name[: -len(ending)]].append(name)
    return found


class NotIndices(UserError):
    """A label map whose pixels are colours."""


def read_values(path: Path) -> npt.NDArray[Any]:
    """Reads the integers `[h, w]` of a label map: grey values, or indices into a palette.

    Raises:
        NotIndices: if it holds colours.
    """
    with open_picture(path) as image:
        if image.mode not in _GREY:
            raise NotIndices(image.mode)
        spread = next((_SPREAD[tile[3]] for tile in image.tile if tile[3] in _SPREAD), 1)
        values = np.array(image).astype(np.uint8 if image.mode in ("L", "P", "1") else np.int32)
        if image.mode.startswith("I") and values.size and not 0 <= values.min() <= values.max() < 2**16:
            raise UnreadableImage(path, f"holds values from {values.min()} to {values.max()}; classes are 0 to 65535")
        return values // spread if spread > 1 else values


def open_segmentation(
    images: str | Path, labels: str | Path, channels: int = 3, ignore: int = 255, reduce: bool = False
) -> SegmentationImages:
    """Opens a folder of images or arrays, and one of label maps. `check_segmentation` reports problems with them.

    Label maps are PNG files whose values are classes: grey of up to 16 bits, or with a palette. `ignore` is the value
    of ignored pixels. With `reduce`, pixels of value 0 are ignored too, and class 0 has the value 1, as in ADE20K.
    """
    files = SegmentationFiles(
        existing_folder(images, "folder of images"), existing_folder(labels, "folder of label maps")
    )
    return SegmentationImages(files, channels, ignore, reduce)


# Checking


class _Look(NamedTuple):
    """What was seen in one label map, with the number of pixels by class."""

    wrong: str  # key of `_WRONG`, `image` for an image that cannot be read, or "" if nothing is wrong
    what: str  # name of the file, and details
    classes: dict[int, int]


_WRONG = {
    "unreadable": ("label map that cannot be read", "label maps that cannot be read"),
    "colours": ("label map of colours, not of class numbers", "label maps of colours, not of class numbers"),
    "size": ("label map of another size than its image", "label maps of another size than their images"),
}


def check_segmentation(
    parts: Sequence[SegmentationImages], names: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """Checks every label map, and the header of every image, and raises an error that lists all problems.

    Fatal are images without label map; label maps without image, of another size than it, of colours instead of class
    numbers, or unreadable; values that are no class; a part without images or classes; a single class; without names,
    classes most of which have no pixel, or more than `MOST_CLASSES`. Shows progress on stderr if that is a terminal.

    This reads every label map, so in a distributed run one process should do it: results and errors pickle.

    Returns:
        Names of the classes, "0", "1", … unless given; and notes, a line each.
    """
    every = Problems()
    seen: list[dict[int, int]] = []
    example: dict[int, Path] = {}
    for part in parts:
        found, classes, files = _look_through(part, names)
        seen.append(classes)
        example = {**files, **example}
        for lines, of_part in ((every.fatal, found.fatal), (every.notes, found.notes)):
            lines += [f"{part.files.labels}: {line}" for line in of_part]
    count = len(names) if names is not None else max(example, default=-1) + 1
    if names is None and (len(example) < count / 2 or count > MOST_CLASSES):
        file, value = example[count - 1], count - 1 + parts[0].reduce
        raise UserError(
            f"{file} has the value {value}, which makes {count:,} classes, of which {len(example):,} have a pixel; "
            "correct it, or name the classes in a file by --classes"
        )
    listed = list(names) if names is not None else [str(number) for number in range(count)]
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


def _look_through(
    part: SegmentationImages, names: Sequence[str] | None
) -> tuple[Problems, dict[int, int], dict[int, Path]]:
    """Returns the problems of a part, its number of pixels by class, and the first label map with each class."""
    found = Problems(list(part.problems.fatal), list(part.problems.notes))
    wrong: dict[str, list[str]] = defaultdict(list)
    totals: dict[int, int] = defaultdict(int)
    files: dict[int, Path] = {}
    console = Terminal()
    with ThreadPoolExecutor(_THREADS) as pool:
        looks = pool.map(part.look, range(len(part)))
        doing = f"checking {escape(printable(part.files.labels.name))}"
        for place, look in enumerate(
            track(looks, doing, len(part), console=console, transient=True, disable=not console.is_terminal)
        ):
            if look.wrong:
                wrong[look.wrong].append(look.what)
            if names is not None and (values := [n + part.reduce for n in look.classes if n >= len(names)]):
                wrong["outside"].append(f"{look.what} has {few(values)}")
            for number, pixels in look.classes.items():
                totals[number] += pixels
                files.setdefault(number, part.label_path(place))
    for kind, (word, words) in _WRONG.items():
        if wrong[kind]:
            found.fatal.append(f"{counted(len(wrong[kind]), word, words)}: {few(wrong[kind])}")
    outside = f"with values that are none of the {len(names or ())} classes"
    report(found.fatal, wrong["outside"], outside, "label map")
    report(found.notes, wrong["image"], "that cannot be read", "image")
    return found, totals, files
