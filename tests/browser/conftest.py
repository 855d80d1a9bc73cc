"""A real browser, and a playground for it. `make test-browser` installs what these tests need; without it they skip."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps",
]  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: `make test-browser` installs it")
    if CHROMIUM is None:
        pytest.skip("no Chromium: `make test-browser` installs it")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def run_of(folder: Path, seed: int) -> Path:
    """A run folder of a small model at random."""
    import torch

    import sparkmim
    from sparkmim.interop import weights
    from sparkmim.interop.metadata import WeightsMetadata

    torch.manual_seed(seed)
    network = str(Path(__file__).parents[2] / "examples" / "small_cnn.py") + ":small_cnn"
    model = sparkmim.SparK(network, image_size=64, patch_size=8, decoder_width=16)
    weights.save(
        model, folder / "weights",
        WeightsMetadata(model=network, image_size=[64, 64], patch_size=8, decoder_width=16, channels=3,
                        mean=[0.5] * 3, std=[0.25] * 3),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def address(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the real command serves its page."""
    pytest.importorskip("gradio", reason="no Gradio: `make test-browser` installs it")
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("playground")
    (folder / "pictures").mkdir()
    for index, colours in enumerate(np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)):
        Image.fromarray(colours).resize((96, 64), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{index}.jpg")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["playground", "--weights", run_of(folder / "first", 0), "--compare", run_of(folder / "second", 1),
               "--images", folder / "pictures", "--port", port]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "sparkmim", *map(str, command)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as server:  # fmt: skip
        assert server.stdout is not None
        line = server.stdout.readline()
        assert f":{port}" in line, line
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    assert server.returncode in (0, 130)
