"""Images with a class for each pixel: where they are, what is wrong with them, and how they are read."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sparkmim.data.arrays import ARRAY_SUFFIXES, to_array
from sparkmim.data.decoding import (
    UnreadableImage,
    decode_annotated,
    reason_of,
    size_text,
    stored_size,
    strict_pillow,
)
from sparkmim.data.discovery import SUFFIXES, find_images, find_items
from sparkmim.data.labelled import PART_NAMES, PURPOSE, Part
from sparkmim.data.problems import Findings, counted, few
from sparkmim.errors import MissingPath, UserError

T = TypeVar("T")

IGNORED = -1
"""The class of pixels that count for nothing, in label maps as they are handed on."""

LABEL_FOLDERS = ("labels", "annotations", "masks")
"""Names of the folder of label maps; of several, the first that is there."""

_GREY = {"L", "P", "1", "I", "I;16", "I;16B", "I;16L"}
"""Pillow's names of images whose pixels are single integers."""

_SPREAD = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies grey values of 2 and 4 bits by, to fill the range of 8."""

_THREADS = 8


# Where they are


class SegmentationFiles(NamedTuple):
    """A folder of images, and that of their label maps."""

    images: Path
    labels: Path


def find_segmentation(root: str | Path, part: Part) -> SegmentationFiles:
    """A part of a data set, to train or to validate on, by the names that are in use.

    `images/train/` and `labels/train/`, or `training`; and `images/val/` and `labels/val/`, or `valid`, `validation`,
    `test`. Instead of `labels/`, `annotations/` (as ADE20K has it) or `masks/`.

    Raises:
        FileNotFoundError: if there is no such folder, no images of this part, or no label maps for them.
    """
    root = Path(root).expanduser().absolute()
    if not root.is_dir():
        raise MissingPath(f"there is no folder {root}")
    name = next((name for name in PART_NAMES[part] if (root / "images" / name).is_dir()), None)
    if name is None:
        raise MissingPath(
            f"{root} holds no images to {PURPOSE[part]}: there is no images/{part}/, "
            "nor this under another usual name; name the folders of images and of label maps"
        )
    labels = next((root / folder / name for folder in LABEL_FOLDERS if (root / folder / name).is_dir()), None)
    if labels is None:
        looked = ", ".join(f"{folder}/{name}/" for folder in LABEL_FOLDERS)
        raise MissingPath(f"{root} has no label maps for images/{name}/: none of {looked} exists")
    return SegmentationFiles(root / "images" / name, labels)


def read_class_names(file: str | Path) -> list[str]:
    """Names of classes, one a line, from class 0 on; empty lines at the end do not count.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is empty, or a name there twice.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise MissingPath(f"there is no file of class names {file}")
    names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    if not all(names):
        raise UserError(f"{file} should name a class a line, but line {names.index('') + 1} is empty")
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise UserError(f"{file} names a class twice: {few(twice)}")
    return names


# How they are read


class SegmentationImages(Dataset[Any]):
    """Images with their label maps, which have the same path and name, but for the ending. Made by `open_segmentation`.

    An item is an image, `tv_tensors.Image [C, H, W]`, and its classes, int32 `tv_tensors.Mask [H, W]`, `IGNORED` where
    a pixel counts for nothing. Images are uint8, upright by their EXIF orientation unless the label map is not; arrays
    are float32, in their own units.

    Attributes:
        files: the two folders.
        channels: of an image.
        arrays: whether images come from array files.
        ignore: the value in label maps of pixels that count for nothing.
        reduce: whether 0 stands for such pixels too, and other values for the class before them.
    """

    def __init__(self, files: SegmentationFiles, channels: int, ignore: int, reduce: bool) -> None:
        self.files, self.channels, self.ignore, self.reduce = files, channels, ignore, reduce
        self.findings = Findings()
        nothing: list[str] = []
        paths, self.arrays = self._tried(lambda: find_items(files.images, channels, 2), (nothing, False))
        images = _by_stem(paths, files.images)
        labels = _by_stem(self._tried(lambda: find_images(files.labels, suffixes=(".png",)), nothing), files.labels)
        both = sorted(images.keys() & labels.keys())
        for what, stems in (("image", images), ("label map", labels)):
            twice = [few(paths) for stem in both if len(paths := stems[stem]) > 1]
            if twice:
                self.findings.fatal.append(f"{counted(len(twice), what)} with another of the same name: {twice[0]}")
        if images and labels:
            for what, these, others in (("image", images, labels), ("label map", labels, images)):
                alone = [these[stem][0] for stem in sorted(these.keys() - others.keys())]
                if alone:
                    other = "label map" if what == "image" else "image"
                    self.findings.fatal.append(f"{counted(len(alone), what)} without {other}: {few(alone)}")
        # One block of memory each, which worker processes share. Strings would be copied by counting references.
        self._images = np.array([os.fsencode(images[stem][0]) for stem in both])
        self._labels = np.array([os.fsencode(labels[stem][0]) for stem in both])

    def _tried(self, find: Callable[[], T], otherwise: T) -> T:
        """What is found; if there is nothing, that is a finding as well."""
        try:
            return find()
        except UserError as error:
            self.findings.fatal.append(str(error))
            return otherwise

    def __len__(self) -> int:
        return len(self._images)

    def name(self, place: int) -> str:
        """An image's path, relative to the folder."""
        return os.fsdecode(self._images[place])

    def label_path(self, place: int) -> Path:
        """The file of a label map."""
        return self.files.labels / os.fsdecode(self._labels[place])

    def __getitem__(self, place: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        path = self.files.images / self.name(place)
        with strict_pillow():
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
        """Values of label maps as classes, in any shape."""
        ignored = values == self.ignore
        classes = values.astype(np.int32) - self.reduce
        classes[ignored] = IGNORED  # and where 0 was reduced
        return classes

    def look(self, place: int) -> _Look:
        """What is in a label map, and whether it fits the image; of the image, the header alone is read.

        To be called within `strict_pillow`, which concerns all threads.
        """
        label, name = os.fsdecode(self._labels[place]), self.name(place)
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
        size: tuple[int, ...] = values.shape
        try:
            if self.arrays:
                sizes = [to_array(self.files.images / name, self.channels, 2).shape[1:]]
            else:
                stored, turned = stored_size(self.files.images / name)
                sizes = [stored, stored[::-1]] if turned else [stored]
        except UnreadableImage as error:
            return _Look("image", f"{name} ({error.reason})", classes)
        if size not in sizes:
            return _Look("size", f"{name} is {size_text(sizes[0])}, {label} {size_text(size)}", classes)
        return _Look("", label, classes)


def _by_stem(paths: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Names relative to a folder, by what they are without their ending."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        name = os.path.relpath(path, folder)
        ending = next(end for end in (*SUFFIXES, *ARRAY_SUFFIXES) if name.lower().endswith(end))
        found[name[: -len(ending)]].append(name)
    return found


class NotIndices(UserError):
    """An image whose pixels are colours."""


def read_values(path: Path) -> npt.NDArray[Any]:
    """The integers `[h, w]` in a label map: grey values, or numbers of a palette's colours.

    To be called within `strict_pillow`, which concerns all threads.

    Raises:
        NotIndices: if it holds colours instead.
        UnreadableImage: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in _GREY:
                raise NotIndices(image.mode)
            spread = next((_SPREAD[tile[3]] for tile in image.tile if tile[3] in _SPREAD), 1)
            values = np.array(image).astype(np.uint8 if image.mode in ("L", "P", "1") else np.int32)
            return values // spread if spread > 1 else values
    except NotIndices:
        raise
    except Exception as error:  # decoders raise anything
        raise UnreadableImage(path, reason_of(error)) from error


def open_segmentation(
    images: str | Path, labels: str | Path, channels: int = 3, ignore: int = 255, reduce: bool = False
) -> SegmentationImages:
    """Opens a folder of images and one of label maps. What is wrong with them, `check_segmentation` tells.

    Args:
        images: of images, at any depth; or, for channels other than 1 or 3, of arrays.
        labels: of PNG files whose values are classes: grey of up to 16 bits, or with a palette. Each has the path and
            name of its image, but for the ending.
        channels: of an image.
        ignore: the value of pixels that count for nothing.
        reduce: whether 0 stands for such pixels too, and other values for the class before them, as in ADE20K.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    files = SegmentationFiles(*(Path(folder).expanduser().absolute() for folder in (images, labels)))
    for folder, what in zip(files, ("images", "label maps"), strict=True):
        if not folder.is_dir():
            raise MissingPath(f"there is no folder of {what} {folder}")
    return SegmentationImages(files, channels, ignore, reduce)


# What is wrong with them


class _Look(NamedTuple):
    """What one label map holds.

    Attributes:
        wrong: "" if nothing is; else a key of `_WRONG`, or `image` for an image that cannot be read.
        what: its name, and the details.
        classes: pixels of each class.
    """

    wrong: str
    what: str
    classes: dict[int, int]


_WRONG = {
    "unreadable": ("label map that cannot be read", "label maps that cannot be read"),
    "colours": ("label map of colours, not of class numbers", "label maps of colours, not of class numbers"),
    "size": ("label map of another size than its image", "label maps of another size than their images"),
}


def check_segmentation(
    parts: Sequence[SegmentationImages], names: Sequence[str] | None = None
) -> tuple[list[str], list[str]]:
    """Looks for everything that can be wrong with data, in every label map and the header of every image.

    Fatal are images without label map, label maps without image, of another size, of colours instead of class numbers,
    or unreadable; values that are no class; no images, or none with a class; a single class. Progress is shown on
    stderr if that is a terminal.

    Args:
        parts: to train and to validate on, or one of them.
        names: of the classes; None to count them.

    Returns:
        The names of the classes, which are "0", "1", … unless they are given; and notes, a line each.

    Raises:
        ValueError: if something is fatal, with all of it and the notes.
    """
    every = Findings()
    seen: list[dict[int, int]] = []
    for part in parts:
        found, classes = _look_through(part, names)
        seen.append(classes)
        for lines, of_part in ((every.fatal, found.fatal), (every.notes, found.notes)):
            lines += [f"{part.files.labels}: {line}" for line in of_part]
    count = len(names) if names is not None else max((number for classes in seen for number in classes), default=-1) + 1
    listed = list(names) if names is not None else [str(number) for number in range(count)]
    if count < 2 and not every.fatal:
        only = f"class {listed[0]}" if listed else "no class"
        every.fatal.append(
            f"there is {only} alone, but segmentation needs 2 or more classes, the background being one; pixels of "
            f"{parts[0].ignore} count for nothing unless ignore is another value"
        )
    for part, classes in zip(parts, seen, strict=True):
        if not classes and not every.fatal:
            every.fatal.append(f"{part.files.labels}: every pixel of every label map counts for nothing")
    without = [name for number, name in enumerate(listed) if number not in seen[0]]
    if without:
        every.notes.append(f"{counted(len(without), 'class', 'classes')} without a pixel in {parts[0].files.labels}: "
                           f"{few(without)}")  # fmt: skip
    return listed, every.check(" and ".join(dict.fromkeys(str(part.files.images) for part in parts)))


def _look_through(part: SegmentationImages, names: Sequence[str] | None) -> tuple[Findings, dict[int, int]]:
    """What is wrong with a part, and how many pixels each class has."""
    found = Findings(list(part.findings.fatal), list(part.findings.notes))
    wrong: dict[str, list[str]] = defaultdict(list)
    totals: dict[int, int] = defaultdict(int)
    console = Console(stderr=True)
    with strict_pillow(), ThreadPoolExecutor(_THREADS) as pool:
        looks = pool.map(part.look, range(len(part)))
        for look in track(looks, f"checking {part.files.labels.name}", len(part), console=console, transient=True,
                          disable=not console.is_terminal):  # fmt: skip
            if look.wrong:
                wrong[look.wrong].append(look.what)
            if names is not None and (outside := [number for number in look.classes if number >= len(names)]):
                values = few([number + part.reduce for number in outside])
                wrong["outside"].append(f"{look.what} has {values}")
            for number, pixels in look.classes.items():
                totals[number] += pixels
    for kind, (word, words) in _WRONG.items():
        if wrong[kind]:
            found.fatal.append(f"{counted(len(wrong[kind]), word, words)}: {few(wrong[kind])}")
    if wrong["outside"] and names is not None:
        found.fatal.append(
            f"{counted(len(wrong['outside']), 'label map')} with values that are none of the {len(names)} classes: "
            f"{few(wrong['outside'])}"
        )
    if wrong["image"]:
        found.notes.append(f"{counted(len(wrong['image']), 'image')} that cannot be read: {few(wrong['image'])}")
    return found, totals
