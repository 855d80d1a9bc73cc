"""Per-step schedules of the paper."""

from __future__ import annotations

import math

WARMUP_START = 0.005
"""Learning rate at the first step, as a share of the peak."""

END = 0.001
"""Learning rate at the last step, as a share of the peak."""


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up from 0.005 of the peak, then a cosine to 0.001 of it, reached at the last step.

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


def weight_decay(step: int, steps: int, start: float, end: float) -> float:
    """A cosine from `start` at the first step to `end` at the last."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps - 1)))
