"""Labelled images in all the forms they are given in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparkmim.data.dataset import LabelledDataset
from sparkmim.data.labelled import open_labelled


def make(folder: Path, names: dict[str, int]) -> Path:
    for name, count in names.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(folder / name / f"{index}.png")
    return folder


def test_folders_of_train_and_val(tmp_path: Path) -> None:
    make(tmp_path / "train", {"b": 3, "a": 2, "c": 1})
    make(tmp_path / "val", {"c": 2})
    train, val = open_labelled(tmp_path)
    assert train.classes == ["a", "b", "c"]
    assert train.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert val.classes == train.classes
    assert val.labels.tolist() == [2, 2]  # numbered as for training, though it is the only class here


def test_one_folder_and_a_split(tmp_path: Path) -> None:
    make(tmp_path, {"a": 10, "b": 5})
    assert open_labelled(tmp_path)[1] is None
    train, val = open_labelled(tmp_path, val_split=0.2)
    assert torch.bincount(train.labels).tolist() == [8, 4]
    assert torch.bincount(val.labels).tolist() == [2, 1]
    assert not set(train.items) & set(val.items)
    assert open_labelled(tmp_path, val_split=0.2)[1].items == val.items
    assert open_labelled(tmp_path, val_split=0.2, seed=1)[1].items != val.items


def test_table(tmp_path: Path) -> None:
    make(tmp_path / "images", {"x": 4})
    lines = ["path,label,split"] + [f"images/x/{i}.png,{label},{part}" for i, label, part in
                                    ((0, 10, "train"), (1, 9, "train"), (2, 10, "val"), (3, 9, "val"))]  # fmt: skip
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    train, val = open_labelled(tmp_path / "labels.csv")
    assert train.classes == ["9", "10"]  # numbers in their order
    assert train.labels.tolist() == [1, 0]
    assert val.labels.tolist() == [1, 0]


def test_dataset() -> None:
    images = [(torch.zeros(3, 8, 8, dtype=torch.uint8), label) for label in (0, 2, 2)]
    train, _ = open_labelled(images)
    assert train.labels.tolist() == [0, 2, 2]
    assert train.classes == ["0", "1", "2"]
    assert len(train.take([1, 2])) == 2


def test_a_stand_in_has_its_own_label(tmp_path: Path) -> None:
    make(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "0.png").write_bytes(b"broken")
    train, _ = open_labelled(tmp_path)
    sample = LabelledDataset(train, lambda image: image.float())[0, 0]
    assert (sample["skipped"], sample["label"]) == (1, 1)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda f: shutil.rmtree(f / "b"), {}, "must hold a folder per class, but has only one class folder, a"),
        (lambda f: shutil.copy(f / "a" / "0.png", f / "0.png"), {}, "but has 1 image outside of them"),
        (lambda f: None, {"val_split": 1.5}, "val_split is 1.5; it is a share"),
        (lambda f: make(f / "c", {"": 1}), {"val_split": 0.5}, "class 'c' has fewer than 2 images"),
        (
            lambda f: make(f, {"train/a": 2, "train/b": 2, "val/d": 1}),
            {},
            "no images to train on for 1 class of the validation images: d",
        ),
        (lambda f: make(f, {"train/a": 2, "train/b": 2, "val/a": 1}), {"val_split": 0.2}, "val_split was given, but"),
    ],
)
def test_mistakes(tmp_path: Path, change: Any, arguments: dict[str, Any], message: str) -> None:
    make(tmp_path, {"a": 3, "b": 3})
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_labelled(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,kind\na/0.png,x\n", "needs columns `path` and `label` in its first line; it has image, kind"),
        ("path,label\na/0.png,\n", "line 2 of .* lacks a path or a label"),
        ("path,label\na/0.png,x\n", "has a single class, x"),
        ("path,label\nnone.png,x\n", r"1 of the 1 files .* do not exist"),
        ("path,label,split\na/0.png,x,dev\na/1.png,y,dev\n", "has no row `train`; it has dev"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, text: str, message: str) -> None:
    make(tmp_path, {"a": 3})
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_labelled(tmp_path / "t.csv")


def test_folders_of_arrays(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", np.zeros((1, 4, 4)))
    train, _ = open_labelled(tmp_path)
    assert [Path(path).name for path in train.items] == ["0.npy", "0.npy"]
    make(tmp_path, {"a": 1, "b": 2})  # images are read where there are some
    assert [Path(path).suffix for path in open_labelled(tmp_path)[0].items] == [".png"] * 3
