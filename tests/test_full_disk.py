"""A disk that is full, or read-only: one sentence, and nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sparkmim
from conftest import NETWORK
from sparkmim.cli import main
from sparkmim.errors import Unwritable, UserError
from sparkmim.files import opened_for_torch, replacing

Disk = Callable[[str], Path]


def mount(*options: object) -> None:
    subprocess.run(["mount", "-t", "tmpfs", *map(str, options)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounts a small disk with some options, such as `size=64k`; remounts it when called again."""
    path = tmp_path / "disk"

    def mounted(options: str) -> Path:
        if path.exists():
            mount("-o", f"remount,{options}", path)
            return path
        path.mkdir()
        try:
            mount("-o", options, "tmpfs", path)
        except (subprocess.CalledProcessError, FileNotFoundError):
            path.rmdir()
            pytest.skip("this user may not mount a small disk")
        return path

    yield mounted
    if path.exists():
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, a network, and a run of each kind that the commands need."""
    root = tmp_path_factory.mktemp("trained")
    for number in range(8):
        path = root / "photos" / f"part{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)).save(path)
    (root / "net.py").write_text(NETWORK)
    shared = {"data": root / "photos", "model": f"{root}/net.py:tiny", "image_size": 32, "batch_size": 4,
              "epochs": 1, "warmup_epochs": 0, "workers": 0, "precision": "32-true", "val_split": 0.0}  # fmt: skip
    sparkmim.pretrain(**shared, out=root / "pretrained", patch_size=8, decoder_width=16, picture_every=0)
    sparkmim.finetune(**shared | {"val_split": 0.5}, out=root / "classifier")
    return root


@pytest.mark.parametrize(
    "command",
    [
        "predict photos --weights classifier --out {}/a.csv",
        "embed photos --weights pretrained --out {}/a.npy",
        "reconstruct pretrained photos/part0/0.png --out {}/a.png",
        "features pretrained photos/part0/0.png --out {}/a.png",
        "neighbors pretrained photos/part0/0.png --data photos --out {}/a.png",
        "report pretrained --out {}/a.html",
        "evaluate pretrained --data photos --val-split 0.5 --out {}/a.json",
        "export pretrained --format timm --out {}/a.pth",
        "export pretrained --format timm --out {}/a.safetensors",
        "export pretrained --format torch-export --out {}/a.pt2",
        "export pretrained --format huggingface --out {}/hf",
        "pretrain photos --model net.py:tiny --image-size 32 --out {}/run",
    ],
)
@pytest.mark.parametrize("options", ["size=4k", "size=1m,ro"])
def test_every_command(
    command: str, options: str, trained: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(trained)
    full = disk(options)
    if "ro" not in options:  # no page is left
        (full / "filler").write_bytes(b"x" * 4096)
    with pytest.raises(SystemExit) as left:
        main([word.format(full) for word in command.split()])
    assert left.value.code == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparkmim")]
    assert f"{full}" in said
    assert " cannot be " in said
    assert ("Read-only file system" if "ro" in options else "No space left on device); free ") in said
    assert {path for path in full.rglob("*") if path.is_file()} <= {full / "filler"}


def test_a_training_goes_on_once_there_is_space(
    small_pretraining: dict[str, Any], disk: Disk, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """From a disk that does not hold the names of the images to one that holds one checkpoint, but not two."""
    settings = {**small_pretraining, "log_every": 1, "save_minutes": 1e-9, "picture_every": 1}
    sparkmim.pretrain(**small_pretraining, out=tmp_path / "whole")
    full = tmp_path / "disk"
    last = full / "run" / "checkpoints" / "last.ckpt"
    steps, unfinished = [], []
    for size in (20, 60, 120, 280, 460):
        disk(f"size={size}k")
        with pytest.raises(Unwritable) as refusal:
            sparkmim.pretrain(**({"resume": True} if last.exists() else settings), out=full / "run")
        assert f"{full}/run" in str(refusal.value)
        assert "cannot be written (No space left on device); free " in str(refusal.value)
        assert ("continue with" in str(refusal.value)) == last.exists()
        assert not list(full.rglob("*.partial.*"))
        unfinished.append(str(refusal.value))
        steps.append(torch.load(last, weights_only=True)["global_step"] if last.exists() else 0)
    assert steps[:3] == [0, 0, 0]
    assert steps[3] > 0
    assert "Traceback" not in "".join(capfd.readouterr())
    disk("size=8m")
    assert sparkmim.pretrain(resume=True, out=full / "run").finished
    found, expected = (load_file(run / "weights/spark.safetensors") for run in (full / "run", tmp_path / "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("moved", [True, False])
def test_a_folder_that_vanishes(moved: bool, small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "there"

    class Vanish(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                run.rename(there)
                if not moved:
                    shutil.rmtree(there)

    with pytest.raises(UserError, match=r"run was moved or removed while the run wrote there; continue it with"):
        sparkmim.pretrain(**small_pretraining, out=run, callbacks=[Vanish()], save_minutes=1e-9, log_every=1 + moved)
    assert not run.exists()
    assert there.exists() == moved
    if moved:
        assert sparkmim.pretrain(resume=True, out=there).finished


def test_pytorch_tells_the_reason(disk: Disk) -> None:
    """Given a path, it says "unexpected pos"; interrupted by an error, it ends the process."""
    path = disk("size=8k") / "a.pth"
    full = r"a.pth cannot be written \(No space left on device\)"
    with pytest.raises(Unwritable, match=full), replacing(path) as partial, opened_for_torch(partial) as file:
        torch.save({"a": torch.zeros(100_000)}, file)
    assert not list(path.parent.iterdir())
