"""What the trainings share around their models: where they run, how long, the trainer, and resuming."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import Dataset

from sparkmim.data import SkipLog, collate
from sparkmim.data.loading import make_loader
from sparkmim.data.samplers import StepBatchSampler
from sparkmim.errors import UserError
from sparkmim.machine import has_bfloat16, is_main_process, keep_freed_memory
from sparkmim.runs.environment import environment
from sparkmim.runs.folder import RunFolder, log_to
from sparkmim.runs.report import renew_report
from sparkmim.training.batch_norm import synchronised_batch_norm
from sparkmim.training.modules import ScheduledModule

log = logging.getLogger("sparkmim")


@dataclass(frozen=True)
class Plan:
    """How much is done, and by how many processes.

    Attributes:
        world_size: processes in all.
        devices: per machine, for Lightning.
        parts: batches that make up an optimiser step on each process.
        batch_size: images per optimiser step, over all processes.
        steps_per_epoch: optimiser steps.
        steps: of the whole run.
    """

    world_size: int
    devices: int | str
    parts: int
    batch_size: int
    steps_per_epoch: int
    steps: int


def settle_machine(settings: dict[str, Any]) -> None:
    """Fills what was left to the machine: `accelerator`, `precision`, `workers`."""
    if settings["accelerator"] == "auto":
        settings["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
    if settings["precision"] == "auto":
        settings["precision"] = "bf16-mixed" if has_bfloat16(settings["accelerator"]) else "32-true"
    if settings["workers"] is None:
        settings["workers"] = max(1, (os.cpu_count() or 2) - 1) if settings["accelerator"] == "cuda" else 2
    if settings["accelerator"] == "cpu":
        keep_freed_memory()


def plan_for(settings: dict[str, Any], batch_is_free: bool, images: int) -> Plan:
    """Settles the batch size and counts steps, by `epochs` or, where there are some, `iterations`.

    Raises:
        ValueError: if the batch size cannot be met.
    """
    world_size, devices = devices_for(settings)
    parts = settings["accumulate"]
    batch_size = batch_size_for(settings["batch_size"], batch_is_free, images, world_size, parts)
    settings["batch_size"] = batch_size
    steps_per_epoch = images // batch_size
    steps = settings.get("iterations") or max(1, round(settings["epochs"] * steps_per_epoch))
    return Plan(world_size, devices, parts, batch_size, steps_per_epoch, steps)


def batch_size_for(size: int, free: bool, images: int, world_size: int, parts: int) -> int:
    """Checks the images per step; a recipe's, free to change, shrinks to what there is."""
    unit = parts * world_size
    if free:
        size = max(1, min(size, images) // unit) * unit
    if size > images:
        raise UserError(f"batch_size {size} is more than the {images} images there are; use {images} or less")
    if size % unit:
        raise UserError(
            f"batch_size {size} does not divide into {world_size} process(es) × {parts} accumulation step(s); "
            f"use {max(1, size // unit) * unit}"
        )
    return size


def devices_for(settings: dict[str, Any]) -> tuple[int, int | str]:
    """Number of processes in all, and per node for Lightning."""
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun
        settings["num_nodes"] = int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
        return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    devices = settings["devices"]
    if devices == "auto":
        devices = torch.cuda.device_count() if settings["accelerator"] == "cuda" else 1
    return int(devices) * settings["num_nodes"], int(devices)


def begun(settings: dict[str, Any], given: Set[str], folder: RunFolder, may_change: Set[str]) -> dict[str, Any]:
    """The settings of a run that starts in a new folder, or goes on in its own.

    Raises:
        ValueError: if the folder holds something else, or what was given does not agree with what stands there.
    """
    if settings["resume"]:
        settings = resumed(settings, given, folder.read_config(), may_change)
        if not folder.checkpoint.is_file():
            raise UserError(f"{folder.path} has no checkpoint to resume from; start anew with another --out")
    elif is_main_process():
        folder.check_new()
    return settings


def resumed(settings: dict[str, Any], given: Set[str], saved: dict[str, Any], may_change: Set[str]) -> dict[str, Any]:
    """The saved settings; what was given now must agree with them, or be free to change.

    Raises:
        ValueError: if it does neither.
    """
    objects = set(saved.get("from_python") or ())  # these are given again
    free = may_change | objects
    given = {name for name in given & settings.keys() if not _is_open(settings[name])}  # callbacks are no setting
    clash = [name for name in settings if name in given - free and not _same(settings[name], saved.get(name))]
    if clash:
        shown = ", ".join(f"{name} is {saved.get(name)} there and {settings[name]} here" for name in clash)
        raise UserError(f"the run in {settings['out']} has other settings: {shown}; leave them out to resume it")
    for name in sorted(objects - given):
        raise UserError(f"the run in {settings['out']} was started from Python objects; pass {name} again to resume")
    saved = {name: value for name, value in saved.items() if name in settings}
    return {**saved, **{name: settings[name] for name in given & free}, "out": settings["out"], "resume": True}


def _is_open(given: Any) -> bool:
    """Whether a value leaves the decision to others."""
    return given is None or (isinstance(given, str) and given == "auto")


def _same(given: Any, saved: Any) -> bool:
    if isinstance(given, int) and isinstance(saved, list):
        return saved == [given] * len(saved)
    return bool(given == saved or (isinstance(given, tuple) and list(given) == saved) or str(given) == str(saved))


def fit(
    settings: dict[str, Any],
    module: ScheduledModule,
    dataset: Dataset[Any],
    plan: Plan,
    folder: RunFolder,
    callbacks: Sequence[pl.Callback],
    say: Callable[[], None],
    repeats: int = 1,
    collate_fn: Callable[[Any], dict[str, Any]] = collate,
    precision: str | None = None,
) -> pl.Trainer:
    """Trains, from the start or from the last checkpoint, and leaves a run folder.

    Args:
        settings: in force; saved in the run folder.
        module: what is trained.
        dataset: indexed by `(epoch, index)`.
        plan: how much.
        folder: of the run.
        callbacks: in the order in which they act.
        say: prints the settings, when the trainer has been made.
        repeats: times that each image stands in a row in the order of an epoch, with other augmentation each time.
        collate_fn: makes a batch of samples.
        precision: of everything; None for that of the settings.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        _silence_what_is_meant(warnings)
        trainer = pl.Trainer(
            accelerator=settings["accelerator"],
            devices=plan.devices,
            num_nodes=settings["num_nodes"],
            strategy="ddp" if plan.world_size > 1 else "auto",
            precision=precision or settings["precision"],  # type: ignore[arg-type]
            max_steps=plan.steps,
            max_epochs=-1,
            accumulate_grad_batches=plan.parts,
            use_distributed_sampler=False,
            logger=TensorBoardLogger(folder.path, name="tensorboard", version=""),
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        if trainer.is_global_zero:
            # Python objects have no place in a file; resuming asks for them again.
            objects = [name for name in ("model", "data", "val_data") if _is_object(settings.get(name))]
            asked = {**settings, "resume": False}
            folder.write_config(asked, asked, objects)
            folder.write_environment(environment(settings["accelerator"], plan.world_size), settings["resume"])
            say()
        _, handler = log_to(folder.log) if trainer.is_global_zero else (None, logging.NullHandler())
        log.info("%s: %d steps in all", "resumed" if settings["resume"] else "started", plan.steps)
        sampler = StepBatchSampler(
            len(dataset), plan.batch_size, plan.parts, trainer.global_rank, trainer.world_size, settings["seed"],  # type: ignore[arg-type]
            position=lambda: trainer.global_step, repeats=repeats,
        )  # fmt: skip
        loader = make_loader(
            dataset, sampler, settings["workers"], pin_memory=settings["accelerator"] == "cuda", collate_fn=collate_fn
        )
        over_gpus = plan.world_size > 1 and settings["accelerator"] == "cuda"
        module.train()  # Lightning leaves it as it is, and what was loaded is in evaluation mode
        try:
            checkpoint = folder.checkpoint if settings["resume"] else None
            with synchronised_batch_norm(module) if over_gpus else nullcontext():
                trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
        finally:
            gc.collect()  # lets go of the loader's iterator, and with it of the workers
            log.removeHandler(handler)
            handler.close()
    return trainer


def network_text(settings: dict[str, Any], model: nn.Module) -> str:
    """A network in words: its name, its size, and where its weights are from."""
    name = settings["model"] if isinstance(settings["model"], str) else type(settings["model"]).__name__
    origin = "scratch" if settings["weights"] == "none" else settings["weights"]
    return f"{name}, {millions(model):.1f} M parameters, from {origin}"


def millions(module: nn.Module) -> float:
    """Parameters in millions."""
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def say_settings(console: Console, settings: dict[str, Any], rows: Mapping[str, str]) -> None:
    """Prints settings in force, a row each; those of the machine last."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    device = (
        f"{settings['accelerator']}, {settings['precision']}, {settings['workers']} loader workers, "
        f"seed {settings['seed']}"
    )
    for key, value in {**rows, "device": device, "run folder": str(settings["out"])}.items():
        table.add_row(f"[bold]{key}", value)
    console.print(table)


def say_end(console: Console, folder: RunFolder, trainer: pl.Trainer, plan: Plan, skipped: SkipLog, *done: Any) -> None:
    """Says how a run went, on the main process: what is given if it is finished, or else how to go on."""
    if not trainer.is_global_zero:
        return
    if trainer.global_step >= plan.steps:
        for line in done:
            console.print(line)
    else:
        step = f"step {trainer.global_step} of {plan.steps}"
        console.print(f"stopped at {step}; continue with --out {folder.path} --resume")
    if skipped.count:
        console.print(f"{skipped.count} unreadable image(s) were skipped; they are named in {folder.log}")
    say_report(console, folder)


def say_report(console: Console, folder: RunFolder) -> None:
    """Writes the report of a run that is over, and says where it is."""
    if path := renew_report(folder.path):
        console.print(f"report: {path}", soft_wrap=True, markup=False)


def _is_object(value: Any) -> bool:
    return value is not None and not isinstance(value, str)


def _silence_what_is_meant(where: Any) -> None:
    """Lightning's advice that does not apply; the stream of batches has no length by design."""
    for message in (
        r".*does not have many workers.*", r".*`max_epochs`.*", r".*Checkpoint directory.*exists and is not empty.*",
        r".*GPU available but not used.*", r".*`LeafSpec` is deprecated.*", r".*isinstance\(treespec, LeafSpec\).*",
        r".*in eval mode at the start of training.*",  # frozen stages
    ):  # fmt: skip
        where.filterwarnings("ignore", message=message)
