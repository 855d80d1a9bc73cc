"""Samples depend on (seed, epoch, index) alone, nothing unreadable stops a run, and batches split evenly."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import checker
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

from sparkmim.data.augmentation import pretrain_transform
from sparkmim.data.dataset import PretrainDataset, collate
from sparkmim.data.decoding import UnreadableImage, decode, to_image
from sparkmim.data.samplers import EpochBatchSampler, counted_seed
from sparkmim.data.skip_log import SkipLog

GRID = (4, 4)


def dataset(source: Any, seed: int = 0, transform: Any = None, **options: Any) -> PretrainDataset:
    transform = transform or pretrain_transform((32, 32))
    return PretrainDataset(source, transform, GRID, mask_ratio=0.6, seed=seed, **options)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key] for key in a)


def whole(image: torch.Tensor) -> torch.Tensor:
    """A transform that changes nothing."""
    return image.float()


class Items(Dataset[Any]):
    """A map-style dataset; exceptions among its items are raised."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


# --- samples


def test_sample(photos: list[str]) -> None:
    sample = dataset(photos)[0, 5]
    assert sample["image"].shape == (3, 32, 32)
    assert sample["image"].dtype == torch.float32
    assert sample["visible"].shape == GRID
    assert sample["visible"].dtype == torch.bool
    assert sample["visible"].sum() == 6  # round(16 · 0.4)
    assert (sample["index"], sample["skipped"], sample["unreadable"]) == (5, 0, [])


def test_paths_of_any_kind(photos: list[str]) -> None:
    expected = dataset(photos)[0, 3]
    assert same(dataset([Path(path) for path in photos])[0, 3], expected)
    assert same(dataset(tuple(photos))[0, 3], expected)
    assert same(dataset(Items(*photos))[0, 3], expected)
    assert same(dataset([(path, 7) for path in photos])[0, 3], expected)


def test_depends_on_seed_epoch_and_index(photos: list[str]) -> None:
    one = [photos[0]] * 12  # the same picture everywhere: only what is random differs
    base = dataset(one)[2, 5]
    torch.rand(3), random.random(), np.random.random(3)  # noqa: NPY002
    assert same(dataset(one)[2, 5], base)
    for other in (dataset(one)[3, 5], dataset(one)[2, 6], dataset(one, seed=1)[2, 5]):
        assert not torch.equal(other["image"], base["image"])
        assert not torch.equal(other["visible"], base["visible"])


def test_mask_does_not_depend_on_the_transform(photos: list[str]) -> None:
    def other(image: torch.Tensor) -> torch.Tensor:
        return image.float() + torch.rand(())

    for index in range(4):
        assert torch.equal(dataset(photos)[0, index]["visible"], dataset(photos, transform=other)[0, index]["visible"])


def test_masks_are_uniform(photos: list[str]) -> None:
    data = dataset(photos[:1], transform=whole)
    shown = torch.stack([data[epoch, 0]["visible"] for epoch in range(400)]).float().mean(0)
    assert (shown - 6 / 16).abs().max() < 0.12  # five standard deviations


def test_all_generators_are_seeded_and_put_back(photos: list[str]) -> None:
    def draws(image: torch.Tensor) -> torch.Tensor:
        return torch.tensor([torch.rand(()).item(), random.random(), np.random.random()])  # noqa: NPY002

    data = dataset(photos, transform=draws)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    expected = draws(torch.empty(0))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
    first = data[0, 0]["image"]
    assert torch.equal(draws(torch.empty(0)), expected)
    assert torch.equal(data[0, 0]["image"], first)
    assert (data[0, 1]["image"] != first).all()


def test_generators_are_put_back_after_an_error(photos: list[str]) -> None:
    def fails(image: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    with pytest.raises(ZeroDivisionError):
        dataset(photos, transform=fails)[0, 0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def test_counted_seed() -> None:
    seeds = {counted_seed(a, b, c) for a in range(6) for b in range(6) for c in ("x", "y")}
    assert len(seeds) == 72
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert counted_seed(1, 23) != counted_seed(12, 3)


@pytest.mark.parametrize("bad", [False, True])
def test_workers_change_nothing(photos: list[str], bad: bool) -> None:
    if bad:
        Path(photos[4]).write_bytes(b"")
    batches = []
    for workers in (0, 2):
        sampler = EpochBatchSampler(len(photos), batch_size=4, seed=3, epoch=1)
        loader = DataLoader(
            dataset(photos, seed=3), batch_sampler=sampler, num_workers=workers, collate_fn=collate,
            multiprocessing_context="fork" if workers else None,
        )  # fmt: skip
        batches.append(list(loader))
    assert len(batches[0]) == 3
    assert all(same(a, b) for a, b in zip(*batches, strict=True))
    assert sum(len(batch["unreadable"]) for batch in batches[0]) == bad


# --- what items may be

PIXELS = checker(8, 8)
TENSOR = torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)


@pytest.mark.parametrize(
    "item",
    [
        TENSOR,
        PIXELS,
        PIXELS[::-1][::-1],
        TENSOR / 255,
        TENSOR.double() / 255,
        (PIXELS / 255).astype(np.float32),
        Image.fromarray(PIXELS),
        tv_tensors.Image(TENSOR),
        (TENSOR, 3),
        [PIXELS, "label", None],
        {"label": 3, "image": Image.fromarray(PIXELS)},
    ],
    ids=lambda item: type(item).__name__,
)
def test_items(item: Any) -> None:
    found = to_image(item, 3)
    assert type(found) is torch.Tensor
    assert found.dtype == torch.uint8
    assert torch.equal(found, TENSOR)
    assert torch.equal(dataset(Items(item), transform=whole)[0, 0]["image"], TENSOR.float())


def test_items_of_other_channels() -> None:
    grey = PIXELS[..., 0]
    assert to_image(grey, 1).shape == (1, 8, 8)
    assert to_image(np.zeros((8, 6, 5), dtype=np.uint8), 5).shape == (5, 8, 6)
    assert to_image(Image.fromarray(grey), 3).shape == (3, 8, 8)
    assert to_image(Image.fromarray(PIXELS), 1).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (7, TypeError, "item is of type int; accepted is a path, a PIL image"),
        (b"bytes", TypeError, "item is of type bytes"),
        (None, TypeError, "NoneType"),
        ((), TypeError, "empty tuple"),
        ({"pixels": PIXELS}, TypeError, "a dict of 'pixels', without 'image'"),
        (TENSOR.long(), TypeError, "torch.int64; images are uint8, or float"),
        (PIXELS.astype(np.uint16), TypeError, "torch.uint16"),
        (TENSOR[:1], ValueError, "has 1 channels, but channels is 3"),
        (PIXELS[..., 0], ValueError, "has 1 channels, but channels is 3"),
        (TENSOR.permute(1, 2, 0), ValueError, r"8 channels, but channels is 3; arrays are \[H, W, C\]"),
        (TENSOR[0], ValueError, r"shape \[8, 8\]; images are \[C, H, W\]"),
        (PIXELS[None], ValueError, r"shape \[1, 8, 8, 3\]"),
        (np.zeros((0, 4, 3), dtype=np.uint8), ValueError, r"shape \[3, 0, 4\]"),
        (TENSOR.float(), ValueError, r"floats from .* must lie in \[0, 1\]"),
        (TENSOR / 255 - 1, ValueError, "floats from -"),
        (torch.full((3, 2, 2), torch.nan), ValueError, "floats from nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_items_that_are_no_images(item: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_image(item, 3)


def test_sources_that_are_none(photos: list[str]) -> None:
    with pytest.raises(TypeError, match="source is of type str; it takes a list of paths"):
        dataset("a/folder")
    with pytest.raises(TypeError, match="source is of type generator"):
        dataset(path for path in photos)
    with pytest.raises(ValueError, match="no images"):
        dataset([])
    with pytest.raises(ValueError, match="channels is 2"):
        dataset(photos, channels=2)
    with pytest.raises(ValueError, match="mask_ratio is 1.5"):
        PretrainDataset(photos, whole, GRID, mask_ratio=1.5)


# --- unreadable images


def test_stand_in(photos: list[str]) -> None:
    for bad in (4, 5, 11):
        Path(photos[bad]).write_bytes(b"no image")
    data = dataset(photos, transform=whole)
    for index, shown in ((3, 3), (4, 6), (5, 6), (11, 0)):
        sample = data[0, index]
        assert torch.equal(sample["image"], decode(photos[shown]).float())
        assert sample["index"] == index
        assert sample["skipped"] == (shown - index) % 12
        assert sample["unreadable"] == [
            f"{photos[place % 12]}: not an image of a known format" for place in range(index, index + sample["skipped"])
        ]


def test_stand_in_is_no_copy(photos: list[str]) -> None:
    mask_before = dataset(photos)[0, 4]["visible"]
    Path(photos[4]).unlink()
    data = dataset(photos)
    assert not torch.equal(data[0, 4]["image"], data[0, 5]["image"])
    assert torch.equal(data[0, 4]["visible"], mask_before)
    assert same(data[0, 4], dataset(photos)[0, 4])


def test_items_may_be_unreadable_too() -> None:
    stored = io.BytesIO()
    Image.fromarray(checker(64, 64)).save(stored, "JPEG")
    lazy = Image.open(io.BytesIO(stored.getvalue()[:-20]))  # breaks when its pixels are asked for
    source = Items(OSError("disk on fire"), UnreadableImage("shard 7", "cut off"), lazy, TENSOR)
    sample = dataset(source, transform=whole)[0, 0]
    assert torch.equal(sample["image"], TENSOR.float())
    assert sample["unreadable"][:2] == ["item 0: disk on fire", "shard 7: cut off"]
    assert sample["unreadable"][2].startswith("item 2: ")
    with pytest.raises(KeyError):
        dataset(Items(KeyError("a mistake of the dataset")))[0, 0]


def test_many_unreadable_in_a_row(tmp_path: Path, photos: list[str]) -> None:
    missing = [str(tmp_path / f"missing{number}.jpg") for number in range(50)]
    assert dataset([*missing[1:], photos[0]])[0, 0]["skipped"] == 49
    with pytest.raises(
        RuntimeError, match=r"50 images in a row are unreadable, from number 0 of 51 on.*missing0.jpg: No"
    ):
        dataset([*missing, photos[0]])[0, 0]
    with pytest.raises(RuntimeError, match="3 images in a row"):
        dataset(missing[:3])[0, 0]


def test_collate(photos: list[str]) -> None:
    for bad in (1, 2):
        Path(photos[bad]).write_bytes(b"")
    data = dataset(photos)
    batch = collate([data[0, index] for index in range(4)])
    assert batch["image"].shape == (4, 3, 32, 32)
    assert batch["visible"].shape == (4, *GRID)
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert batch["skipped"].tolist() == [0, 2, 1, 0]
    assert batch["unreadable"] == [f"{photos[bad]}: the file is empty" for bad in (1, 2, 2)]


# --- order


@given(
    st.integers(1, 4).flatmap(
        lambda world: st.tuples(st.just(world), st.integers(1, 5), st.integers(0, 5), st.integers(0, 40))
    ),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_processes_share_the_same_steps(shape: tuple[int, int, int, int], seed: int, epoch: int) -> None:
    world, per_process, steps, rest = shape
    total = world * per_process
    samples = max(total * steps + rest, total)
    alone = list(EpochBatchSampler(samples, total, seed=seed, epoch=epoch))
    ranks = [list(EpochBatchSampler(samples, per_process, rank, world, seed, epoch)) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone
    assert all(len(batch) == total for batch in alone)
    assert len(alone) == samples // total == len(EpochBatchSampler(samples, total))
    indices = [index for batch in alone for _, index in batch]
    assert len(set(indices)) == len(indices)
    assert set(indices) <= set(range(samples))
    assert {key[0] for batch in alone for key in batch} == {epoch}


@given(st.integers(1, 30), st.integers(1, 5), st.data())
def test_resuming_gives_the_tail(samples: int, batch_size: int, data: st.DataObject) -> None:
    samples = max(samples, batch_size)
    full = list(EpochBatchSampler(samples, batch_size, seed=1, epoch=2))
    start = data.draw(st.integers(0, len(full)))
    resumed = EpochBatchSampler(samples, batch_size, seed=1, epoch=2, start_step=start)
    assert list(resumed) == full[start:]
    assert len(resumed) == len(full)


def test_order_changes_with_epoch_and_seed() -> None:
    orders = {
        tuple(index for batch in EpochBatchSampler(50, 10, seed=seed, epoch=epoch) for _, index in batch)
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    assert tuple(range(50)) not in orders


def test_all_come_up_over_time() -> None:
    seen = {index for epoch in range(20) for batch in EpochBatchSampler(10, 4, epoch=epoch) for _, index in batch}
    assert seen == set(range(10))


def test_too_few_samples() -> None:
    with pytest.raises(
        ValueError, match="one step takes 64 images, but there are only 10; .* batch size of at most 10$"
    ):
        EpochBatchSampler(10, 64)
    with pytest.raises(ValueError, match="takes 32 .* only 10; .* at most 2 on each of 4 processes"):
        EpochBatchSampler(10, 8, rank=0, world_size=4)
    assert len(EpochBatchSampler(10, 2, rank=0, world_size=4)) == 1
    with pytest.raises(ValueError, match="use fewer processes"):
        EpochBatchSampler(3, 1, rank=0, world_size=4)
    with pytest.raises(ValueError, match="start_step is 6; an epoch has 5 steps"):
        EpochBatchSampler(10, 2, start_step=6)
    with pytest.raises(ValueError, match="rank 2"):
        EpochBatchSampler(10, 2, rank=2, world_size=2)


# --- the account


def batch_of(size: int, *names: str) -> dict[str, Any]:
    """A batch in which the first samples had one unreadable image each."""
    return {
        "image": torch.zeros(size, 3, 1, 1),
        "skipped": torch.tensor([1] * len(names) + [0] * (size - len(names))),
        "unreadable": [f"{name}: bad" for name in names],
    }


def test_skip_log() -> None:
    log = SkipLog()
    assert log.add(batch_of(50)) == []
    assert log.add(batch_of(30, "a", "b")) == ["a: bad", "b: bad"]
    assert log.add(batch_of(20, "b", "c", "c")) == ["c: bad"]
    assert (log.seen, log.count, log.unique) == (100, 5, ["a: bad", "b: bad", "c: bad"])
    log.check()
    log.add(batch_of(10, *"defghi"))
    log.check()  # 11 of 110: exactly a tenth is allowed
    log.add(batch_of(1, "j"))
    message = r"10\.8% .*\(12 of 111\), more than the 10\.0% allowed\. The first are a: bad; b: bad; c: bad$"
    with pytest.raises(RuntimeError, match=message):
        log.check()
    log.check(seen=1000)


def test_skip_log_judges_on_enough_only() -> None:
    log, small = SkipLog(), SkipLog(epoch_size=20)
    for account in (log, small):
        account.add(batch_of(19, *"abcdefgh"))
        account.check()
        account.add(batch_of(1))
    log.check()
    with pytest.raises(RuntimeError, match="40.0%"):
        small.check()
    log.add(batch_of(80, *"ijk"))
    with pytest.raises(RuntimeError, match="11.0%"):
        log.check()


def test_neighbours_in_a_row_are_counted_once(photos: list[str]) -> None:
    for bad in (1, 2, 3):
        Path(photos[bad]).write_bytes(b"")
    data, log = dataset(photos), SkipLog()
    log.add(collate([data[0, index] for index in range(12)]))
    assert (log.count, len(log.unique)) == (3, 3)
