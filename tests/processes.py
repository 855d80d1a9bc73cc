"""Runs commands as users do, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]


def run(
    command: Sequence[object], folder: Path, timeout: float = 100, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a session of its own, so that nothing of it is left behind when time is up."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"no end after {timeout} s:\n{stdout}{stderr}")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
