"""The training that all commands share, from arguments to a finished run."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic
from zipfile import ZipFile

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sparkmim.arguments import check_arguments
from sparkmim.data.dataset import collate
from sparkmim.data.decoding import images_up_to
from sparkmim.data.loading import make_loader
from sparkmim.data.problems import counted
from sparkmim.data.samplers import StepBatchSampler
from sparkmim.data.skip_log import SkipLog
from sparkmim.errors import UserError
from sparkmim.evaluation.scores import known_figures
from sparkmim.failures import Killed, told
from sparkmim.files import are_paths
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.machine import generators_restored, is_main_process
from sparkmim.runs.config import ONCE, open_value
from sparkmim.runs.environment import environment
from sparkmim.runs.folder import RunFolder
from sparkmim.runs.history import Event, History, Kind, beginnings, logged, read_history, settled_settings
from sparkmim.runs.remembered import TrainingImages
from sparkmim.runs.report import renew_report
from sparkmim.terminal import Terminal
from sparkmim.training.batch_norm import synchronised_batch_norm
from sparkmim.training.callbacks import Abandon, Checkpoints, Ema, Keeper, LoggerFeed, Monitor, Pictures, ProgressBar
from sparkmim.training.loggers import check_loggers, close, identifiers, log_settings, make_loggers
from sparkmim.training.modules import ScheduledModule, own_tensors
from sparkmim.training.plan import Plan
from sparkmim.training.probing import Probe
from sparkmim.training.scoring import Scorer
from sparkmim.training.settings import MACHINE, OBJECTS, S, TrainSettings, check_saved, plain, resumed
from sparkmim.trust import check_trusted

log = logging.getLogger("sparkmim")


@dataclass
class Prepared(Generic[S]):
    """All that differs between trainings.

    Attributes:
        settings: of the training, with all that network and data decided.
        module: what is trained.
        dataset: training set, indexed by `(epoch, index)`.
        plan: length of the run.
        metadata: of the weight files.
        file: name of the weight file; None for those of pretraining.
        rows: settings in words, to be printed.
        before: what comes before the first step.
        scorer: scores the model while it is trained.
        probe: scores its frozen features.
        keep_best: whether weights are written whenever the probe is better than before.
        pictures: makes the callback that draws reconstructions.
        repeats: times that each image stands in a row in the order of an epoch, with other augmentation each time.
        collate: makes a batch of samples.
        precision: of everything; None for that of the settings.
    """

    settings: S
    module: ScheduledModule
    dataset: Dataset[Any]
    plan: Plan
    metadata: WeightsMetadata
    rows: Mapping[str, str]
    file: str | None = None
    before: pl.Callback | None = None
    scorer: Scorer[Any] | None = None
    probe: Probe | None = None
    keep_best: bool = False
    pictures: Callable[[History, RunFolder], Pictures] | None = None
    repeats: int = 1
    collate: Callable[[Any], dict[str, Any]] = collate
    precision: str | None = None


class Training(ABC, Generic[S]):
    """One of the four trainings: how its settings are settled, and what it trains."""

    kind: type[S]
    """Its settings."""

    @abstractmethod
    def settle(self, asked: Mapping[str, Any], before: Mapping[str, Any], start: Weights | None) -> S:
        """Settles what arguments, recipe, weights and machine decide.

        `before` holds settings as a resumed run had settled them.
        """

    @abstractmethod
    def prepare(self, settings: S, batch_is_free: bool, start: Weights | None, console: Terminal) -> Prepared[S]:
        """Opens the data and builds the model, with the pretrained weights in it.

        `batch_is_free` tells whether the batch size may shrink to the images there are.
        """


@dataclass(frozen=True)
class Finished(Generic[S]):
    """A run that has ended, by itself or on request; `main` tells whether this process speaks for all."""

    prepared: Prepared[S]
    folder: RunFolder
    step: int
    monitor: Monitor
    main: bool

    @property
    def model(self) -> nn.Module:
        """The trained model, in evaluation mode."""
        return self.prepared.module.model.eval()

    @property
    def scores(self) -> Any:
        """The last scores, of the average where there is one; None if nothing was scored."""
        last = {} if self.prepared.scorer is None else self.prepared.scorer.last
        return last.get("ema", last.get("model"))

    @property
    def figures(self) -> dict[str, float]:
        """Figures of the last scores."""
        return {} if self.scores is None else self.scores.figures


def scored(finished: Finished[Any]) -> list[Any]:
    """Returns the last scores as a table, and where weights and figures are."""
    table = [] if finished.scores is None else [finished.scores.table()]
    return [*table, f"done: weights in {finished.folder.weights}, figures in metrics.json beside them"]


def train(
    training: Training[S],
    asked: Mapping[str, Any],
    given: frozenset[str],
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Any] = (),
    draw: Callable[[Finished[S]], Sequence[Any]] = lambda finished: (),
) -> Finished[S]:
    """Trains, from the start or from the last checkpoint, and leaves a run folder.

    Args:
        training: which of the four.
        asked: arguments of the command.
        given: names of the arguments passed explicitly.
        callbacks: further Lightning callbacks.
        loggers: Lightning loggers, beside those that the settings name.
        draw: called at the end of a finished run, for what it leaves; returns what is printed.

    Raises:
        UserError: if an argument cannot be met; nothing is written then.
        NonFiniteLoss: if training diverges.
    """
    console = Terminal(quiet=not is_main_process())
    if strange := [callback for callback in callbacks if not isinstance(callback, pl.Callback)]:
        raise UserError(f"callbacks holds {strange[0]!r}; they are Lightning's, of class Callback")
    folder = RunFolder(asked["out"])
    with generators_restored():
        resume = asked["resume"]
        asked, before = begin(training.kind, asked, given, folder)
        check_loggers(asked["loggers"])
        start = _start_of(asked)
        settings = training.settle(asked, before, start)
        torch.manual_seed(settings.seed)
        batch_is_free = asked["batch_size"] is None and "batch_size" not in before
        with images_up_to(settings.max_megapixels):  # of the run's own settings, if it is resumed
            prepared = training.prepare(settings, batch_is_free, start, console)
            with told(folder.path), folder.locked() if is_main_process() else nullcontext():
                if is_main_process():
                    folder.tidy()
                    if not asked["resume"]:
                        folder.check_new()  # another run may have begun there meanwhile
                        if resume:
                            console.print(f"{folder.path} has no checkpoint yet; the run starts over", soft_wrap=True)
                        folder.clear()
                with told(folder.path, lambda: _after(folder)), _silent_threads():
                    finished = _fit(prepared, asked, folder, callbacks, loggers, console)
    if finished.main:
        _say_end(console, finished, draw)
    return finished


def _after(folder: RunFolder) -> str:
    """Returns how a run goes on after an accident, if it can; raises a `UserError` if its folder is gone."""
    if not folder.path.exists():
        folder.check_there()
    return f"continue with --out {folder.path} --resume" if folder.has_checkpoint else ""


@contextmanager
def _silent_threads() -> Iterator[None]:
    """Keeps errors of the file system quiet in threads, such as TensorBoard's; who waits for these raises them."""
    before = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        if not isinstance(found.exc_value, OSError):
            before(found)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def begin(
    kind: type[TrainSettings], asked: Mapping[str, Any], given: frozenset[str], folder: RunFolder
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns the arguments of a run that starts in a new folder or goes on in its own, and its settings so far."""
    if not asked["resume"]:
        if is_main_process():
            folder.check_new()
        return asked, {}
    saved = folder.read_config()
    settled = settled_settings(read_history(folder.history)) if folder.history.is_file() else {}
    objects = saved.pop("from_python", ())
    check_saved(kind, saved, folder.config)
    asked = resumed(kind, asked, given, saved, settled, objects)
    check_arguments(kind.command(), asked)  # the file may have been edited
    if "model" not in given:
        for named in (asked["model"], settled.get("model")):
            check_trusted(named, f"the run in {folder.path}")
    if not folder.has_checkpoint:
        if not folder.may_start_over:
            raise UserError(f"{folder.path} has no checkpoint to resume from; start anew with another --out")
        return {**asked, "resume": False}, {}
    changed = {name for name in given & asked.keys() if not open_value(name, asked[name])}
    known = {
        name: value for name, value in settled.items()
        if name not in {*MACHINE, *OBJECTS, "out", *ONCE} and name not in changed
    }  # fmt: skip
    return asked, known


def _start_of(asked: Mapping[str, Any]) -> Weights | None:
    """Weights to start from; None from scratch, and for a run that goes on."""
    path = asked["weights" if "weights" in asked else "init_weights"]
    return None if asked["resume"] or path in (None, "none") else open_weights(path)


def _fit(
    prepared: Prepared[S],
    asked: Mapping[str, Any],
    folder: RunFolder,
    callbacks: Sequence[pl.Callback],
    loggers: Sequence[Any],
    console: Terminal,
) -> Finished[S]:
    settings, module, plan = prepared.settings, prepared.module, prepared.plan
    cuda = settings.accelerator == "cuda"
    main = is_main_process()
    history = History(folder.history if main else None)
    images: Any = prepared.dataset
    skipped = SkipLog(settings.max_unreadable, epoch_size=len(images))
    monitor = Monitor(history, plan, settings.log_every, folder.checkpoint, skipped)
    ema = Ema(module, settings.ema) if settings.ema else None
    every = getattr(settings, "keep_every", None)
    keep_steps = None if every is None else every * plan.steps_per_epoch
    write = _writer(prepared, folder, ema, history)
    keeper = Keeper(history, folder, settings.save_minutes, write, monitor, keep_steps, settings.max_minutes)
    pictures = prepared.pictures(history, folder) if prepared.pictures else None
    # The monitor comes first: it refuses weights that are spoilt.
    own = [monitor, prepared.before, pictures, ema, prepared.scorer, prepared.probe]
    together = [*(callback for callback in own if callback), *callbacks, keeper]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    past = read_history(folder.history) if settings.resume and folder.history.is_file() else []
    known = {name: found for event in beginnings(past) for name, found in event.fields.get("loggers", {}).items()}
    own_loggers = make_loggers(settings.loggers, folder, known)
    loggers = [*own_loggers, *loggers]
    with ExitStack() as stack:
        stack.enter_context(_intended())
        stack.enter_context(keeper.signals())
        seen = TrainingImages.of(len(images), images.image_names(settings.data))
        if settings.resume and not asked["accept_changed_data"]:
            before = beginnings(past)[-1].fields.get("data", {}) if past else {}
            seen.check_unchanged(folder, before)
        trainer = pl.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy="ddp" if plan.world_size > 1 else "auto",
            precision=prepared.precision or settings.precision,  # type: ignore[arg-type]
            max_steps=plan.steps,
            max_epochs=-1,
            limit_train_batches=plan.steps_per_epoch * plan.parts,
            accumulate_grad_batches=plan.parts,
            use_distributed_sampler=False,
            default_root_dir=folder.path,
            logger=loggers,
            callbacks=together,
            plugins=[Checkpoints()],
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        checkpoint, step = _last_checkpoint(folder, module, console) if settings.resume else (None, 0)
        if plan.steps < step:
            raise UserError(
                f"the run in {folder.path} stands at step {step}, and epochs {settings.epochs:g} are {plan.steps} "
                f"steps; give {step / plan.steps_per_epoch:.4g} epochs or more"
            )
        if main:
            settled, found = _write_start(settings, asked, folder)
            _say_settings(console, settings, prepared.rows)
            _say_length(console, module, past, step)
            stack.enter_context(logged(history, folder.log, lambda: trainer.global_step))
            began: Kind = "resume" if settings.resume else "start"
            stack.callback(close, own_loggers)
            if not settings.resume:  # MLflow refuses other values for those that it has
                log_settings(loggers, settled)
            named = identifiers(own_loggers)
            history.add(
                began, step, steps=plan.steps, settings=settled, environment=found, loggers=named,
                data=seen.summary,
            )  # fmt: skip
            seen.write(folder)
            for key, value in prepared.rows.items():
                log.info("%s: %s", key, value)
            history.listeners.append(LoggerFeed(trainer, folder))
            if console.is_terminal:
                bar = ProgressBar(console, plan, step)
                history.listeners.append(bar)
                stack.enter_context(bar.progress)
        sampler = StepBatchSampler(
            len(images), plan.batch_size, plan.parts, trainer.global_rank, trainer.world_size, settings.seed,
            position=lambda: trainer.global_step, repeats=prepared.repeats,
        )  # fmt: skip
        loader = make_loader(prepared.dataset, sampler, settings.workers, pin_memory=cuda, collate_fn=prepared.collate)
        module.train()  # Lightning leaves it as it is, and what was loaded is in evaluation mode
        batches = Endless(loader)
        stack.callback(batches.close)
        stack.enter_context(module.frozen())
        stack.enter_context(synchronised_batch_norm(module, cuda) if plan.world_size > 1 else nullcontext())
        monitor.epoch_loss = next(
            (event.fields["loss"] for event in reversed(past) if event.kind == "epoch"), monitor.epoch_loss
        )
        try:
            trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
        except Abandon:
            raise KeyboardInterrupt from None
        except RuntimeError as error:
            if plan.world_size == 1 or isinstance(error, UserError) or not (gone := keeper.gone()):
                raise
            raise Killed(
                f"the process of rank {', '.join(map(str, gone))} is gone, of {plan.world_size}, as happens where "
                f"memory runs out; {_after(folder) or 'start the run again'}"
            ) from error
        if step == plan.steps and main:  # it was finished before, or stopped between its last files
            keeper.complete(step)
    return Finished(prepared, folder, trainer.global_step, monitor, trainer.is_global_zero)


class Endless:
    """Batches of a loader without an end, cut into epochs: each epoch goes on where the one before stopped.

    Lightning asks for an iterator in every epoch. It gets the same one, so that loader workers go on reading ahead.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._batches is None:
            self._batches = iter(self.loader)
        return self._batches

    def close(self) -> None:
        """Ends the loader workers. Lightning keeps the loader, and they would be waited for when Python exits."""
        workers = getattr(self._batches, "_workers", ())
        self._batches = None
        gc.collect()  # lets go of the iterator, which asks them to end
        for worker in workers:
            if worker.is_alive():  # busy in a library that hears no request
                worker.kill()


def _writer(prepared: Prepared[S], folder: RunFolder, ema: Ema | None, history: History) -> Callable[[int], None]:
    """Returns what writes the weight files of a step; connects the scorer, which writes those of the best ones."""
    scorer = prepared.scorer

    def write(model: Any, suffix: str, figures: dict[str, float], step: int | None = None) -> None:
        metadata = replace(prepared.metadata, figures=figures, step=step)
        if prepared.file is None:
            weights.save(model, folder.weights, metadata, suffix)
        else:
            weights.write(model, folder.weights / prepared.file.replace(".", f"{suffix}."), metadata)

    def write_step(step: int) -> None:
        last, step_known = ({}, step) if scorer is None else (scorer.last, None)
        figures = {name: known_figures(scores) for name, scores in last.items()}
        write(prepared.module.model, "", figures.get("model", {}), step_known)
        if ema is not None:
            write(ema.average.module, "_ema", figures.get("ema", {}), step_known)
        if scorer is not None:
            scorer.write(folder.path)

    def write_better(model: Any, name: str, figures: dict[str, float]) -> None:
        write(model, "_ema_best" if name == "ema" else "_best", figures)

    length = prepared.plan.steps_per_epoch
    if scorer is not None:
        every = getattr(prepared.settings, "eval_every", 1.0)
        scorer.attach(history, folder, max(1, round(every * length)), ema, write)
    if prepared.probe is not None:
        prepared.probe.attach(history, ema, length, write_better if prepared.keep_best else None)
    return write_step


def _write_start(
    settings: TrainSettings, asked: Mapping[str, Any], folder: RunFolder
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes arguments and environment into the run folder; returns settings and environment as plain values."""
    values = {name: plain(asked.get(name)) for name in OBJECTS}
    objects = [name for name, value in values.items() if not isinstance(value, str | None) and not are_paths(value)]
    settled = {name: None if name in objects else value for name, value in vars(settings).items()}
    kept = {name: None if name in objects else plain(value) for name, value in asked.items()}
    folder.write_config({**kept, **dict.fromkeys(ONCE, False)}, settled, objects)
    found = environment(settings.accelerator, settings.world_size)
    folder.write_environment(found, settings.resume)
    return settled, found


def _last_checkpoint(folder: RunFolder, module: ScheduledModule, console: Terminal) -> tuple[Path, int]:
    """Returns the last checkpoint that is whole, and the optimiser steps done then.

    Raises:
        UserError: if neither the last nor the one before is whole, or it is of another network or optimiser.
    """
    for path in (folder.checkpoint, folder.previous):
        try:
            with ZipFile(path) as parts:
                damaged = parts.testzip()  # PyTorch reads parts without comparing their checksums
            found: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            step = int(found["global_step"])
            of_groups = [len(group["params"]) for group in found["optimizer_states"][0]["param_groups"]]
            shapes = {name: value.shape for name, value in own_tensors(found["state_dict"]).items()}
            complete = {"loops", "lr_schedulers", "callbacks", "pytorch-lightning_version"} <= found.keys()
        except Exception:  # whatever PyTorch raises at a damaged file
            continue
        if damaged or not complete:
            continue
        with module.frozen():
            own_groups = [len(group["params"]) for group in module.parameter_groups()]
        if of_groups != own_groups or shapes != {name: value.shape for name, value in module.state_dict().items()}:
            raise UserError(f"{path} is of another network or training than {folder.config.name} beside it names; put "
                            "the right one back, or start anew with another --out")  # fmt: skip
        if path == folder.previous:
            console.print(
                f"{folder.checkpoint} is damaged or missing; the run goes on from step {step}",
                soft_wrap=True,
            )
        return path, step
    raise UserError(f"{folder.checkpoint} cannot be read, nor the one before; start anew with another --out")


@contextmanager
def _intended() -> Iterator[None]:
    """Silences Lightning's advice that does not apply; the stream of batches has no length by design."""
    with warnings.catch_warnings():
        for message in (
            r".*does not have many workers.*", r".*`max_epochs`.*", r".*GPU available but not used.*",
            r".*Checkpoint directory.*exists and is not empty.*",
            r".*`LeafSpec` is deprecated.*", r".*isinstance\(treespec, LeafSpec\).*",
            r".*in eval mode at the start of training.*",  # frozen stages
            r".*your dataloader is not resumable.*",  # it starts where the run stands
            r".*Grad strides do not match bucket view strides.*", r".*sync_dist=True.*",  # of several processes
            r".*callbacks used to create the checkpoint need to be provided.*",  # the user's may differ
        ):  # fmt: skip
            warnings.filterwarnings("ignore", message=message)
        yield


# What is said


def network_text(settings: TrainSettings, model: nn.Module) -> str:
    """Returns a network in words: its name, its size, and where its weights are from."""
    origin = getattr(settings, "weights", "none")
    name = settings.model_name or type(settings.model).__name__
    return f"{name}, {millions(model):.1f} M parameters, from {'scratch' if origin == 'none' else origin}"


def millions(module: nn.Module) -> float:
    """Returns the number of parameters in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def _say_settings(console: Terminal, settings: TrainSettings, rows: Mapping[str, str]) -> None:
    """Prints settings, a row each; those of the machine last."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    workers = counted(settings.workers, "loader worker")
    device = f"{settings.accelerator}, {settings.precision}, {workers}, seed {settings.seed}"
    for key, value in {**rows, "device": device, "run folder": settings.out}.items():
        table.add_row(key, value)
    console.print(table)


def _say_length(console: Terminal, module: ScheduledModule, past: Sequence[Event], step: int) -> None:
    """Says what becomes of the learning rate, if a resumed run is to have another length than before."""
    before = next((event.fields["steps"] for event in reversed(beginnings(past)) if event.fields["steps"]), None)
    stood = next((event.fields["learning_rate"] for event in reversed(past) if event.kind == "step"), None)
    steps = module.settings.steps
    if before is None or stood is None or before == steps:
        return
    rates = f"its learning rate goes from {stood:.3g} to {module.rate_at(step):.3g}"
    console.print(f"the run has {steps} steps now, instead of {before}: {rates}")


def _say_end(console: Terminal, finished: Finished[S], draw: Callable[[Finished[S]], Sequence[Any]]) -> None:
    """Says how a run went: what it leaves if it is finished, or else how to go on."""
    folder, plan = finished.folder, finished.prepared.plan
    left = draw(finished)
    if finished.step >= plan.steps:
        for line in left:
            console.print(line)
    else:
        console.print(f"stopped at step {finished.step} of {plan.steps}; continue with --out {folder.path} --resume")
    if count := len(finished.monitor.skipped.unique):
        console.print(f"{counted(count, 'unreadable image')} skipped; {folder.log} names them")
    if path := renew_report(folder.path):
        console.print(f"report: {path}", soft_wrap=True)
