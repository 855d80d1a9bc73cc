"""Runs commands as users do, in processes of their own."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]

SPARKMIM = [sys.executable, "-m", "sparkmim"]


def run(
    command: Sequence[object], folder: Path, timeout: float = 100, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a session of its own, so that nothing of it is left behind when time is up."""
    words = list(map(str, command))
    if words[:3] == SPARKMIM and not environment and hasattr(os, "fork"):
        return _run_warm(words, folder, timeout)
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"no end after {timeout} s:\n{stdout}{stderr}")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _run_warm(words: list[str], folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs a command line in a fork of a process that has imported the package; see `warm.py`."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / name for name in ("stdout", "stderr")]
        request = {
            "arguments": words[3:], "folder": str(folder), "files": list(map(str, files)),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1"},
        }  # fmt: skip
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        process = int(server.stdout.readline())
        late = not select.select([server.stdout], [], [], timeout)[0]
        if late:
            os.killpg(process, signal.SIGKILL)
        status = int(server.stdout.readline())
        stdout, stderr = (file.read_text(encoding="utf-8") for file in files)
    if late:
        pytest.fail(f"no end after {timeout} s:\n{stdout}{stderr}")
    return subprocess.CompletedProcess(words, status, stdout, stderr)


@functools.cache
def _server() -> subprocess.Popen[bytes]:
    """Starts the process; it ends when this one closes its stdin, by ending."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm.py"))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        bufsize=0, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
