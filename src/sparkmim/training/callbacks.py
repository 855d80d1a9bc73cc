"""What happens around the training step: progress, curves, pictures, checkpoints, and leaving safely."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from sparkmim.data import SkipLog
from sparkmim.drawing.pixels import reconstruction_grid
from sparkmim.runs.folder import PICTURES, RunFolder
from sparkmim.training.modules import NonFiniteLoss, PretrainModule, ScheduledModule

log = logging.getLogger("sparkmim")


class StepCallback(pl.Callback):
    """A callback that acts once per optimiser step, however many batches that takes."""

    def __init__(self) -> None:
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            assert isinstance(pl_module, ScheduledModule)
            self.on_step(trainer, pl_module, self._seen)

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        """Called after optimiser step `step`, counted from 1."""
        raise NotImplementedError


class Monitor(StepCallback):
    """Scalars for TensorBoard, a line per epoch for the log, the progress bar, and the watch over the loss.

    Args:
        batch_size: images per optimiser step, over all processes.
        steps_per_epoch: optimiser steps.
        log_every: steps between scalars.
        checkpoint: named when training diverges.
        skipped: collects unreadable images.
        console: where the bar is drawn; None for no bar.
    """

    def __init__(
        self,
        batch_size: int,
        steps_per_epoch: int,
        log_every: int,
        checkpoint: Path,
        skipped: SkipLog,
        console: Console | None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.log_every = log_every
        self.checkpoint = checkpoint
        self.skipped = skipped
        self.console = console
        self.progress: Progress | None = None
        self._losses: list[Tensor] = []
        self._pending: tuple[Tensor, int, float] | None = None
        self._clock = (0, 0.0)
        self.images_per_second = 0.0
        self.epoch_loss = float("nan")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._clock = (trainer.global_step, time.perf_counter())
        if self.console is not None and trainer.is_global_zero:
            self.progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f} · {task.fields[speed]:,.0f} images/s"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=self.console, refresh_per_second=4,
            )  # fmt: skip
            self.progress.add_task(
                "starting", total=trainer.max_steps, completed=trainer.global_step, loss=float("nan"), speed=0.0
            )
            self.progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ScheduledModule)
        for report in self.skipped.add(batch):
            log.warning("unreadable image skipped: %s", report)
        # The loss of the batch before is there already: looking at it keeps no device waiting.
        self.check_finite()
        self._pending = (pl_module.step_losses[-1], trainer.global_step, pl_module.rate)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def check_finite(self) -> None:
        """Raises `NonFiniteLoss` if the loss of the last batch is not finite."""
        if self._pending is None:
            return
        loss, step, rate = self._pending
        self._pending = None
        if not torch.isfinite(loss):
            good = (
                f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.is_file() else "no checkpoint yet"
            )
            raise NonFiniteLoss(
                f"the loss became {loss.item()} at step {step} with learning rate {rate:.3g}; {good}. "
                "Lower --learning-rate, or make the warm-up longer"
            )

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        loss = torch.stack(module.step_losses).mean()
        module.step_losses.clear()
        if trainer.world_size > 1:
            loss = trainer.strategy.reduce(loss, reduce_op="mean")
        self._losses.append(loss)
        last = step == trainer.max_steps
        epoch_done = step % self.steps_per_epoch == 0
        if step % self.log_every == 0 or epoch_done or last:
            self.check_finite()
            since, then = self._clock
            now = time.perf_counter()
            self.images_per_second = (step - since) * self.batch_size / (now - then)
            self._clock = (step, now)
            for logger in trainer.loggers:
                logger.log_metrics(
                    {
                        "loss": loss.item(),
                        "learning_rate": module.rate,
                        "weight_decay": module.decay,
                        "gradient_norm": module.grad_norm.item(),
                        "images_per_second": self.images_per_second,
                        "epoch": step / self.steps_per_epoch,
                    },
                    step,
                )
        if epoch_done or last:
            self.epoch_loss = torch.stack(self._losses).mean().item()
            self._losses.clear()
            epochs = -(-trainer.max_steps // self.steps_per_epoch)
            log.info(
                "epoch %d/%d  step %d  loss %.4f  rate %.3g  %.0f images/s",
                -(-step // self.steps_per_epoch), epochs, step, self.epoch_loss, module.rate, self.images_per_second,
            )  # fmt: skip
            self.skipped.check()
        if self.progress is not None:
            epochs = -(-trainer.max_steps // self.steps_per_epoch)
            self.progress.update(
                self.progress.task_ids[0],
                completed=step,
                description=f"epoch {min(step // self.steps_per_epoch + 1, epochs)}/{epochs}",
                loss=loss.item() if step % self.log_every == 0 else self._shown(),
                speed=self.images_per_second,
            )

    def _shown(self) -> float:
        assert self.progress is not None
        shown: float = self.progress.tasks[0].fields["loss"]
        return shown

    def stop_bar(self) -> None:
        """Leaves the bar where it is."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop_bar()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.stop_bar()


class Ema(StepCallback):
    """Keeps an exponential moving average of the weights (timm's `ModelEmaV3`), and its files beside the others."""

    def __init__(self, module: ScheduledModule, decay: float) -> None:
        super().__init__()
        self.average = ModelEmaV3(module.model, decay=decay)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.average.to(pl_module.device)

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        self.average.update(module.model, step=step)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average.load_state_dict(state_dict["average"])


class Pictures(StepCallback):
    """Every so many epochs, a picture of inputs, masked inputs and reconstructions of the same few images."""

    def __init__(
        self,
        samples: Sequence[dict[str, Any]],
        every_steps: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.images = torch.stack([sample["image"] for sample in samples])
        self.visible = torch.stack([sample["visible"] for sample in samples])
        self.every_steps = every_steps
        self.mean, self.std = mean, std

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        if (step % self.every_steps and step != trainer.max_steps) or not trainer.is_global_zero:
            return
        assert isinstance(module, PretrainModule)
        model = module.model
        model.eval()
        with torch.no_grad():
            output = model(self.images.to(module.device), self.visible.to(module.device))
        model.train()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                picture = reconstruction_grid(output, self.mean, self.std)
                logger.experiment.add_image(PICTURES, picture, step)


class Keeper(StepCallback):
    """Saves checkpoints and weights: every few minutes, at the end, and before leaving on Ctrl-C or SIGTERM.

    A checkpoint is written beside the old one and then takes its place, so that there is a whole one at any
    moment. A second Ctrl-C leaves at once.

    Args:
        folder: of the run.
        minutes: between checkpoints.
        write_weights: writes the weight files; given the number of steps done.
        monitor: refuses to save what is not finite.
    """

    def __init__(
        self, folder: RunFolder, minutes: float, write_weights: Callable[[int], None], monitor: Monitor
    ) -> None:
        super().__init__()
        self.folder = folder
        self.minutes = minutes
        self.write_weights = write_weights
        self.monitor = monitor
        self.signal: int | None = None
        self._saved = 0.0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved = time.monotonic()
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        except ValueError:  # not in the main thread: signals are somebody else's
            self._handlers.clear()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                "\nfinishing this step, then saving; press Ctrl-C again to leave at once", file=sys.stderr, flush=True
            )

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        last = step == trainer.max_steps
        due = time.monotonic() - self._saved > 60 * self.minutes
        stop = self._agree(trainer, self.signal is not None)
        if last or stop or self._agree(trainer, due):
            self.save(trainer, module, step)
        if stop:
            log.info("stopped at step %d on request; continue with --resume", step)
            trainer.should_stop = True

    @staticmethod
    def _agree(trainer: pl.Trainer, wish: bool) -> bool:
        """One process's wish becomes all processes' act; clocks and signals differ between them."""
        return trainer.strategy.reduce_boolean_decision(wish, all=False) if trainer.world_size > 1 else wish

    def save(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        """Writes checkpoint and weights."""
        self.monitor.check_finite()
        path = self.folder.checkpoint
        partial = path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(path)
            self.write_weights(step)
        self._saved = time.monotonic()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
