"""Callbacks around the training step: history, progress, averages, pictures and checkpoints."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from sparkmim.data.skip_log import SkipLog
from sparkmim.drawing.pixels import reconstruction_grid
from sparkmim.files import opened_for_torch, replacing
from sparkmim.machine import is_running
from sparkmim.runs.folder import PICTURES, RunFolder
from sparkmim.runs.history import Event, History
from sparkmim.terminal import Terminal, printable
from sparkmim.training.loggers import log_picture
from sparkmim.training.modules import NonFiniteLoss, PretrainModule, ScheduledModule
from sparkmim.training.plan import Plan


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
        """Acts after optimiser step `step`, counted from 1."""
        raise NotImplementedError


class Monitor(StepCallback):
    """Adds steps, epochs and unreadable images to the history, and stops a run whose loss or gradient is not finite.

    Metrics are logged through Lightning as well, so that other callbacks find `loss`: of the step, and at the end of
    an epoch, its mean.

    Attributes:
        images_per_second: over the last logging interval.
        epoch_loss: mean loss over the last finished epoch.
    """

    def __init__(self, history: History, plan: Plan, log_every: int, checkpoint: Path, skipped: SkipLog) -> None:
        super().__init__()
        self.history = history
        self.plan = plan
        self.log_every = log_every
        self.checkpoint = checkpoint
        self.skipped = skipped
        self._total = torch.zeros(())  # of losses since the epoch began, or since the run went on within it
        self._steps = 0
        self._pending: tuple[dict[str, Tensor], int, float] | None = None
        self._clock = (0, 0.0)
        self.images_per_second = 0.0
        self.epoch_loss = float("nan")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._clock = (trainer.global_step, time.perf_counter())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ScheduledModule)
        for complaint in self.skipped.add(batch):
            add_unreadable(self.history, trainer.global_step, complaint, "training")
        # What the batch before gave is there already: looking at it keeps no device waiting.
        self.check_finite()
        # A gradient that is not finite spoils the weights, which the loss tells only at the next step.
        looked_at = {"loss": pl_module.step_losses[-1], "gradient norm": pl_module.grad_norm}
        self._pending = (looked_at, trainer.global_step, pl_module.rate)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def check_finite(self) -> None:
        """Raises `NonFiniteLoss` if the loss or the gradient of the last batch is not finite."""
        if self._pending is None:
            return
        looked_at, step, rate = self._pending
        self._pending = None
        for name, value in looked_at.items():
            if torch.isfinite(value):
                continue
            good = (
                f"the last good checkpoint is {self.checkpoint}" if self.checkpoint.is_file() else "no checkpoint yet"
            )
            raise NonFiniteLoss(
                f"the {name} became {value.item()} at step {step} with learning rate {rate:.3g}; {good}. "
                "Lower --learning-rate, or make the warm-up longer"
            )

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        loss = torch.stack(module.step_losses).mean()
        module.step_losses.clear()
        module.log("loss", loss, on_step=True, on_epoch=False, logger=False)
        self._total = self._total.to(loss.device) + loss
        self._steps += 1
        epoch_done = step % self.plan.steps_per_epoch == 0 or step == self.plan.steps
        if step % self.log_every and not epoch_done:
            return
        self.check_finite()
        since, then = self._clock
        now = time.perf_counter()
        self.images_per_second = (step - since) * self.plan.batch_size / (now - then)
        self._clock = (step, now)
        values = torch.stack([loss, self._total / self._steps, *module.step_figures.values()])
        if trainer.world_size > 1:
            values = trainer.strategy.reduce(values, reduce_op="mean")
        of_step, mean, *figures = values.tolist()
        speed = {"images_per_second": self.images_per_second}
        self.history.add(
            "step", step, epoch=step / self.plan.steps_per_epoch, loss=of_step, learning_rate=module.rate,
            weight_decay=module.decay, gradient_norm=module.grad_norm.item(), **speed,
            **dict(zip(module.step_figures, figures, strict=True)),
        )  # fmt: skip
        if epoch_done:
            self.epoch_loss, self._steps = mean, 0
            self._total = torch.zeros_like(self._total)
            epoch = -(-step // self.plan.steps_per_epoch)
            self.history.add(
                "epoch", step, epoch=epoch, epochs=self.plan.epochs, loss=mean, learning_rate=module.rate, **speed
            )
            self.skipped.check()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # An epoch that was cut short has a mean too.
        pl_module.log("loss", (self._total / self._steps) if self._steps else self.epoch_loss, logger=False)


def add_unreadable(history: History, step: int, complaint: str, part: str) -> None:
    """Adds an unreadable image to the history, given as `path: reason`."""
    image, _, reason = complaint.partition(": ")
    history.add("unreadable", step, image=image, reason=reason, part=part)


# Listeners of the history


class ProgressBar:
    """Draws a progress bar from the events of a run."""

    def __init__(self, console: Terminal, plan: Plan, step: int) -> None:
        self.plan = plan
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, refresh_per_second=4,
        )  # fmt: skip
        self.task = self.progress.add_task("starting", total=plan.steps, completed=step, figures="")
        self._known: dict[str, str] = {}

    def __call__(self, event: Event) -> None:
        said = event.fields
        if event.kind == "step":
            epoch = min(event.step // self.plan.steps_per_epoch + 1, self.plan.epochs)
            self.progress.update(self.task, completed=event.step, description=f"epoch {epoch}/{self.plan.epochs}")
            self._known |= {"loss": f"{said['loss']:.4f}", "speed": f"{said['images_per_second']:,.0f} images/s"}
        elif event.kind == "validation" and "loss" in said["figures"]:
            self._known["validation"] = f"{said['figures']['loss']:.4f}"
        words = {"loss": "loss {}", "validation": "validation {}", "speed": "{}"}
        shown = [text.format(self._known[name]) for name, text in words.items() if name in self._known]
        self.progress.update(self.task, figures=" · ".join(shown))


class LoggerFeed:
    """Passes scalars and pictures of the history on to Lightning's loggers."""

    def __init__(self, trainer: pl.Trainer, folder: RunFolder) -> None:
        self.trainer, self.folder = trainer, folder

    def __call__(self, event: Event) -> None:
        if event.kind == "step":
            self._scalars(event.fields, event.step)
        elif event.kind == "validation":
            average = "ema_" if event.fields["weights"] == "ema" and event.fields["beside_model"] else ""
            self._scalars(
                {f"val/{average}{name}": value for name, value in event.fields["figures"].items()}, event.step
            )
        elif event.kind == "probe":
            average = "ema_" if event.fields["weights"] == "ema" else ""
            self._scalars({f"probe/{average}{name}": v for name, v in event.fields["figures"].items()}, event.step)
        elif event.kind == "picture":
            with Image.open(self.folder.path / event.fields["file"]) as picture:
                for logger in self.trainer.loggers:
                    log_picture(logger, event.fields["name"], picture, event.step)

    def _scalars(self, values: dict[str, float], step: int) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step)


def add_picture(history: History, folder: RunFolder, step: int, name: str, pixels: Tensor) -> None:
    """Saves a picture in the run folder and adds it to the history.

    Args:
        name: of the picture; those of one name show the same over time.
        pixels: RGB `[3, H, W]`, uint8 or float in 0…1.
    """
    name = printable(name)
    words = re.findall(r"\w+", name)
    file = folder.pictures / f"{'-'.join(words)}-{step:08d}.png"
    with replacing(file) as partial:
        to_pil_image(pixels.cpu()).save(partial, "PNG")
    history.add("picture", step, name=name, file=file.relative_to(folder.path).as_posix())


# What else happens after a step


class Ema(StepCallback):
    """Keeps an exponential moving average of the weights (timm's `ModelEmaV3`)."""

    def __init__(self, module: ScheduledModule, decay: float) -> None:
        super().__init__()
        self.average = ModelEmaV3(module.model, decay=decay)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.average.to(pl_module.device)
        if not trainer.global_step:
            average: Any = self.average  # `set` is untyped
            average.set(pl_module.model)  # what comes before the first step may have changed it

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        self.average.update(module.model, step=step)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average.load_state_dict(state_dict["average"])


class Pictures(StepCallback):
    """Draws inputs, masked inputs and reconstructions of the same few images at intervals.

    Images were normalised by `mean` and `std`; both are None for arrays in other units.
    """

    def __init__(
        self,
        history: History,
        folder: RunFolder,
        samples: Sequence[dict[str, Any]],
        every_steps: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.history, self.folder = history, folder
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
            output = model(self.images.to(module.device), self.visible)
        model.train()
        add_picture(self.history, self.folder, step, PICTURES, reconstruction_grid(output, self.mean, self.std))


class Checkpoints(TorchCheckpointIO):
    """Writes checkpoints straight to their files, where Lightning goes by way of memory and the temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with opened_for_torch(Path(path)) as file:
            torch.save(checkpoint, file)


def link_or_copy(path: Path, other: Path) -> None:
    """Gives a file another name, or copies it where that is impossible; files are replaced, never written into."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def _bytes_to_save(trainer: pl.Trainer) -> int:
    """Returns the size of a checkpoint: of the model, its average, and what the optimiser keeps."""
    averages = (callback.average.state_dict() for callback in trainer.callbacks if isinstance(callback, Ema))  # type: ignore[attr-defined]
    parts = [trainer.lightning_module.state_dict(), *averages, *trainer.optimizers[0].state.values()]
    return sum(value.nbytes for part in parts for value in part.values() if isinstance(value, Tensor))


class Abandon(BaseException):
    """Leaves training at once, on a second Ctrl-C; Lightning would end the process on a `KeyboardInterrupt`."""


_KEPT = re.compile(r"_best$|_epoch\d+$")
"""Ends of the names of weight files that are not of the last step."""


_SAME_SECONDS = 2
"""A second SIGTERM within this time is the same request."""


class Keeper(StepCallback):
    """Saves checkpoints and weights: every few minutes, at the end, and before leaving on Ctrl-C or SIGTERM.

    A checkpoint is written beside the old one and then replaces it. A second Ctrl-C or SIGTERM leaves at once.
    `write_weights` writes the weight files, given the optimiser steps done. What is saved at multiples of `keep_steps`
    is kept under the number of its epoch. After `max_minutes`, the run ends as after Ctrl-C.
    """

    def __init__(
        self,
        history: History,
        folder: RunFolder,
        minutes: float,
        write_weights: Callable[[int], None],
        monitor: Monitor,
        keep_steps: int | None = None,
        max_minutes: float | None = None,
    ) -> None:
        super().__init__()
        self.keep_steps = keep_steps
        self.limit = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.history = history
        self.folder = folder
        self.minutes = minutes
        self.write_weights = write_weights
        self.monitor = monitor
        self.signal: int | None = None
        self._asked = 0.0
        self._saved = 0.0
        self._listens = self._ended = False
        self._group: Any = None
        self._processes: list[tuple[str, int]] = []  # host and number of each rank's
        self._vote: tuple[Any, Tensor] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved = time.monotonic()
        if trainer.global_step and self._is_kept(trainer.global_step) and trainer.is_global_zero:
            self.write_weights(trainer.global_step)  # it may have been killed after the checkpoint
            self.keep(trainer.global_step)
        if self._listens:  # now, since Lightning has put its own handlers there
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
            self._processes = [("", 0)] * trainer.world_size
            torch.distributed.all_gather_object(self._processes, (socket.gethostname(), os.getpid()), self._group)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Makes Ctrl-C and SIGTERM end training after a step, within the context; then puts handlers back."""
        try:
            before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are somebody else's
            before = {}
        self._listens = bool(before)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def gone(self, seconds: float = 2) -> list[int]:
        """Returns the ranks whose processes on this machine have ended, after waiting that long for one to end."""
        end = time.monotonic() + seconds
        here = [(rank, pid) for rank, (host, pid) in enumerate(self._processes) if host == socket.gethostname()]
        while not (found := [rank for rank, pid in here if not is_running(pid)]) and time.monotonic() < end:
            time.sleep(0.1)
        self._ended = True
        return found

    def _on_signal(self, number: int, frame: Any) -> None:
        first, self._asked = self._asked, time.monotonic()
        if self.signal is not None:
            # torchrun passes on the SIGTERM that a scheduler has sent to all processes: they hear it twice.
            if number == signal.SIGINT or self._asked - first > _SAME_SECONDS:
                raise Abandon
            return
        self.signal = number
        if self._ended:
            return
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                "\nfinishing this step, then saving; press Ctrl-C again to leave at once", file=sys.stderr, flush=True
            )

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        late = time.monotonic() > self.limit
        stop, due = self._agreed(self.signal is not None or late, time.monotonic() - self._saved > 60 * self.minutes)
        kept = self._is_kept(step)
        if step == trainer.max_steps or stop or due or kept:
            self.save(trainer, step)
        if kept and trainer.is_global_zero:
            self.keep(step)
        if step == trainer.max_steps or stop:
            self.history.add("finish" if step == trainer.max_steps else "stop", step)
            trainer.should_stop = self._ended = True

    def _agreed(self, stop: bool, due: bool) -> tuple[bool, bool]:
        """Makes one process's wish all processes' act; clocks and signals differ between them.

        Votes are counted on the CPU while the next step is computed, so that no process waits: they count one step
        later.
        """
        if self._group is None:
            return stop, due
        counted = self._count_votes()
        votes = torch.tensor([stop, due], dtype=torch.uint8)
        work = torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        self._vote = work, votes
        return counted

    def _count_votes(self) -> tuple[bool, bool]:
        if self._vote is None:
            return False, False
        work, votes = self._vote
        self._vote = None
        work.wait()
        return bool(votes[0]), bool(votes[1])

    def save(self, trainer: pl.Trainer, step: int) -> None:
        """Writes checkpoint and weights."""
        self.monitor.check_finite()
        self._count_votes()  # those cast before this save do not ask for another one
        path = self.folder.checkpoint
        if trainer.is_global_zero:
            self.folder.check_there()
        # All ranks take part in a checkpoint; the first writes it.
        with replacing(path, _bytes_to_save(trainer)) if trainer.is_global_zero else nullcontext(path) as partial:
            trainer.save_checkpoint(partial)
            if trainer.is_global_zero and path.is_file():
                with replacing(self.folder.previous) as before:
                    link_or_copy(path, before)
        if trainer.is_global_zero:
            self.write_weights(step)
            self.history.add("checkpoint", step)
        self._saved = time.monotonic()

    def complete(self, step: int) -> None:
        """Writes the weights of a run that was loaded at its last step, and says that it is finished."""
        self.write_weights(step)
        if self._is_kept(step):
            self.keep(step)
        self.history.add("finish", step)

    def _is_kept(self, step: int) -> bool:
        return self.keep_steps is not None and step % self.keep_steps == 0

    def keep(self, step: int) -> None:
        """Gives the files of the last save a second name, with the number of their epoch."""
        epoch = step // self.monitor.plan.steps_per_epoch
        written = [path for path in self.folder.weights.glob("*.safetensors") if not _KEPT.search(path.stem)]
        names = {path: f"{path.stem}_epoch{epoch:04d}{path.suffix}" for path in written}
        for path, name in {**names, self.folder.checkpoint: f"epoch{epoch:04d}.ckpt"}.items():
            with replacing(path.with_name(name)) as partial:
                link_or_copy(path, partial)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._ended and self._seen:  # another callback, such as EarlyStopping, has ended the run
            self.save(trainer, self._seen)
            self.history.add("stop", self._seen)
