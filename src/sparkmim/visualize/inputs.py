"""Images that are to be shown: read as a network takes them, and as people see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparkmim.data import normalisation
from sparkmim.data.inference import Preparation, still_batches
from sparkmim.data.source import images_source
from sparkmim.drawing.pixels import Tones, to_array
from sparkmim.errors import UserError


@dataclass(frozen=True)
class Shown:
    """Some images, as a network takes them and as people see them.

    Attributes:
        images: normalised, `[n, C, *S]`, on the device.
        names: of them.
        tones: that undo the normalisation.
        unreadable: path and reason of each that was left out.
        preparation: how they were made ready, with mean and std.
    """

    images: Tensor
    names: list[str]
    tones: Tones
    unreadable: list[str]
    preparation: Preparation

    @property
    def pixels(self) -> Any:
        """float32 in 0…1, `[n, H, W, 3]`."""
        return to_array(self.tones(self.images))


def read_shown(images: Any, preparation: Preparation, limit: int, device: torch.device) -> Shown:
    """Reads the first images that can be read, up to `limit`.

    Raises:
        ValueError: if there is none.
        FileNotFoundError: if a path does not exist.
    """
    if limit < 1:
        raise UserError(f"limit is {limit}; it must be above 0")
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
        raise UserError(f"none of the {len(unreadable)} images can be read; the first is {unreadable[0]}")
    tones = tones_of(preparation, source.arrays)
    return Shown(torch.cat(found)[:limit], names[:limit], tones, unreadable, preparation)


def tones_of(preparation: Preparation, arrays: bool = False) -> Tones:
    """What undoes the normalisation of images, or of arrays in units of their own."""
    mean, std = preparation.mean, preparation.std
    if arrays:
        mean = std = None
    elif mean is None or std is None:
        mean, std = normalisation(preparation.channels)
    return Tones.of(preparation.channels, mean, std)
