"""Features of whole images from a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparkmim.data import eval_transform, normalisation
from sparkmim.data.arrays import MissingPackage, WholeArray
from sparkmim.data.decoding import UnreadableImage
from sparkmim.models import Hierarchy

if TYPE_CHECKING:
    from sparkmim.training.source import Source
    from sparkmim.training.weights import Weights

CROP = 0.875
"""Share of the resized image that the centre crop shows, where a weight file names none: 224 of 256."""


@torch.no_grad()
def stage_features(hierarchy: Hierarchy, images: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
    """Feature maps of unmasked images, averaged over positions.

    Args:
        hierarchy: of the encoder, in evaluation mode.
        images: normalised, `[B, C, *S]`, on the hierarchy's device.
        stages: which maps, counted from 1 at the shallowest; None for all.

    Returns:
        float32 `[B, C_i]` for each of them.
    """
    maps = hierarchy(images)
    chosen = maps if stages is None else [maps[stage - 1] for stage in stages]
    return [map_.flatten(2).mean(-1).float() for map_ in chosen]


def pooled_features(hierarchy: Hierarchy, batches: Iterable[Tensor]) -> Tensor:
    """The deepest feature map of unmasked images, averaged over positions.

    Args:
        hierarchy: of the encoder; put into evaluation mode for the call.
        batches: normalised images `[B, C, *S]` each.

    Returns:
        float32 `[images, C_k]` on the CPU.
    """
    training = hierarchy.training
    hierarchy.eval()
    try:
        device = next(hierarchy.parameters()).device
        pooled = [stage_features(hierarchy, images.to(device))[-1].cpu() for images in batches]
    finally:
        hierarchy.train(training)
    return torch.cat(pooled)


# What the network sees


@dataclass(frozen=True)
class Preparation:
    """How images become a network's input, without anything random.

    Attributes:
        image_size: per axis.
        channels: of an image.
        mean: of each channel, as the network was trained; None if that is not known.
        std: as mean.
        crop: share of the resized image that the centre crop shows; None to resize it whole, as arrays always are.
    """

    image_size: tuple[int, ...]
    channels: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    crop: float | None

    @classmethod
    def of(cls, weights: Weights, image_size: int | Sequence[int] | None, crop: float | None) -> Preparation:
        """What a weight file says of its images, or what is given instead.

        Raises:
            ValueError: if a size or the crop is out of range.
        """
        known = weights.metadata
        size = known.get("image_size") or (224, 224)
        if isinstance(image_size, int):
            size = (image_size,) * len(size)
        elif image_size is not None:
            size = tuple(image_size)
        if not 1 <= len(size) <= 3 or min(size) < 1:
            raise ValueError(f"image_size is {list(size)}; give one number above 0, or one per axis")
        if crop is None:
            crop = known.get("crop", CROP)
        elif not 0 <= crop <= 1:
            raise ValueError(f"crop is {crop}; it is a share of the image, at most 1, or 0 to resize it whole")
        return cls(tuple(size), weights.channels, known.get("mean"), known.get("std"), crop or None)

    def settled(self, source: Source) -> Preparation:
        """With mean and std, where they are unknown: ImageNet's for images, those of the source for arrays."""
        if self.mean is not None and self.std is not None:
            return self
        if source.arrays:
            found = source.statistics()
            return replace(self, mean=found.mean, std=found.std)
        mean, std = normalisation(self.channels)
        return replace(self, mean=mean, std=std)

    def transform(self, source: Source) -> Callable[[Any], Tensor]:
        """From what `source` reads to float32 `[C, *image_size]`, normalised as `settled` says."""
        known = self.settled(source)
        mean, std = known.mean, known.std
        assert mean is not None
        assert std is not None
        if source.arrays:
            return WholeArray(self.image_size, mean, std)
        height, width = self.image_size
        return eval_transform((height, width), mean, std, self.crop)


# Reading, in order, without what is unreadable


@dataclass
class Batch:
    """Some images in the order of their source.

    Attributes:
        images: those that could be read, `[b, C, *S]`; None if there is none.
        places: of these, in the source.
        names: of these: paths, or numbers of items.
        unreadable: place, name and reason of the others.
    """

    images: Tensor | None
    places: list[int]
    names: list[str]
    unreadable: list[tuple[int, str, str]]


class _Stills(Dataset[tuple[int, str, Tensor | str]]):
    """Place, name, and image or reason of every item."""

    def __init__(self, items: Any, read: Callable[[Any, str], Any], transform: Callable[[Any], Tensor]) -> None:
        self.items, self.read, self.transform = items, read, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[int, str, Tensor | str]:
        name = f"item {place}"
        try:
            item = self.items[place]
            if isinstance(self.items, list) and isinstance(item, str):
                name = item
            return place, name, self.transform(self.read(item, name))
        except MissingPackage:
            raise
        except UnreadableImage as error:
            return place, name, error.reason
        except OSError as error:  # a dataset that opens files itself
            return place, name, str(error)


def _collate(samples: list[tuple[int, str, Tensor | str]]) -> Batch:
    read = [(place, name, found) for place, name, found in samples if isinstance(found, Tensor)]
    return Batch(
        torch.stack([image for *_, image in read]) if read else None,
        [place for place, *_ in read],
        [name for _, name, _ in read],
        [(place, name, found) for place, name, found in samples if isinstance(found, str)],
    )


def still_batches(
    source: Source, preparation: Preparation, batch_size: int, workers: int | None, device: torch.device, doing: str
) -> Iterator[Batch]:
    """Reads images in order, with the progress on stderr if that is a terminal.

    Args:
        source: what to read.
        preparation: what becomes of it.
        batch_size: items at a time; of which those that are unreadable are left out.
        workers: loader processes; None for a number that suits the machine.
        device: where the images go.
        doing: a word for the progress bar.

    Raises:
        ValueError: if `batch_size` or `workers` is out of range.
    """
    from sparkmim.training.loader import leave_signals_to_the_parent

    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be above 0")
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be 0 or above")
    if workers is None:
        workers = 2 if len(source.items) > batch_size else 0  # a single batch is read sooner than they are started
    loader = DataLoader(
        _Stills(source.items, source.read, preparation.transform(source)), batch_size, num_workers=workers,
        collate_fn=_collate, worker_init_fn=leave_signals_to_the_parent, pin_memory=device.type == "cuda",
    )  # fmt: skip
    console = Console(stderr=True)
    for batch in track(loader, doing, console=console, disable=not console.is_terminal, transient=True):
        if batch.images is not None:
            batch.images = batch.images.to(device)
        yield batch


@dataclass
class StageFeatures:
    """Features of the readable images of a source.

    Attributes:
        stages: float32 `[n, C_i]` by stage, counted from 1 at the shallowest.
        places: long `[n]`, of these images in the source.
        unreadable: path and reason of the others.
    """

    stages: dict[int, Tensor]
    places: Tensor
    unreadable: list[str]


def features_of(networks: Sequence[tuple[Hierarchy, Sequence[int]]], batches: Iterable[Batch]) -> list[StageFeatures]:
    """Runs frozen encoders, each with the stages wanted of it, over images that are read once for all of them.

    Raises:
        ValueError: if no image could be read.
    """
    found: list[list[list[Tensor]]] = [[] for _ in networks]
    places: list[int] = []
    unreadable: list[str] = []
    for batch in batches:
        unreadable += [f"{name}: {reason}" for _, name, reason in batch.unreadable]
        places += batch.places
        if batch.images is not None:
            for parts, (hierarchy, stages) in zip(found, networks, strict=True):
                parts.append([pooled.cpu() for pooled in stage_features(hierarchy, batch.images, stages)])
    if not places:
        raise ValueError(f"none of the {len(unreadable)} images can be read; the first is {unreadable[0]}")
    return [
        StageFeatures(
            {
                stage: torch.cat(list(of_stage))
                for stage, of_stage in zip(stages, zip(*parts, strict=True), strict=True)
            },
            torch.tensor(places),
            unreadable,
        )
        for parts, (_, stages) in zip(found, networks, strict=True)
    ]


# Networks


def frozen_hierarchy(weights: Weights, encoder: torch.nn.Module, device: torch.device) -> Hierarchy:
    """The feature maps of an encoder as it was pretrained: no deeper stage than the run's, its own modules."""
    known = weights.metadata
    size = known.get("image_size")
    hierarchy = Hierarchy(
        encoder, weights.channels, len(size) if size else 2, size, known.get("stages"), known.get("feature_modules")
    )
    return hierarchy.to(device).eval().requires_grad_(False)


def check_stage(stage: int | None, hierarchy: Hierarchy, name: str) -> int:
    """The stage meant: the deepest if None.

    Raises:
        ValueError: if there is no such stage.
    """
    count = len(hierarchy.strides)
    if stage is not None and not 1 <= stage <= count:
        raise ValueError(f"stage is {stage}, but {name} has {count} stages, 1 the shallowest; choose 1 to {count}")
    return stage or count


def device_named(accelerator: str) -> torch.device:
    """The device of a command.

    Raises:
        ValueError: if there is none of that kind.
    """
    if accelerator not in ("auto", "cpu", "cuda"):
        raise ValueError(f"accelerator is {accelerator!r}; choose auto, cpu or cuda")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("accelerator is cuda, but PyTorch finds no GPU here; use --accelerator cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
