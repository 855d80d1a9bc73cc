"""What loader workers are sent pickles, and is small."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import annotation, write_coco
from label_map_files import write_shapes
from PIL import Image
from torch.utils.data import DataLoader

from sparkmim.data.arrays import array_transform
from sparkmim.data.augmentation import classify_transform, pretrain_transform
from sparkmim.data.coco import open_coco
from sparkmim.data.dataset import LabelledDataset, PretrainDataset, TargetDataset, collate
from sparkmim.data.decoding import strict_pillow
from sparkmim.data.detection_transforms import detection_transform
from sparkmim.data.inference import Preparation, _Stills
from sparkmim.data.label_maps import open_segmentation
from sparkmim.data.labelled import open_labelled
from sparkmim.data.loading import live_with_the_parent
from sparkmim.data.segmentation_transforms import segmentation_transform
from sparkmim.data.source import Source, images_source, open_source
from sparkmim.errors import UnusableData

HALF = [0.5] * 3


def images(folder: Path, photos: list[str]) -> Any:
    source = open_source(photos, 3, 2)
    return PretrainDataset(source.items, pretrain_transform((32, 32)), (2, 2), 0.5, read=source.read)


def arrays(folder: Path, photos: list[str]) -> Any:
    np.save(folder / "a.npy", np.random.default_rng(0).normal(size=(2, 8, 8)))
    source = images_source(folder / "a.npy", 2, 2)
    transform = array_transform((8, 8), *source.normalisation(), flip=0.5)
    return PretrainDataset(source.items, transform, (2, 2), 0.5, channels=2, read=source.read)


def labelled(folder: Path, photos: list[str]) -> Any:
    for name in ("a", "b"):
        (folder / "classes" / name).mkdir(parents=True)
        Image.open(photos[0]).save(folder / "classes" / name / "0.jpg")
    train, _ = open_labelled(folder / "classes")
    source = Source.of(train.items, 3, 2)
    return LabelledDataset(train, classify_transform((32, 32), augment="auto"), read=source.read)


def boxes(folder: Path, photos: list[str]) -> Any:
    data = open_coco(*write_coco(folder / "coco", [annotation(10, 3, (4, 6, 20, 10))]))
    return TargetDataset(data, detection_transform([48], crop="detr"))


def label_maps(folder: Path, photos: list[str]) -> Any:
    root = write_shapes(folder / "shapes")
    data = open_segmentation(root / "images" / "train", root / "labels" / "train")
    return TargetDataset(data, segmentation_transform(32, 32, HALF, HALF, jitter=0.5))


@pytest.mark.parametrize("make", [images, arrays, labelled, boxes, label_maps])
def test_datasets_pickle(tmp_path: Path, photos: list[str], make: Callable[[Path, list[str]], Any]) -> None:
    dataset = make(tmp_path, photos)
    expected, found = dataset[1, 0], pickle.loads(pickle.dumps(dataset))[1, 0]
    assert torch.equal(expected["image"], found["image"])
    assert expected["index"] == found["index"]


@pytest.mark.parametrize("arrays", [False, True])
def test_stills_pickle(arrays: bool) -> None:
    item = np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    source = Source([item], arrays, 3, 2)
    stills = _Stills(source.items, source.read, Preparation((8, 8), 3, None, None, 0.9).transform(source))
    assert torch.equal(stills[0][2], pickle.loads(pickle.dumps(stills))[0][2])


def test_spawned_workers(tmp_path: Path, photos: list[str]) -> None:
    dataset = images(tmp_path, photos)
    keys = [[(0, 3), (0, 1)]]
    (found,) = DataLoader(
        dataset, batch_sampler=keys, num_workers=1, collate_fn=collate, multiprocessing_context="spawn",
        worker_init_fn=live_with_the_parent,
    )  # fmt: skip
    expected = collate([dataset[key] for key in keys[0]])
    assert torch.equal(found["image"], expected["image"])
    assert torch.equal(found["visible"], expected["visible"])


def test_threads_share_pillows_limit() -> None:
    """The last to leave restores it, whoever entered first."""
    limit = Image.MAX_IMAGE_PIXELS
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with strict_pillow():
            entered.set()
            leave.wait(10)

    with strict_pillow():
        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait(10)
    strict = int(Image.MAX_IMAGE_PIXELS or 0)
    leave.set()
    thread.join()
    assert strict == 50_000_000
    assert limit == Image.MAX_IMAGE_PIXELS


class Busy:
    """Reading it takes a minute, in a library that hears no signal; says when it begins."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> Any:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(self.place, b"begun")
        time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends children with their parent")
def test_workers_die_with_their_parent() -> None:
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        list(DataLoader(Busy(writer), num_workers=1, worker_init_fn=live_with_the_parent))  # type: ignore[arg-type]
        os._exit(1)
    assert os.read(reader, 20)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    os.close(writer)
    assert select.select([reader], [], [], 20)[0]
    assert os.read(reader, 20) == b""  # the end of the pipe: nobody is left who holds it
    os.close(reader)


class Broken:
    """Reading it fails as a data set of 50 broken images does."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, place: int) -> Any:
        raise UnusableData("50 images in a row are unreadable: the first is a.jpg")


def test_errors_of_workers_arrive_without_their_traceback() -> None:
    with pytest.raises(UnusableData) as arrived:
        list(DataLoader(Broken(), num_workers=1))  # type: ignore[arg-type]
    assert str(arrived.value) == "50 images in a row are unreadable: the first is a.jpg"
