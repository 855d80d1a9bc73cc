"""Schedules of learning rate and weight decay, per optimiser step."""

from __future__ import annotations

import math
from collections.abc import Sequence

WARMUP_START = 0.005
"""Learning rate at the first step, as a share of the peak."""

END = 0.001
"""Learning rate at the last step, as a share of the peak."""


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Returns a learning rate: linear warm-up from 0.005 of the peak, then a cosine to 0.001 of it at the last step.

    Args:
        step: optimiser step, `0 … steps - 1`.
        steps: of the whole run.
        warmup: steps of warm-up.
        peak: highest learning rate.
    """
    if step < warmup:
        return peak * (WARMUP_START + (1 - WARMUP_START) * step / warmup)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (END + (1 - END) * 0.5 * (1 + math.cos(math.pi * progress)))


def linear_learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Returns a learning rate that falls linearly to 0 after the last step, times a linear warm-up from 0.

    The polynomial schedule of power 1, usual in segmentation.

    Args:
        step: optimiser step, `0 … steps - 1`.
        steps: of the whole run.
        warmup: steps of warm-up.
        peak: learning rate that the line starts from.

    Example:
        >>> [round(linear_learning_rate(step, 10, 2, 1.0), 2) for step in range(10)]
        [0.0, 0.45, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    """
    return peak * (1 - step / steps) * (min(1.0, step / warmup) if warmup else 1.0)


def stepped_learning_rate(
    step: int, steps: int, warmup: int, peak: float, start: float, drops: Sequence[float], factor: float
) -> float:
    """Returns a learning rate with linear warm-up and drops at given points of the run, as usual in detection.

    Args:
        step: optimiser step, `0 … steps - 1`.
        steps: of the whole run.
        warmup: steps of warm-up.
        peak: highest learning rate.
        start: learning rate at the first step, as a share of the peak.
        drops: when the rate is multiplied, as shares of the run.
        factor: what the rate is multiplied by each time.

    Example:
        >>> [round(stepped_learning_rate(step, 10, 2, 1.0, 0.5, (0.6, 0.9), 0.1), 4) for step in range(10)]
        [0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01]
    """
    rate = peak * factor ** sum(step >= round(drop * steps) for drop in drops)
    return rate * (start + (1 - start) * min(1.0, step / warmup)) if warmup else rate


def weight_decay(step: int, steps: int, start: float, end: float) -> float:
    """Returns a weight decay on a cosine from `start` at the first step to `end` at the last."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps - 1)))
