"""Shared by all tests."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from processes import Cli, run

torch.set_num_threads(1)  # tests run side by side
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell; commands are to hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="sparkmim-tests-")  # not the user's

NETWORK = """
from torch import nn
import torch.nn.functional as F


class Tiny(nn.Module):
    def __init__(self, in_chans=3):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


def tiny(in_chans=3):
    return Tiny(in_chans)
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, help="how often each training of test_kills.py is killed in either way")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 24 small pictures in two sub-folders: smooth colours with a shape on them."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "photos"
    for index in range(24):
        ramp = np.linspace(0, 1, 40)[:, None, None] * generator.uniform(0, 255, 3)
        pixels = np.broadcast_to(ramp, (40, 40, 3)).copy()
        top, left = generator.integers(0, 25, 2)
        pixels[top : top + 15, left : left + 15] = generator.uniform(0, 255, 3)
        path = folder / f"part{index % 2}" / f"{index:02d}.{'jpg' if index % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture
def network(tmp_path: Path) -> str:
    """A network of the user's own: `file.py:factory`, total stride 4."""
    path = tmp_path / "my_network.py"
    path.write_text(NETWORK)
    return f"{path}:tiny"


@pytest.fixture
def small_pretraining(photos: Path, network: str) -> dict[str, Any]:
    """Arguments of a pretraining on all 24 pictures, with 3 steps per epoch."""
    return {
        "data": str(photos), "model": network, "image_size": 32, "patch_size": 8, "decoder_width": 16, "batch_size": 8,
        "epochs": 4, "warmup_epochs": 1, "workers": 0, "precision": "32-true", "val_split": 0.0,
    }  # fmt: skip


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs the real command line in a process of its own."""

    return lambda *arguments: run([sys.executable, "-m", "sparkmim", *arguments], tmp_path)
