"""Ends a training in the middle."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl


class InterruptAt(pl.Callback):
    """Asks for an end after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
