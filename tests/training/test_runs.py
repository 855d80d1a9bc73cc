"""What every training does around its steps: history, callbacks and loggers of the user's, signals, and tidying up."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import sparkmim
from interrupting import InterruptAt
from sparkmim.models import Hierarchy
from sparkmim.models.encoders import create_encoder
from sparkmim.results import PretrainResult
from sparkmim.runs.history import read_history, settled_settings
from sparkmim.training.modules import NonFiniteLoss

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")


@pytest.fixture
def settings(small_pretraining: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A pretraining of 12 steps, 3 per epoch."""
    return small_pretraining | {"out": tmp_path / "run", "log_every": 2, "picture_every": 2}


def events(settings: dict[str, Any], *kinds: str) -> list[tuple[str, int]]:
    return [
        (event.kind, event.step) for event in read_history(settings["out"] / "history.jsonl") if event.kind in kinds
    ]


# History


def test_the_history_tells_what_happened(settings: dict[str, Any]) -> None:
    (Path(settings["data"]) / "broken.jpg").write_bytes(b"")
    sparkmim.pretrain(**settings | {"batch_size": 5}, callbacks=[InterruptAt(7)])
    sparkmim.pretrain(out=settings["out"], resume=True)
    assert events(settings, "start", "resume", "stop", "finish") == [
        ("start", 0), ("stop", 7), ("resume", 7), ("finish", 20),
    ]  # fmt: skip
    assert events(settings, "epoch") == [("epoch", step) for step in (5, 10, 15, 20)]
    assert events(settings, "picture") == [("picture", 10), ("picture", 20)]
    assert [step for _, step in events(settings, "step")] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
    found = read_history(settings["out"] / "history.jsonl")
    assert all((settings["out"] / event.fields["file"]).is_file() for event in found if event.kind == "picture")
    unreadable = next(event for event in found if event.kind == "unreadable")
    assert unreadable.fields["image"].endswith("broken.jpg")
    assert unreadable.fields["reason"] == "the file is empty"
    log = (settings["out"] / "log.txt").read_text()
    for said in ("started: 20 steps", "epoch 4/4", "stopped at step 7", "resumed at step 7", "broken.jpg: the file is"):
        assert said in log


def test_what_is_left_open_is_decided_anew_on_another_machine(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begun without bfloat16 goes on in bfloat16 where there is some; what the recipe decided stays."""
    monkeypatch.setattr("sparkmim.machine.has_bfloat16", lambda _: False)
    open_here = {**settings, "precision": "auto", "batch_size": None}
    sparkmim.pretrain(**open_here, callbacks=[InterruptAt(2)])
    asked = yaml.safe_load((settings["out"] / "config.yaml").read_text())
    assert (asked["precision"], asked["accelerator"], asked["batch_size"]) == ("auto", "auto", None)
    assert "batch_size:  # 24" in (settings["out"] / "config.yaml").read_text()
    before = settled_settings(read_history(settings["out"] / "history.jsonl"))
    monkeypatch.setattr("sparkmim.machine.has_bfloat16", lambda _: True)
    sparkmim.pretrain(out=settings["out"], resume=True, batch_size=24)
    after = settled_settings(read_history(settings["out"] / "history.jsonl"))
    assert (before["precision"], after["precision"]) == ("32-true", "bf16-mixed")
    assert before["batch_size"] == after["batch_size"] == 24
    assert yaml.safe_load((settings["out"] / "config.yaml").read_text()) == asked


def test_an_edited_configuration_is_checked(settings: dict[str, Any]) -> None:
    sparkmim.pretrain(**settings, callbacks=[InterruptAt(2)])
    file = settings["out"] / "config.yaml"
    file.write_text(file.read_text().replace("epochs: 4", "epochs: nan"))
    with pytest.raises(ValueError, match="epochs is 'nan'; it must be a finite number, above 0"):
        sparkmim.pretrain(out=settings["out"], resume=True)


# The user's callbacks and loggers


class Epochs(pl.Callback):
    """Notes the ends of epochs and the metrics there."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.metrics: dict[str, float] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.seen.append((trainer.current_epoch, trainer.global_step))
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_lightnings_own_callbacks_find_the_loss(settings: dict[str, Any]) -> None:
    kept = ModelCheckpoint(settings["out"] / "kept", filename="{epoch}-{step}", monitor="loss", save_top_k=2)
    stopping = EarlyStopping("loss", min_delta=100.0, patience=2)
    epochs = Epochs()
    result = sparkmim.pretrain(**settings, callbacks=[epochs, kept, stopping])
    assert epochs.seen == [(0, 3), (1, 6), (2, 9)]  # no epoch is a hundred times better
    assert (result.step, result.finished) == (9, False)
    assert epochs.metrics["loss"] == pytest.approx(result.loss, rel=1e-5)
    assert len(list((settings["out"] / "kept").iterdir())) == 2
    assert events(settings, "stop", "checkpoint") == [("checkpoint", 9), ("stop", 9)]
    rest = sparkmim.pretrain(out=settings["out"], resume=True, callbacks=[epochs])
    assert rest.finished
    assert epochs.seen[3:] == [(3, 12)]


def test_epochs_are_whole_wherever_a_run_is_resumed(settings: dict[str, Any]) -> None:
    first, second = Epochs(), Epochs()
    sparkmim.pretrain(**settings, accumulate=2, callbacks=[InterruptAt(5), first])
    sparkmim.pretrain(out=settings["out"], resume=True, callbacks=[second])
    assert first.seen == [(0, 3), (1, 5)]
    assert second.seen == [(1, 6), (2, 9), (3, 12)]


def test_validation_figures_are_metrics_too(photos: Path, network: str, tmp_path: Path) -> None:
    epochs = Epochs()
    sparkmim.finetune(
        data=str(photos), val_split=0.25, model=network, out=tmp_path / "run", image_size=32, epochs=2, batch_size=6,
        workers=0, ema=0.5, callbacks=[epochs],
    )  # fmt: skip
    figures = {f"val/{average}{name}" for average in ("", "ema_") for name in ("top1", "top5", "loss")}
    assert set(epochs.metrics) == {"loss", *figures}


def test_further_loggers_get_the_same_scalars(settings: dict[str, Any], tmp_path: Path) -> None:
    sparkmim.pretrain(**settings, loggers=["tensorboard", CSVLogger(tmp_path / "csv", name="", version="")])
    lines = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + 8
    assert {"loss", "learning_rate", "images_per_second"} <= set(lines[0].split(","))


# Leaving things as they were


def test_signals_and_generators_are_put_back(settings: dict[str, Any]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    sparkmim.pretrain(**settings | {"epochs": 1})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[2])


class InterruptTwice(pl.Callback):
    """Presses Ctrl-C twice within a step."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)


def test_a_second_interruption_leaves_at_once(settings: dict[str, Any]) -> None:
    """As Python programs do, not by ending the process."""
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        sparkmim.pretrain(**settings, callbacks=[InterruptTwice()])
    assert signal.getsignal(signal.SIGINT) == handler


class Hangs:
    """Pictures, the last of which takes a minute to read in a loader worker, in a library that hears no signal."""

    def __init__(self, reading: Path) -> None:
        self.reading = reading

    def __len__(self) -> int:
        return 24

    def __getitem__(self, place: int) -> Any:
        if place == 23 and multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(2)  # the steps before are over by then
            self.reading.touch()
            time.sleep(60)
        return torch.full((3, 40, 40), place, dtype=torch.uint8)


def test_a_second_sigterm_ends_a_run_that_waits_for_a_worker(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first waits for the step to end, and one that comes at once is taken for the same."""
    pauses: list[float] = []

    def ask() -> None:
        while not (tmp_path / "reading").exists():
            time.sleep(0.02)
        for pause in (0.1, 0.1, 3.0):
            time.sleep(pause)
            pauses.append(pause)
            os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(KeyboardInterrupt):
        sparkmim.pretrain(**settings | {"data": Hangs(tmp_path / "reading"), "workers": 1})
    assert len(pauses) == 3
    asking.join()
    assert not multiprocessing.active_children()  # nobody is left behind


def test_a_killed_worker_is_named(settings: dict[str, Any]) -> None:
    """As the system does where memory runs out."""

    class KillWorker(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                (worker,) = multiprocessing.active_children()
                worker.kill()

    killed = "a loader worker was killed, .* use fewer --workers or a smaller batch, then continue with --out .*run --r"
    with pytest.raises(sparkmim.UserError, match=killed):
        sparkmim.pretrain(**settings | {"workers": 1, "save_minutes": 1e-9}, callbacks=[KillWorker()])
    assert sparkmim.pretrain(out=settings["out"], resume=True).finished


def test_parameters_are_thawed_after_divergence(settings: dict[str, Any], network: str) -> None:
    class Break(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            with torch.no_grad():
                next(module.parameters()).fill_(float("nan"))

    encoder = create_encoder(network)
    with pytest.raises(NonFiniteLoss):
        sparkmim.pretrain(**settings | {"model": encoder}, callbacks=[Break()])
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_a_result_is_short_at_a_prompt(settings: dict[str, Any]) -> None:
    result = sparkmim.pretrain(**settings | {"epochs": 1})
    assert isinstance(result, PretrainResult)
    assert len(repr(result)) < 300


# Finding feature maps


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_weights_find_feature_maps_once(
    settings: dict[str, Any], command: str, photos: Path, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparkmim.pretrain(**settings | {"epochs": 1})
    found: list[nn.Module] = []
    find = Hierarchy.__init__

    def counting(self: Hierarchy, encoder: nn.Module, *args: Any, **kwargs: Any) -> None:
        found.append(encoder)
        find(self, encoder, *args, **kwargs)

    monkeypatch.setattr(Hierarchy, "__init__", counting)
    again = {**settings, "out": tmp_path / "again", "epochs": 1}
    if command == "pretrain":
        sparkmim.pretrain(**again, init_weights=settings["out"])
    else:
        sparkmim.finetune(data=str(photos), val_split=0.25, weights=settings["out"], out=tmp_path / "again", epochs=1,
                          batch_size=6, workers=0)  # fmt: skip
    assert len(found) == 1
