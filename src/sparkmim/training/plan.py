"""Length of a run, in optimiser steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sparkmim.data.problems import counted
from sparkmim.errors import UserError
from sparkmim.training.modules import OptimizerSettings
from sparkmim.training.settings import PyramidSettings, TrainSettings

log = logging.getLogger("sparkmim")


@dataclass(frozen=True)
class Plan:
    """Length of a run, and how its batches are shared out.

    Attributes:
        world_size: number of processes.
        parts: batches that make up an optimiser step on each process.
        batch_size: images per optimiser step, over all processes.
        steps_per_epoch: optimiser steps per epoch.
        steps: optimiser steps of the whole run.
    """

    world_size: int
    parts: int
    batch_size: int
    steps_per_epoch: int
    steps: int

    @property
    def epochs(self) -> int:
        """Number of epochs, the last of which may be cut short."""
        return -(-self.steps // self.steps_per_epoch)

    def optimizer(
        self, settings: TrainSettings, images: int, warmup: float, name: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999), weight_decay_end: float | None = None,
    ) -> OptimizerSettings:  # fmt: skip
        """Returns optimiser settings whose learning rate is given for `images` per step; `warmup` is in steps."""
        if warmup > self.steps:
            log.warning(
                "the warm-up of %d steps is longer than the run of %d; the learning rate never reaches its peak",
                round(warmup), self.steps,
            )  # fmt: skip
        end = settings.weight_decay if weight_decay_end is None else weight_decay_end
        return OptimizerSettings(
            name, settings.learning_rate * (self.batch_size / images), betas, settings.weight_decay, end,
            settings.clip_grad, self.steps, min(round(warmup), self.steps - 1),
        )  # fmt: skip

    def warmup(self, settings: PyramidSettings, usual: int) -> int:
        """Returns the steps of warm-up; a tenth of the run if that is not longer than `usual`, a recipe's."""
        return self.steps // 10 if settings.warmup_iterations == usual >= self.steps else settings.warmup_iterations

    def adamw(self, settings: PyramidSettings) -> OptimizerSettings:
        """Returns AdamW's settings for detection and segmentation, whose rates are for 16 images per step."""
        return self.optimizer(settings, 16, settings.warmup_iterations)

    def adamw_text(self, settings: PyramidSettings) -> str:
        """Returns AdamW's settings in words."""
        frozen = f"frozen stages {settings.frozen_stages}, " if settings.frozen_stages else ""
        return (
            f"adamw, peak rate {settings.learning_rate * self.batch_size / 16:g}, layer decay "
            f"{settings.layer_decay:g}, weight decay {settings.weight_decay:g}, {frozen}"
            f"warm-up {settings.warmup_iterations} steps"
        )

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.steps / self.steps_per_epoch:.4g} epochs, {self.steps:,} steps in all"


def plan_for(
    settings: TrainSettings, batch_is_free: bool, images: int, iterations: int | None = None, views: int = 1
) -> Plan:
    """Fits the batch size to the data and counts steps.

    Args:
        settings: of the training.
        batch_is_free: whether the batch size may shrink, as a recipe's does.
        images: in the training set.
        iterations: optimiser steps of the run; None to train for `settings.epochs`.
        views: of each image, which are in one batch.

    Raises:
        UserError: if the batch size cannot be met.
    """
    world_size, parts = settings.world_size, settings.accumulate
    size, unit = settings.batch_size, parts * world_size * views
    if batch_is_free:
        size = max(1, min(size, images) // unit) * unit
    if size > images:
        raise UserError(f"batch_size {size} is more than the {images} images there are; use {images} or less")
    if size % unit:
        of_each = f" × {views} views" if views > 1 else ""
        raise UserError(
            f"batch_size {size} does not divide into {counted(world_size, 'process', 'processes')} × "
            f"{counted(parts, 'accumulation step')}{of_each}; use {max(1, size // unit) * unit}"
        )
    steps_per_epoch = images // size
    steps = iterations or max(1, round((settings.epochs or 1) * steps_per_epoch))
    return Plan(world_size, parts, size, steps_per_epoch, steps)
