"""Ends trainings early."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


class StopAt(pl.Callback):
    """Ends training after a step, as EarlyStopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step
