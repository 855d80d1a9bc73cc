"""Loggers by name: each is read back by its own reader."""

from __future__ import annotations

import csv
import json
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sparkmim
from interrupting import InterruptAt
from processes import SPARKMIM, Cli, run
from sparkmim.drawing.pixels import GAP
from sparkmim.runs.folder import PICTURES
from sparkmim.runs.history import read_history

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def settings(small_pretraining: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return small_pretraining | {
        "out": tmp_path / "run", "epochs": 2, "val_split": 0.34, "picture_every": 1, "log_every": 1,
    }  # fmt: skip


def losses(out: Path) -> dict[int, float]:
    events = read_history(out / "history.jsonl")
    return {event.step: event.fields["loss"] for event in events if event.kind == "step"}


def held_out(out: Path) -> list[float]:
    events = read_history(out / "history.jsonl")
    return [event.fields["figures"]["loss"] for event in events if event.kind == "validation"]


def test_tensorboard(settings: dict[str, Any]) -> None:
    sparkmim.pretrain(**settings)
    events = EventAccumulator(str(settings["out"] / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx(losses(settings["out"]))
    assert [event.value for event in events.Scalars("val/loss")] == pytest.approx(held_out(settings["out"]))
    assert events.Images(PICTURES)


def test_csv(settings: dict[str, Any]) -> None:
    sparkmim.pretrain(**settings, loggers=["csv"])
    out = settings["out"]
    with (out / "csv" / "version_0" / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {int(row["step"]): float(row["loss"]) for row in rows if row["loss"]} == pytest.approx(losses(out))
    assert [float(row["val/loss"]) for row in rows if row["val/loss"]] == pytest.approx(held_out(out))
    assert yaml.safe_load((out / "csv" / "version_0" / "hparams.yaml").read_text())["mask_ratio"] == 0.6
    assert not (out / "tensorboard").exists()


def test_wandb(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sparkmim.pretrain(**settings, loggers=["wandb"])
    out = settings["out"]
    (start,) = [event for event in read_history(out / "history.jsonl") if event.kind == "start"]
    (file,) = (out / "wandb").glob(f"offline-run-*/run-{start.fields['loggers']['wandb']}.wandb")

    rows, config = wandb_content(file)
    assert {int(row["trainer/global_step"]): row["loss"] for row in rows if "loss" in row} == pytest.approx(losses(out))
    assert [row["val/loss"] for row in rows if "val/loss" in row] == pytest.approx(held_out(out))
    assert config["mask_ratio"] == 0.6
    pictures = [row[f"{PICTURES}.filenames"] for row in rows if f"{PICTURES}.filenames" in row]
    assert len(pictures) == 2
    with Image.open(file.parent / "files" / pictures[0][0]) as picture:
        assert picture.width == 3 * (32 + 2 * GAP)


def wandb_content(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reads the logged rows, and the settings, by W&B's own records."""
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for update in (*record.run.config.update, *record.config.update):
            config[update.key] = json.loads(update.value_json)
        if record.HasField("history"):
            values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in values.items()})
    return rows, config


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Reads a log in LevelDB's format: W&B's has a header of 7 bytes, and blocks of 32 KiB."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # no header fits into the rest of a block
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def test_mlflow(settings: dict[str, Any]) -> None:
    """A resumed run goes on under the same identifier."""
    from mlflow.tracking import MlflowClient

    out = settings["out"]
    sparkmim.pretrain(**settings, loggers=["mlflow"], callbacks=[InterruptAt(2)])
    sparkmim.pretrain(out=out, resume=True)
    begun = [event for event in read_history(out / "history.jsonl") if event.kind in ("start", "resume")]
    (run,) = {event.fields["loggers"]["mlflow"] for event in begun}
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    found = {metric.step: metric.value for metric in client.get_metric_history(run, "loss")}
    assert found == pytest.approx(losses(out))
    assert len(client.get_metric_history(run, "val/loss")) == len(held_out(out))
    assert client.get_run(run).data.params["mask_ratio"] == "0.6"
    assert client.list_artifacts(run, PICTURES)
    assert list((out / "mlflow").rglob("*.png"))


def test_from_the_shell(cli: Cli, settings: dict[str, Any]) -> None:
    flags = [f"--{name}={value}" for name, value in settings.items()]
    done = cli("pretrain", *flags, "--loggers", "csv", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert (settings["out"] / "csv" / "version_0" / "metrics.csv").is_file()
    assert (settings["out"] / "tensorboard").is_dir()
    assert yaml.safe_load((settings["out"] / "config.yaml").read_text())["loggers"] == ["csv", "tensorboard"]
    done = cli("pretrain", *flags, "--loggers", "tensorbord")
    assert done.returncode == 2
    assert "--loggers is 'tensorbord'; did you mean tensorboard?" in done.stderr


def test_a_missing_package(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"the logger wandb needs a package; install it by `pip install 'sparkmim"):
        sparkmim.pretrain(**settings, loggers=["wandb"])
    assert not settings["out"].exists()


def test_nobody_is_logged_in(photos: Path, network: str, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_MODE": "online", "WANDB_API_KEY": ""}
    command = [*SPARKMIM, "pretrain", photos, "--model", network, "--image-size", 32, "--patch-size", 8, "--epochs", 1,
               "--workers", 0, "--out", tmp_path / "run", "--loggers"]  # fmt: skip
    refused = run([*command, "wandb"], tmp_path, **home)
    assert refused.returncode == 2
    assert re.search(r"wandb does not log: .*; run `wandb login`, or set WANDB_MODE=offline$", refused.stderr.strip())
    assert "Traceback" not in refused.stderr
    assert run([*command, "csv"], tmp_path).returncode == 0  # nothing is left in its way
