"""What pictures are made from: a frozen encoder, and images as it takes them and as people see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkmim.data.augmentation import normalisation
from sparkmim.data.inference import Preparation, still_batches
from sparkmim.data.source import images_source
from sparkmim.drawing.pixels import Tones, to_array
from sparkmim.errors import UserError
from sparkmim.evaluation.features import frozen_hierarchy
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.machine import device_named
from sparkmim.models import Hierarchy

# The encoder


@dataclass(frozen=True)
class FrozenEncoder:
    """A pretrained encoder in evaluation mode, without gradients, and the preparation of its images."""

    weights: Weights
    preparation: Preparation
    hierarchy: Hierarchy
    device: torch.device


def refuse_signals(axes: int, name: str) -> None:
    """Refuses networks for signals, which are no pictures."""
    if axes == 1:
        raise UserError(f"{name} is of a network for signals, which are no pictures; `sparkmim embed` writes features")


def open_encoder(
    weights: str | Path,
    model: Any,
    image_size: int | Sequence[int] | None,
    crop: float | None,
    accelerator: str,
    check_axes: Callable[[int, str], None] = refuse_signals,
) -> FrozenEncoder:
    """Opens weights as a frozen encoder; arguments that are None are those of the weights.

    `check_axes` refuses networks by number of spatial axes and path of the weights, before they are built.
    """
    device = device_named(accelerator)
    opened = open_weights(weights)
    preparation = opened.preparation(image_size, crop)
    check_axes(preparation.rank, str(opened.path))
    return FrozenEncoder(opened, preparation, frozen_hierarchy(opened, model, device), device)


def check_finite(features: Tensor, stage: int, path: Path) -> None:
    """Refuses features with infinite values or NaN, which cannot be compared."""
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"stage {stage} of {path} gives values that are not finite; take weights that did not diverge")


# The images


@dataclass(frozen=True)
class InputImages:
    """Images as a network takes them, normalised, and as people see them; with path and reason of each skipped one."""

    images: Tensor  # [n, C, *S], on the device
    names: list[str]
    tones: Tones
    unreadable: list[str]
    preparation: Preparation

    @property
    def pixels(self) -> Any:
        """Images as float32 in 0…1, `[n, H, W, 3]`."""
        return to_array(self.tones(self.images))


def read_images(images: Any, preparation: Preparation, limit: int, device: torch.device) -> InputImages:
    """Reads the first `limit` readable images; refuses if there is none."""
    source = images_source(images, preparation.channels, preparation.rank)
    preparation = preparation.settled(source)
    found: list[Tensor] = []
    names: list[str] = []
    unreadable: list[str] = []
    for batch in still_batches(source, preparation, limit, 0, device, "reading"):
        unreadable += [f"{name}: {reason}" for _, name, reason in batch.unreadable]
        if batch.images is not None:
            found.append(batch.images)
            names += batch.names
        if len(names) >= limit:
            break
    if not found:
        raise UserError(f"no image can be read; the first is {unreadable[0]}")
    tones = tones_of(preparation, source.arrays)
    return InputImages(torch.cat(found)[:limit], names[:limit], tones, unreadable, preparation)


def tones_of(preparation: Preparation, arrays: bool = False) -> Tones:
    """Returns the conversion to colours of prepared images, or of arrays in units of their own."""
    if arrays:
        return Tones.of(preparation.channels, None, None)
    mean, std = normalisation(preparation.channels)
    return Tones(preparation.mean or mean, preparation.std or std)


def sample_photograph() -> str:
    """Returns the path of matplotlib's sample photograph: Grace Hopper, United States Navy, public domain."""
    from matplotlib import get_data_path

    return str(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg")
