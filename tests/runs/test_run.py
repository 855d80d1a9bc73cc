"""What a run folder tells, whether its history or an earlier version wrote it."""

from __future__ import annotations

import io
import json
import os
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from runs_written import ENVIRONMENT, LOSSES, SETTINGS, START, append, event, grid, start, write_run
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sparkmim.runs.folder import PICTURES, RunFolder
from sparkmim.runs.history import Event
from sparkmim.runs.report import write_report
from sparkmim.runs.run import Run

LATER = datetime.fromtimestamp(2e9).astimezone()


def resume(step: int) -> tuple[datetime, Event]:
    """When a resumed process would have begun, and the event of its resumption on another machine, at `LATER`."""
    machine = {**ENVIRONMENT, "date": LATER.isoformat(), "gpus": ["Slide Rule"] * 2, "processes": 2}
    begun, settings = LATER - timedelta(seconds=step), {**SETTINGS, "accelerator": "cuda"}
    return begun, event("resume", step, begun, steps=60, settings=settings, environment=machine)


def test_a_history(tmp_path: Path) -> None:
    """Killed at step 40, resumed from step 25 elsewhere, and stopped."""
    begun, resumed = resume(25)
    steps = [event("step", step, loss=loss, epoch=1.0) for step, loss in {10: 1.0, 20: 0.9, 30: 0.8, 40: 7.0}.items()]
    early = [event("validation", step, weights="ema", figures={"bbox/AP": step / 100}) for step in (20, 40)]
    later = [
        event("step", 50, begun, loss=0.6, epoch=2.0),
        event("validation", 50, begun, weights="ema", figures={"bbox/AP": 0.5, "mIoU": float("nan")}),
        event("validation", 50, begun, weights="model", figures={"top1": 0.25}),
    ]
    lost = event("unreadable", 35, image="a.jpg", reason="cut", part="training")
    run = write_run(tmp_path / "run", events=[start(60), *steps, *early, lost, resumed, *later])
    read = Run.read(run)
    assert read.curves["loss"].steps == [10, 20, 50]
    assert read.curves["loss"].values == [1.0, 0.9, 0.6]
    assert read.curves["loss"].times == [1e9 + 10, 1e9 + 20, 2e9 + 25]
    assert read.curves["val/ema_bbox/AP"].values == [0.2, 0.5]
    assert read.curves["val/top1"].values == [0.25]
    assert (read.step, read.steps, read.state) == (50, 60, "at step 50 of 60")
    assert (read.started, read.seconds) == (START, 20 + 25)
    assert read.unreadable == ["a.jpg: cut"]
    assert (read.asked["accelerator"], read.settings["accelerator"]) == ("cpu", "cuda")
    append(run, event("stop", 55, begun))
    assert Run.read(run).state == "stopped at step 55 of 60"
    with RunFolder(run).history.open("a") as file:
        file.write('{"time": "20')  # a process is writing this line
    assert Run.read(run).state == "stopped at step 55 of 60"
    assert "Resumed 2033-05-1" in write_report(run).read_text()


def write_tensorboard(run: Path, losses: dict[int, float], pictures: dict[int, Tensor], at: float = 1e9) -> None:
    """Event files of a process that began at a time and did a step per second."""
    writer = SummaryWriter(str(run / "tensorboard"))
    for step, value in losses.items():
        writer.add_scalar("loss", value, step, walltime=at + step)
        writer.add_scalar("val/ema_top1", value / 10, step, walltime=at + step + 0.01)
    for step, picture in pictures.items():
        writer.add_image(PICTURES, picture, step, walltime=at + step)
    writer.close()


def write_log(run: Path, messages: dict[str, float]) -> None:
    """The log, by message and time."""
    lines = [f"{datetime.fromtimestamp(time):%Y-%m-%d %H:%M:%S}  {said}\n" for said, time in messages.items()]
    (run / "log.txt").write_text("".join(lines))


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A finished run of a version without history."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    (run / "environment.json").write_text(json.dumps([ENVIRONMENT]))
    write_log(run, {
        "started: 60 steps in all": 1e9,
        "unreadable image skipped: a.jpg: truncated\nfile": 1e9 + 3,
        "unreadable validation image left out: v.jpg: no image": 1e9 + 5,
        "epoch 6/6  step 60  loss 0.25": 1e9 + 60,
    })  # fmt: skip
    write_tensorboard(run, LOSSES, {10 * i: grid(2, i) for i in range(1, 7)})
    return run


def test_a_run_without_history(old_run: Path) -> None:
    run = Run.read(old_run)
    assert run.curves["loss"].steps == [*LOSSES]
    assert run.curves["loss"].values == pytest.approx([*LOSSES.values()])
    assert run.curves["val/ema_top1"].values == pytest.approx([loss / 10 for loss in LOSSES.values()])
    assert (run.state, run.started, run.settings) == ("finished", START, SETTINGS)
    assert run.seconds == pytest.approx(60.01)
    assert run.unreadable == ["a.jpg: truncated\nfile", "v.jpg: no image"]
    assert [picture.step for picture in run.pictures] == [*LOSSES]
    png = run.png(run.pictures[2])
    assert png is not None
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), grid(2, 3).permute(1, 2, 0))
    page = write_report(old_run).read_text()
    for said in ("finished", "1.5 → 0.25", "1 min 0 s", "Abacus 9000", "Images: step 60", "2 images"):
        assert said in page


def test_a_run_without_history_that_was_killed_and_resumed(old_run: Path) -> None:
    """Killed at step 40, resumed from between 20 and 30 on another day and machine, and stopped."""
    write_log(old_run, {"started: 60 steps in all": 1e9, "resumed: 60 steps in all": 2e9,
                        "stopped at step 55 on request; continue with --resume": 2e9 + 55})  # fmt: skip
    (file,) = (old_run / "tensorboard").iterdir()
    file.unlink()
    write_tensorboard(old_run, {10: 1.0, 20: 0.9, 30: 0.8, 40: 7.0}, {10: grid(1, 1), 40: grid(1, 7)})
    os.utime(next((old_run / "tensorboard").iterdir()), (1, 1))
    write_tensorboard(old_run, {30: 0.7, 50: 0.6}, {30: grid(1, 3)}, at=2e9)
    _, resumed = resume(25)
    (old_run / "environment.json").write_text(json.dumps([ENVIRONMENT, resumed.fields["environment"]]))
    run = Run.read(old_run)
    assert run.curves["loss"].steps == [10, 20, 30, 50]
    assert run.curves["loss"].values == pytest.approx([1.0, 0.9, 0.7, 0.6])
    assert [picture.step for picture in run.pictures] == [10, 30]
    assert run.seconds == pytest.approx(20.01 + 55)
    assert run.state == "stopped at step 55 of 60"
    assert len(run.sessions) == 2


def test_a_tensorboard_file_that_was_cut_off(old_run: Path) -> None:
    (file,) = (old_run / "tensorboard").iterdir()
    whole = Run.read(old_run)
    file.write_bytes(file.read_bytes()[:-10])
    cut = Run.read(old_run)
    assert cut.curves == whole.curves
    assert cut.pictures == whole.pictures[:-1]


def test_a_run_without_history_that_is_resumed_with_one(old_run: Path) -> None:
    """What this version writes to log, TensorBoard and environment counts once."""
    begun, resumed = resume(45)
    append(old_run, resumed, event("step", 60, begun, loss=0.125), event("finish", 60, begun))
    write_tensorboard(old_run, {60: 0.125}, {}, at=begun.timestamp())
    (old_run / "environment.json").write_text(json.dumps([ENVIRONMENT, resumed.fields["environment"]]))
    with (old_run / "log.txt").open("a") as log:
        log.write(f"{LATER:%Y-%m-%d %H:%M:%S}  unreadable image skipped: a.jpg: truncated\nfile\n")
    run = Run.read(old_run)
    assert run.curves["loss"].steps == [10, 20, 30, 40, 60]
    assert run.curves["loss"].values[-1] == 0.125
    assert [picture.step for picture in run.pictures] == [10, 20, 30, 40]
    assert (run.state, len(run.sessions), len(run.unreadable)) == ("finished", 2, 2)
    assert run.seconds == pytest.approx(40.01 + 15)
    assert run.settings["accelerator"] == "cuda"
