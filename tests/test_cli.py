"""The real command line, in processes of its own: help, mistakes, a run, signals, kills, several processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sparkmim
from processes import Cli, run
from sparkmim.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")

SMALL = ("--image-size", 32, "--patch-size", 8, "--decoder-width", 16, "--batch-size", 8, "--warmup-epochs", 1,
         "--learning-rate", 0.5, "--workers", 2, "--log-every", 1, "--precision", "32-true",
         "--val-split", 0)  # fmt: skip


def losses(out: Path, name: str = "loss") -> dict[int, float]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def start(
    *arguments: object, cwd: Path, words: Sequence[str] = ("-m", "sparkmim", "pretrain")
) -> subprocess.Popen[str]:
    command = [sys.executable, *words, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_help_reads_well_and_imports_nothing_heavy(cli: Cli) -> None:
    shown = cli("pretrain", "--help").stdout
    for flag in ("--data", "--image-size", "--batch-size", "--init-weights", "--print_config"):
        assert flag in shown
    assert "None" not in cli("--help").stdout
    code = "import sys, sparkmim.cli as c; c.build_parser(); print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "--out", "run"], "nowhere"),
        (["--data", ".", "--out", "run", "--recipe", "papre"], "there is no recipe 'papre'"),
        (["--data", ".", "--out", "run", "--image-size", "100"], "image_size 100×100 is not a multiple"),
        (["--data", ".", "--out", "run", "--epochs", "many"], "epochs"),
        (["--out", "run", "--resume"], "holds no run to resume"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(cli: Cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "a.txt").write_text("no picture")
    done = cli("pretrain", "--model", "resnet10t", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_verify(cli: Cli, network: str) -> None:
    done = cli("verify", "--model", network, "--image-size", "16")
    assert done.returncode == 0, done.stderr
    assert "exact: worst relative error" in done.stdout
    refused = cli("verify", "--model", "test_vit")
    assert refused.returncode == 1
    assert "NOT supported: in module `VisionTransformer`: `cat`" in refused.stdout


def test_config_file_and_print_config(cli: Cli, photos: Path, network: str, tmp_path: Path) -> None:
    printed = cli(
        "pretrain", "--data", photos, "--out", "run", "--model", network, *SMALL, "--epochs", 1, "--print_config"
    )
    assert printed.returncode == 0, printed.stderr
    config = yaml.safe_load(printed.stdout)
    assert config["image_size"] == 32
    (tmp_path / "config.yaml").write_text(printed.stdout)
    done = cli("pretrain", "--config", "config.yaml", "--epochs", 2)
    assert done.returncode == 0, done.stderr
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["epochs"], saved["batch_size"]) == (2, 8)
    again = cli("pretrain", "--config", "run/config.yaml", "--out", "again")  # what a run saved starts another
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "again")


def test_help_and_configuration_say_what_a_recipe_decides(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["pretrain", "--help"], ["pretrain", "--out=run", "--recipe=paper", "--print_config"]):
        with pytest.raises(SystemExit):
            main(flags)
    said = " ".join(capsys.readouterr().out.split())
    assert "default: 200 (recipe default))" in said
    assert "epochs: # 1600 (recipe paper)" in said
    assert "null" not in said.partition("data:")[2]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_survives(cli: Cli, photos: Path, network: str, tmp_path: Path, how: signal.Signals) -> None:
    """Ctrl-C and SIGTERM save first, a kill loses what came after the last checkpoint; resuming ends up the same."""
    epochs = 15
    arguments = ("--data", photos, "--model", network, *SMALL, "--epochs", epochs, "--save-minutes", 0.002)
    process = start(*arguments, "--out", "run", cwd=tmp_path)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    wait_for(checkpoint.is_file, process)
    group = os.getpgid(process.pid)
    os.killpg(group, how)  # loader workers hear it too, as from a terminal
    try:
        output = process.communicate(timeout=60)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    if how != signal.SIGKILL:
        assert process.returncode == 130, output
        assert "continue with --out run --resume" in output
        assert "Traceback" not in output
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 0 < step < epochs * 3
    resumed = cli("pretrain", "--out", "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole = cli("pretrain", *arguments, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    found = [load_file(tmp_path / run / "weights" / "spark.safetensors") for run in ("run", "whole")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


SEVERAL = """
import json
import sys
import sparkmim

if __name__ == "__main__":
    sparkmim.pretrain(out="two", devices=2, **json.loads(sys.argv[1]))
"""


@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_two_processes_train_as_one(
    small_pretraining: dict[str, Any], network: str, tmp_path: Path, launcher: str
) -> None:
    """BatchNorm included."""
    path = Path(network.split(":")[0])
    # No dropout: what the network draws depends on the rank by design.
    path.write_text(path.read_text().replace(", nn.Dropout(0.1)", ""))
    settings = {**small_pretraining, "epochs": 3, "learning_rate": 0.1, "log_every": 1, "val_split": 0.25}
    sparkmim.pretrain(**settings, out=tmp_path / "one")
    (tmp_path / "several.py").write_text(SEVERAL)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] * (launcher == "torchrun")
    done = run([sys.executable, *torchrun, "several.py", json.dumps(settings)], tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 7))
    assert two == pytest.approx(one, rel=2e-5)
    one, two = (losses(tmp_path / name, "val/loss") for name in ("one", "two"))
    assert list(one) == list(two) == [0, 2, 4, 6]
    assert two == pytest.approx(one, rel=2e-5)


def children(process: subprocess.Popen[str]) -> dict[int, int]:
    """Ranks that a launcher has started, by the numbers of their processes."""
    found = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(pid): int(value[5:]) for value in environment if value.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_lost_process_ends_the_others(cli: Cli, photos: Path, network: str, tmp_path: Path) -> None:
    """torchrun prints lines of its own, but ours tell which process it was, and how to go on."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "sparkmim", "pretrain"]
    process = start("--data", photos, "--out", "run", "--model", network, *SMALL, "--epochs", 9, "--save-minutes",
                    1e-9, "--workers", 0, cwd=tmp_path, words=torchrun)  # fmt: skip
    wait_for((tmp_path / "run" / "checkpoints" / "last.ckpt").is_file, process)
    (lost,) = (pid for pid, rank in children(process).items() if rank == 1)
    os.kill(lost, signal.SIGKILL)
    said = process.communicate(timeout=90)[0]
    assert "sparkmim pretrain: the process of rank 1 is gone, of 2, as happens where memory runs out; continue with " \
        "--out run --resume\n" in said  # fmt: skip
    assert "[rank0]" not in said
    resumed = cli("pretrain", "--out", "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr


def test_several_processes_stop_together(photos: Path, network: str, tmp_path: Path) -> None:
    """A scheduler sends SIGTERM to all of them alike."""
    process = start("--data", photos, "--out", "run", "--model", network, *SMALL, "--epochs", 400, "--save-minutes",
                    1e-9, "--devices", 2, cwd=tmp_path)  # fmt: skip
    wait_for((tmp_path / "run" / "checkpoints" / "last.ckpt").is_file, process)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 130, said
    assert said.count("continue with --out run --resume") == 1
    assert "Traceback" not in said
    assert "Warning" not in said


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "pipe", "--out=run"], ["finetune", "pipe", "--out=run", "--model=resnet18"],
        ["statistics", "pipe.npy"], ["pretrain", "--config=pipe"], ["embed", "pipe.npz", "--weights=weights"],
        ["pretrain", "folder", "--out=run", "--init-weights=pipe.pth"], ["embed", "folder", "--weights=pipe.pth"],
        ["segment", "--out=run", "--classes=pipe", "--data=folder", "--model=resnet18"], ["report", "pipe"],
        ["detect", "--annotations=pipe", "--images=folder", "--val-annotations=pipe", "--val-images=folder",
         "--model=resnet18", "--out=run"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_command_waits_for_a_pipe(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pipe", "pipe.npy", "pipe.npz", "pipe.pth"):
        os.mkfifo(name)
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (8, 8)).save("folder/image.png")
    signal.alarm(30)
    try:
        with pytest.raises(SystemExit) as ended:
            main(words)
    finally:
        signal.alarm(0)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
