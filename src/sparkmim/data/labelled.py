"""Labelled images: class folders, a table of paths and labels, or a dataset."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Subset

from sparkmim.data.arrays import ARRAY_SUFFIXES
from sparkmim.data.discovery import SUFFIXES, check_files, find_images
from sparkmim.data.problems import counted, few
from sparkmim.data.source import is_array
from sparkmim.errors import MissingPath, UserError

Part = Literal["train", "val"]
"""Part of a data set: images to train on, or to validate on."""

PART_NAMES: dict[Part, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test", "testing"),
}
"""Folder names of each part; the first that exists is used."""

PURPOSE: dict[Part, str] = {"train": "train on", "val": "validate on"}
"""Purpose of each part, in sentences."""

_PATH_COLUMNS = ("path", "file", "filename", "image")
_LABEL_COLUMNS = ("label", "class", "category", "target")


@dataclass(frozen=True)
class Labelled:
    """Images with their classes."""

    items: Any  # list of paths, or a dataset whose items hold an image first
    labels: Tensor  # long [n], indices into `classes`
    classes: list[str]

    def __len__(self) -> int:
        return len(self.items)

    def take(self, chosen: Sequence[int]) -> Labelled:
        """Returns the chosen images."""
        paths = isinstance(self.items, list)
        items = [self.items[i] for i in chosen] if paths else Subset(self.items, list(chosen))
        return Labelled(items, self.labels[list(chosen)], self.classes)

    def draw(self, per_class: int, generator: torch.Generator) -> Labelled:
        """Draws `per_class` images of each class, or all of a class that has fewer."""
        chosen: list[int] = []
        for label in range(len(self.classes)):
            of_class = (self.labels == label).nonzero().flatten()
            order = torch.randperm(len(of_class), generator=generator)
            chosen += sorted(of_class[order[:per_class]].tolist())
        return self.take(chosen)

    def split(self, share: float, seed: int) -> tuple[Labelled, Labelled]:
        """Sets apart a share of every class, at least one image; returns the remaining images, and those set apart."""
        if not 0 < share < 1:
            raise UserError(f"val_split is {share}; it is a share of the images, between 0 and 1")
        counts = torch.bincount(self.labels, minlength=len(self.classes))
        if (counts < 2).any():
            name = self.classes[int((counts < 2).nonzero()[0])]
            raise UserError(f"class {name!r} has fewer than 2 images, so none can be set apart for validation")
        generator = torch.Generator().manual_seed(seed)
        apart: set[int] = set()
        for label, count in enumerate(counts.tolist()):
            of_class = (self.labels == label).nonzero().flatten()
            chosen = torch.randperm(count, generator=generator)[: min(count - 1, max(1, round(share * count)))]
            apart.update(of_class[chosen].tolist())
        every = range(len(self))
        return self.take([i for i in every if i not in apart]), self.take([i for i in every if i in apart])


def open_labelled(
    data: Any, val_data: Any | None = None, val_split: float | None = None, seed: int = 0
) -> tuple[Labelled, Labelled | None]:
    """Finds labelled images for training and validation.

    `data` is one of

    - a folder with `train/` and `val/` (or `valid`, `validation`, `test`), each with a folder per class;
    - a folder with a folder per class: of images or, where there are none, of arrays;
    - a CSV file with a header, columns `path` and `label`, and optionally `split`; paths are relative to the file;
    - a map-style dataset of (image, label), with names in `classes` if it has them.

    Validation images may also be given as `val_data`, of no other classes, or be a share `val_split` of every class,
    drawn by `seed`. The second result is None if there are none.
    """
    if data is None:
        raise UserError("no data given; --data names a folder with a folder per class, or a CSV file")
    train, val = _open(data)
    if val_data is not None:
        given, other = _open(val_data)
        val = given if other is None else other
    if val is None and val_split is not None:
        train, val = train.split(val_split, seed)
    elif val is not None and val_split is not None:
        raise UserError("val_split was given, but there are validation images already; leave it out")
    if val is not None and val.classes != train.classes:
        val = _with_classes(val, train.classes)
    return train, val


def _with_classes(images: Labelled, classes: list[str]) -> Labelled:
    """Numbers the classes of validation images as in training."""
    unknown = sorted(set(images.classes) - set(classes))
    if unknown:
        number = counted(len(unknown), "class", "classes")
        raise UserError(f"no images to train on for {number} of the validation images: {few(unknown, 5)}")
    place = torch.tensor([classes.index(name) for name in images.classes])
    return Labelled(images.items, place[images.labels], classes)


def _open(data: Any) -> tuple[Labelled, Labelled | None]:
    if not isinstance(data, (str, Path)):
        return _of_dataset(data), None
    root = Path(data).expanduser().absolute()
    if not root.exists():
        raise MissingPath(f"there is no folder or CSV file {root}")
    if root.is_file():
        return _of_table(root)
    if not root.is_dir():
        raise UserError(f"{root} is neither a folder with a folder per class nor a CSV file")
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    train, val = (next((folders[name] for name in names if name in folders), None) for names in PART_NAMES.values())
    if train is not None:
        return _of_folder(train), None if val is None else _of_folder(val, fewest=1)
    return _of_folder(root), None


def _of_folder(root: Path, fewest: int = 2) -> Labelled:
    every = find_images(root, suffixes=(*SUFFIXES, *ARRAY_SUFFIXES))
    paths = [path for path in every if not is_array(path)] or every
    names = [Path(os.path.relpath(path, root)).parts[0] for path in paths]
    loose = [name for path, name in zip(paths, names, strict=True) if Path(path).parent == root]
    classes = sorted(set(names) - set(loose))
    if loose or len(classes) < fewest:
        found = f"{counted(len(loose), 'image')} outside of them" if loose else f"only one class folder, {classes[0]}"
        raise UserError(f"{root} must hold a folder per class, but has {found}; or give a CSV file of path and label")
    number = {name: place for place, name in enumerate(classes)}
    return Labelled(paths, torch.tensor([number[name] for name in names]), classes)


def _of_table(file: Path) -> tuple[Labelled, Labelled | None]:
    if file.suffix.lower() in SUFFIXES:
        raise UserError(f"{file} is a single image; give a folder with a folder per class, or a CSV file")
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a CSV file: {error}") from error
    columns = {name.strip().lower(): name for name in (rows[0] if rows else {}) if name}
    path_column = next((columns[name] for name in _PATH_COLUMNS if name in columns), None)
    label_column = next((columns[name] for name in _LABEL_COLUMNS if name in columns), None)
    if path_column is None or label_column is None:
        shown = ", ".join(columns) or "no rows"
        raise UserError(f"{file} needs columns `path` and `label` in its first line; it has {shown}")
    for number, row in enumerate(rows, 2):
        if not (row[path_column] or "").strip() or not (row[label_column] or "").strip():
            raise UserError(f"line {number} of {file} lacks a path or a label")
    paths = [os.path.join(file.parent, row[path_column].strip()) for row in rows]  # noqa: PTH118
    check_files(paths, file)
    names = [row[label_column].strip() for row in rows]
    classes = sorted(set(names), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    if len(classes) < 2:
        raise UserError(f"{file} has a single class, {classes[0]}; a classifier needs 2 or more")
    every = Labelled(paths, torch.tensor([classes.index(name) for name in names]), classes)
    if "split" not in columns:
        return every, None
    splits = [(row[columns["split"]] or "").strip().lower() for row in rows]
    parts = []
    for wanted in PART_NAMES.values():
        name = next((name for name in wanted if name in splits), None)
        parts.append(None if name is None else every.take([i for i, split in enumerate(splits) if split == name]))
    train, val = parts
    if train is None:
        raise UserError(f"column split of {file} has no row `train`; it has {few(sorted(set(splits)), 5)}")
    return train, val


def _of_dataset(data: Any) -> Labelled:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise UserError(f"data is of type {type(data).__name__}; pass a path, or a dataset with a length and items")
    if len(data) == 0:
        raise UserError("data is a dataset without items")
    labels = getattr(data, "targets", None)
    if labels is None:
        labels = [_label_of(data[i], i) for i in range(len(data))]
    found = torch.as_tensor(labels)
    if found.ndim != 1 or found.is_floating_point() or len(found) != len(data):
        raise UserError(f"labels of the dataset are {found.dtype} {list(found.shape)}; they must be integers [n]")
    count = int(found.max()) + 1
    if found.min() < 0:
        raise UserError("labels of the dataset must count from 0")
    classes = [str(name) for name in getattr(data, "classes", range(count))]
    if len(classes) < count:
        raise UserError(f"the dataset has {len(classes)} names in `classes`, but labels up to {count - 1}")
    return Labelled(data, found.long(), classes)


def _label_of(item: Any, place: int) -> int:
    if isinstance(item, dict) and "label" in item:
        return int(item["label"])
    if isinstance(item, (tuple, list)) and len(item) > 1:
        return int(item[1])
    raise UserError(f"item {place} of the dataset has no label; items are (image, label)")


def few_of(labels: Tensor, classes: Sequence[str]) -> str | None:
    """Returns a warning about classes with fewer than 5 images, or None."""
    counts = Counter(labels.tolist())
    small = [name for place, name in enumerate(classes) if counts[place] < 5]
    number = counted(len(small), "class", "classes")
    return f"{number} with fewer than 5 images to train on: {few(small, 5)}" if small else None
