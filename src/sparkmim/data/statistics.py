"""Mean and standard deviation of every channel, over a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from sparkmim.data.decoding import UnreadableImage
from sparkmim.errors import UserError


@dataclass
class ChannelStatistics:
    """What the channels of a data set look like.

    Attributes:
        mean: per channel; in 0..1 for image files, in the data's own units for arrays.
        std: per channel, over all values.
        samples: how many were read.
        unreadable: what could not be read, and why.
    """

    mean: list[float]
    std: list[float]
    samples: int
    unreadable: list[str] = field(default_factory=list)


def channel_statistics(
    source: Any,
    read: Callable[[Any, str], Any],
    scale: float = 1.0,
    samples: int = 1000,
    console: Console | None = None,
) -> ChannelStatistics:
    """Reads samples spread evenly over a data set.

    Args:
        source: a sequence of items.
        read: from an item and its name to `[C, *S]`.
        scale: what values are divided by, 255 for 8-bit images.
        samples: how many to read at most.
        console: where progress is shown, if it is a terminal.

    Raises:
        ValueError: if nothing can be read, or a channel is the same everywhere or not finite.
    """
    count = min(samples, len(source))
    places = [place * len(source) // count for place in range(count)]
    shift = total = squares = low = high = torch.zeros(())  # sums are taken of what is left after the shift
    values = done = 0
    unreadable: list[str] = []
    with Progress(console=console, transient=True, disable=console is None or not console.is_terminal) as progress:
        for place in progress.track(places, description="mean and standard deviation"):
            name = f"item {place}"
            try:
                found = source[place]
                name = str(found) if isinstance(found, str | Path) else name
                read_in = read(found, name)
                if not isinstance(read_in, Tensor):
                    read_in = torch.from_numpy(np.array(read_in, dtype=np.float64))
                item = read_in.double().flatten(1) / scale  # [C, values]
                if not bool(torch.isfinite(item).all()):
                    raise UnreadableImage(name, "holds values that are not finite")
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            if not done:
                # The first sample's mean: squares of values far from zero would lose the digits of the deviation.
                shift, low, high = item.mean(1), item.amin(1), item.amax(1)
            low, high = torch.minimum(low, item.amin(1)), torch.maximum(high, item.amax(1))
            item = item - shift[:, None]
            total, squares = total + item.sum(1), squares + item.square().sum(1)
            values += item.shape[1]
            done += 1
    if not done:
        raise UserError(f"none of {count} samples can be read; the first: {'; '.join(unreadable[:3])}")
    offset = total / values
    mean, std = shift + offset, (squares / values - offset.square()).clamp(min=0).sqrt()
    constant = (low == high).nonzero().flatten().tolist()
    if constant:
        raise UserError(
            f"channel(s) {', '.join(map(str, constant))} have the same value everywhere; leave them out of the data"
        )
    return ChannelStatistics(mean.tolist(), std.tolist(), done, unreadable)
