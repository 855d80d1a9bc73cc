"""Mean and standard deviation per channel of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from sparkmim.data.decoding import UnreadableImage, name_of
from sparkmim.errors import UserError
from sparkmim.terminal import Terminal


@dataclass
class ChannelStatistics:
    """Mean and standard deviation per channel; in 0…1 for image files, in the data's own units for arrays."""

    mean: list[float]
    std: list[float]
    samples: int  # number of samples read
    unreadable: list[str] = field(default_factory=list)  # path and reason of each unreadable sample


def channel_statistics(
    source: Any, read: Callable[..., Any], scale: float = 1.0, samples: int = 1000, console: Terminal | None = None
) -> ChannelStatistics:
    """Measures mean and standard deviation on samples spread evenly over a data set.

    Items are read as `[C, *S]` by `read(item, name=...)`, and divided by `scale`. Progress is shown if `console` is a
    terminal.
    """
    count = min(samples, len(source))
    places = [place * len(source) // count for place in range(count)]
    shift = total = squares = low = high = torch.zeros(())  # sums are taken after subtracting the shift
    values = done = 0
    unreadable: list[str] = []
    with Progress(console=console, transient=True, disable=console is None or not console.is_terminal) as progress:
        for place in progress.track(places, description="mean and standard deviation"):
            name = f"item {place}"
            try:
                found = source[place]
                name = name_of(found, place)
                read_in = read(found, name=name)
                if not isinstance(read_in, Tensor):
                    read_in = torch.from_numpy(np.array(read_in, dtype=np.float64))
                item = read_in.double().flatten(1) / scale  # [C, values]
                if not bool(torch.isfinite(item).all()):
                    raise UnreadableImage(name, "holds values that are not finite")
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            if not done:
                # Shift by the first sample's mean: squares of values far from zero lose the digits of the deviation.
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
        which = f"channel {constant[0]} has" if len(constant) == 1 else f"channels {', '.join(map(str, constant))} have"
        raise UserError(f"{which} the same value everywhere; leave {'it' if len(constant) == 1 else 'them'} out")
    return ChannelStatistics(mean.tolist(), std.tolist(), done, unreadable)
