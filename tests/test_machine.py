"""Which processes there are."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sparkmim.machine import is_main_process, is_running, settle_machine


@pytest.mark.parametrize(
    ("environment", "main", "processes"),
    [
        ({}, True, (1, 1)),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, True, (2, 2)),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False, (2, 2)),
        ({"LOCAL_RANK": "1"}, False, (1, 1)),  # started by Lightning
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, True, (4, 2)),
        ({"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, False, (4, 2)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NAME": "bash"}, True, (1, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, True, (1, 1)),  # a batch script, without srun
    ],
)
def test_launchers(
    environment: dict[str, str], main: bool, processes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun, Lightning, and plain srun, whose processes are all alike but for their environment."""
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_process() == main
    settled = settle_machine("cpu", "auto", 1, "32-true", 0)
    assert (settled["devices"], settled["num_nodes"]) == processes


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell")
def test_a_process_that_nobody_waited_for_does_not_run() -> None:
    assert is_running(os.getpid())
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert is_running(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_running(process.pid)
    assert not is_running(process.pid)
