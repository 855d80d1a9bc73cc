"""A run is never lost, and never says that it is done when it is not."""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import sparkmim
from sparkmim.runs.folder import LOCK, RunFolder
from sparkmim.runs.history import read_history
from stopping import StopAt


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / "spark.safetensors")


def same(run: Path, other: Path) -> bool:
    found, expected = weights_of(run), weights_of(other)
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def whole(small_pretraining: dict[str, Any], tmp_path: Path) -> Path:
    """A finished run of 12 steps."""
    sparkmim.pretrain(**small_pretraining, out=tmp_path / "whole")
    return tmp_path / "whole"


def test_weights_lost_after_the_last_checkpoint_are_written_again(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a kill, or a full disk, between the last checkpoint and the weights."""
    before = {path.name: load_file(path) for path in (whole / "weights").iterdir()}
    loss = [event.fields["loss"] for event in read_history(whole / "history.jsonl") if event.kind == "epoch"][-1]
    for path in (whole / "weights").iterdir():
        path.unlink()
    lines = (whole / "history.jsonl").read_text().splitlines(keepends=True)
    (whole / "history.jsonl").write_text("".join(line for line in lines if json.loads(line)["event"] != "finish"))
    result = sparkmim.pretrain(out=whole, resume=True)
    assert result.finished
    assert result.loss == loss
    for name, tensors in before.items():
        found = load_file(whole / "weights" / name)
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert read_history(whole / "history.jsonl")[-1].kind == "finish"
    assert f"done: loss {loss:.4f}" in capsys.readouterr().err


def test_weights_of_an_earlier_step_are_written_again(small_pretraining: dict[str, Any], whole: Path) -> None:
    wrong = {name: torch.zeros_like(tensor) for name, tensor in weights_of(whole).items()}
    expected = weights_of(whole)
    from safetensors.torch import save_file

    save_file(wrong, whole / "weights" / "spark.safetensors")
    sparkmim.pretrain(out=whole, resume=True)
    assert all(torch.equal(weights_of(whole)[name], expected[name]) for name in expected)


def test_a_finished_classifier_is_completed_with_its_figures(network: str, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = sparkmim.finetune(
        data=str(photos), model=network, out=run, image_size=32, epochs=2, warmup_epochs=0, batch_size=4, workers=0,
        val_split=0.3,
    )  # fmt: skip
    figures = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    (run / "weights" / "classifier.safetensors").unlink()
    again = sparkmim.finetune(out=run, resume=True)
    assert (again.finished, again.top1) == (True, first.top1)
    assert json.loads((run / "metrics.json").read_text()) == figures
    assert (run / "weights" / "classifier.safetensors").is_file()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: str, small_pretraining: dict[str, Any], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    sparkmim.pretrain(**small_pretraining, out=run, callbacks=[StopAt(4)])
    sparkmim.pretrain(out=run, resume=True, callbacks=[StopAt(7)])
    last = run / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    if damage == "missing":
        last.unlink()
    else:
        last.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"<html>"}[damage])
    assert sparkmim.pretrain(out=run, resume=True).finished
    assert f"{last} is damaged or missing; the run goes on from step 4" in " ".join(capsys.readouterr().err.split())
    assert same(run, whole)


def test_two_damaged_checkpoints_are_one_sentence(small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    sparkmim.pretrain(**small_pretraining, out=run, callbacks=[StopAt(4)])
    (run / "checkpoints" / "last.ckpt").write_bytes(b"nothing")
    with pytest.raises(sparkmim.UserError, match=r"last.ckpt cannot be read, nor the one before; start anew"):
        sparkmim.pretrain(out=run, resume=True)


def dumped(content: Any) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def changed(path: Path, **values: Any) -> bytes:
    return dumped({**torch.load(path, weights_only=True), **values})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: b"version https://git-lfs.github.com/spec/v1\n", "cannot be read, nor the one before"),
        (lambda path: path.read_bytes()[:3000] + bytes(8) + path.read_bytes()[3008:], "cannot be read"),  # still a zip
        (lambda path: dumped([1, 2]), "cannot be read, nor the one before"),
        (lambda path: dumped(torch.load(path, weights_only=True)["state_dict"]), "cannot be read, nor the one before"),
        (lambda path: changed(path, global_step="x"), "cannot be read, nor the one before"),
        (lambda path: changed(path, optimizer_states=[]), "cannot be read, nor the one before"),
        (lambda path: changed(path, loops={}, state_dict={}), "is of another network or training than config.yaml"),
        (lambda path: changed(path, global_step=10**6), "stands at step 1000000, and epochs 4 are 12 steps"),
    ],
)
def test_a_foreign_checkpoint_is_one_sentence(
    damage: Callable[[Path], bytes], sentence: str, small_pretraining: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sparkmim.pretrain(**small_pretraining, out=run, callbacks=[StopAt(4)])
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(damage(last))
    with pytest.raises(sparkmim.UserError) as refusal:
        sparkmim.pretrain(out=run, resume=True)
    assert sentence in str(refusal.value).replace(str(last), "last.ckpt")
    assert len(str(refusal.value).replace(str(run), "run")) <= 200


CONFIGS = {
    "empty": "", "not YAML": "epochs: [1\n", "list": "- a\n- b\n", "text": "hello", "binary": "\0\1\2",
    "aliases": "a: &a [x]\nb: *a\n", "foreign": "lr: 1\nsteps: 2\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        *((content, "config.yaml cannot be read as the settings of a run; repair it") for content in CONFIGS.values()),
        ({"epochs": "many"}, "epochs is 'many'; it must be a finite number, above 0"),
        ({"batch_size": [1]}, "batch_size is [1]; it must be a whole number, above 0"),
        ({"data": 7}, "data is 7 in {}; it must be text"),
        ({"model": 1.5}, "model is 1.5 in {}; it must be text"),
        ({"recipe": {}}, "recipe is {{}} in {}; it must be text"),
        ({"loggers": "csv"}, "loggers is 'csv'; it must be a list"),
    ],
)
def test_a_damaged_config_is_one_sentence(change: Any, sentence: str, run_folders: Path) -> None:
    config = run_folders / "pretrain" / "config.yaml"
    before = config.read_text()
    config.write_text(change if isinstance(change, str) else yaml.safe_dump({**yaml.safe_load(before), **change}))
    try:
        with pytest.raises(sparkmim.UserError) as refusal:
            sparkmim.pretrain(out=config.parent, resume=True)
    finally:
        config.write_text(before)
    assert sentence.format(config) in str(refusal.value)


def test_what_the_config_has_lost_comes_from_the_history(
    small_pretraining: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sparkmim.pretrain(**small_pretraining, out=run, callbacks=[StopAt(4)])
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("seed", "image_size", "model", "data", "batch_size", "workers"):
        del config[name]
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "save_minutes": None}))
    assert sparkmim.pretrain(out=run, resume=True).finished
    assert same(run, whole)


TRAININGS: dict[str, Callable[..., Any]] = {
    "pretrain": sparkmim.pretrain, "finetune": sparkmim.finetune, "detect": sparkmim.detect,
    "segment": sparkmim.segment,
}  # fmt: skip


@pytest.fixture(scope="module")
def run_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arguments of a run of each training, as they are before the first checkpoint."""
    root = tmp_path_factory.mktemp("runs")
    for name, train in TRAININGS.items():
        parameters = inspect.signature(train).parameters.values()
        asked = {parameter.name: parameter.default for parameter in parameters if parameter.name != "callbacks"}
        RunFolder(root / name).write_config({**asked, "out": name, "data": "photos", "model": "resnet18"}, {})
    return root


@pytest.mark.parametrize("command", TRAININGS)
@pytest.mark.parametrize("other", TRAININGS)
def test_a_run_is_resumed_by_its_own_command(command: str, other: str, run_folders: Path) -> None:
    expected = f"{run_folders}/{other} holds a run of {other}, not of {command}; continue it with sparkmim {other} --re"
    with pytest.raises(sparkmim.UserError) as refusal:
        TRAININGS[command](out=run_folders / other, resume=True)
    assert (expected in str(refusal.value)) == (command != other)


def test_a_damaged_history_is_one_sentence(small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    sparkmim.pretrain(**small_pretraining, out=run, callbacks=[StopAt(4)])
    with (run / "history.jsonl").open("a") as file:
        file.write("hello\n")  # a whole line; one that a kill cut off has no end
    with pytest.raises(sparkmim.UserError, match=r"line \d+ of .*history.jsonl is damaged; remove it"):
        sparkmim.pretrain(out=run, resume=True)


def test_one_run_at_a_time(small_pretraining: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with (
        RunFolder(whole).locked(),
        pytest.raises(sparkmim.UserError, match=rf"is in use by process {os.getpid()} on .*; wait for it"),
    ):
        sparkmim.pretrain(out=whole, resume=True)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    assert not (whole / LOCK).exists()


def test_the_lock_of_a_killed_process_holds_nobody_up(small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    code = (
        "import os, sys; from sparkmim.runs.folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).locked(): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=False)
    assert (run / LOCK).read_text().startswith("process ")
    assert sparkmim.pretrain(**small_pretraining, out=run).finished
    assert not (run / LOCK).exists()


@pytest.mark.parametrize(("resume", "weights"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_run_killed_before_its_first_checkpoint_starts_over(
    resume: bool, weights: bool, small_pretraining: dict[str, Any], whole: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    sparkmim.pretrain(**small_pretraining, out=run, callbacks=[StopAt(4)])
    shutil.rmtree(run / "checkpoints")
    lines = (run / "history.jsonl").read_text().splitlines(keepends=True)
    (run / "history.jsonl").write_text("".join(line for line in lines if '"event": "checkpoint"' not in line))
    if weights:  # the best so far, of a scorer or a probe
        (run / "weights" / "spark.safetensors").rename(run / "weights" / "spark_best.safetensors")
    else:
        shutil.rmtree(run / "weights")
    arguments = {"resume": True} if resume else small_pretraining
    assert sparkmim.pretrain(**arguments, out=run).finished
    assert same(run, whole)
    kinds = [event.kind for event in read_history(run / "history.jsonl")]
    assert (kinds[0], kinds.count("start"), kinds.count("resume")) == ("start", 1, 0)
    said = " ".join(capsys.readouterr().err.split())
    assert ("has no checkpoint yet; the run starts over" in said) == resume
    assert not (run / "weights" / "spark_best.safetensors").exists()


def test_weights_of_a_run_whose_checkpoints_are_deleted_are_kept(whole: Path, photos: Path) -> None:
    shutil.rmtree(whole / "checkpoints")
    for arguments in ({"resume": True}, {"data": photos}):
        with pytest.raises(sparkmim.UserError, match="has no checkpoint to resume from|already holds a run"):
            sparkmim.pretrain(**arguments, out=whole)
    assert weights_of(whole)


def test_a_run_that_was_refused_leaves_nothing(small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(sparkmim.UserError, match="more than the 24 images"):
        sparkmim.pretrain(**{**small_pretraining, "batch_size": 100}, out=run)
    assert not run.exists()


def test_max_minutes(small_pretraining: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = sparkmim.pretrain(**small_pretraining, out=run, max_minutes=1e-6)
    assert (first.step, first.finished) == (1, False)
    assert not sparkmim.pretrain(out=run, resume=True).finished  # the limit is kept
    assert sparkmim.pretrain(out=run, resume=True, max_minutes=10.0).finished
    assert same(run, whole)


def test_the_users_own_folder(
    small_pretraining: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    data = str(Path(small_pretraining["data"]).rename(home / "photos"))
    assert data.endswith("home/photos")
    result = sparkmim.pretrain(**{**small_pretraining, "data": "~/photos", "epochs": 1}, out="~/run")
    assert result.out == home / "run"
    assert math.isfinite(result.loss)
    assert not (tmp_path / "~").exists()


def test_what_is_empty_is_refused() -> None:
    with pytest.raises(sparkmim.UserError, match="out is empty; leave it out, or give it a value"):
        sparkmim.pretrain(data="photos", out="")
    with pytest.raises(sparkmim.UserError, match="init_weights is empty"):
        sparkmim.pretrain(data="photos", out="run", init_weights=" ")


def test_changed_data_are_told(small_pretraining: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    run, photos = tmp_path / "run", Path(small_pretraining["data"])
    sparkmim.pretrain(**small_pretraining, out=run, callbacks=[StopAt(4)])
    gone = sorted(photos.rglob("*.jpg"))[0]
    gone.rename(photos / "new.jpg")
    with pytest.raises(sparkmim.UserError) as refusal:
        sparkmim.pretrain(out=run, resume=True)
    assert str(refusal.value) == (
        f"the data have changed since the run began: 1 image missing, such as {gone.relative_to(photos)}; "
        "1 new, such as new.jpg; put them back, or go on with --accept-changed-data"
    )
    (photos / "new.jpg").rename(gone)
    moved = photos.rename(tmp_path / "moved")
    assert sparkmim.pretrain(data=moved, out=run, resume=True).finished  # the same in another place
    assert same(run, whole)


def test_changed_data_are_accepted_once(small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    run, photos = tmp_path / "run", Path(small_pretraining["data"])
    sparkmim.pretrain(**small_pretraining, out=run, callbacks=[StopAt(4)])
    sorted(photos.rglob("*.jpg"))[0].unlink()
    assert not sparkmim.pretrain(out=run, resume=True, accept_changed_data=True, callbacks=[StopAt(6)]).finished
    assert sparkmim.pretrain(out=run, resume=True, callbacks=[StopAt(7)]).step == 7  # those are its data now
    sorted(photos.rglob("*.png"))[0].unlink()
    with pytest.raises(sparkmim.UserError, match="1 image missing"):
        sparkmim.pretrain(out=run, resume=True)


def test_a_dataset_without_names_is_counted(small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    pictures = [torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8) for _ in range(24)]
    settings = {**small_pretraining, "data": pictures}
    sparkmim.pretrain(**settings, out=tmp_path / "run", callbacks=[StopAt(4)])
    with pytest.raises(sparkmim.UserError, match="trained on 24 images, and the data hold 16 now; put them back"):
        sparkmim.pretrain(out=tmp_path / "run", resume=True, data=pictures[:16])
    assert sparkmim.pretrain(out=tmp_path / "run", resume=True, data=pictures).finished


def test_a_warmup_longer_than_the_run(
    small_pretraining: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The recipe's gives way; one that was given is kept, and said to be too long."""
    sparkmim.pretrain(**{**small_pretraining, "warmup_epochs": 6}, out=tmp_path / "given", callbacks=[StopAt(1)])
    assert "the warm-up of 18 steps is longer than the run of 12" in caplog.text
    caplog.clear()
    del small_pretraining["warmup_epochs"]
    sparkmim.pretrain(**small_pretraining, out=tmp_path / "run", log_every=1)
    assert not caplog.text.count("longer than the run")
    events = read_history(tmp_path / "run" / "history.jsonl")
    assert events[0].fields["settings"]["warmup_epochs"] == 0.4
    rates = [event.fields["learning_rate"] for event in events if event.kind == "step"]
    assert rates.index(max(rates)) <= 2
