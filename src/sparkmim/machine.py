"""The machine that a command runs on: device, processes, precision, random generators."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparkmim.allocator import keep_freed_memory as keep_freed_memory
from sparkmim.errors import UserError


def device_named(accelerator: str) -> torch.device:
    """Returns the device that an accelerator stands for.

    Args:
        accelerator: `auto`, `cpu` or `cuda`.

    Raises:
        UserError: if it is `cuda` and there is no GPU.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator is cuda, but PyTorch finds no GPU here; use --accelerator cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def settle_machine(
    accelerator: str, devices: str | int, num_nodes: int, precision: str, workers: int | None
) -> dict[str, Any]:
    """Decides what was left open to the machine.

    Under torchrun or srun, its environment decides the numbers of devices and nodes.

    Args:
        accelerator: `auto`, `cpu` or `cuda`.
        devices: processes on each node; `auto` for all GPUs, or one CPU process.
        num_nodes: machines.
        precision: `auto`, `bf16-mixed` or `32-true`.
        workers: loader processes of each process; None to share out the cores of the node.

    Returns:
        All five, settled.

    Raises:
        UserError: if there are no such devices.
    """
    kind = device_named(accelerator).type
    gpus = torch.cuda.device_count() if kind == "cuda" else 0
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // local
    elif _under_srun():
        num_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        local = int(os.environ["SLURM_STEP_NUM_TASKS"]) // num_nodes
        # Lightning insists on it, and srun sets it for --ntasks-per-node, but not for --ntasks.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(local))
    else:
        local = (gpus or 1) if devices == "auto" else int(devices)
    if gpus and local > gpus:
        raise UserError(f"devices is {local}, but there are {gpus} GPUs; use --devices {gpus} or less")
    if precision == "auto":
        precision = "bf16-mixed" if has_bfloat16(kind) else "32-true"
    if workers is None:
        workers = max(1, ((os.cpu_count() or 2) - 1) // local) if gpus else 2
    return {
        "accelerator": kind, "devices": local, "num_nodes": num_nodes, "precision": precision, "workers": workers,
    }  # fmt: skip


def has_bfloat16(accelerator: str) -> bool:
    """Tells whether the hardware multiplies bfloat16 matrices itself."""
    if accelerator == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return accelerator == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def check_compiles(accelerator: str) -> None:
    """Compiles a small function, as torch.compile needs a C++ compiler, Python's headers, and on GPUs Triton.

    Raises:
        UserError: if that fails.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=accelerator))
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        why = next((line for line in str(inner).splitlines() if line.strip()), type(inner).__name__).rstrip(".")
        raise UserError(
            f"compile does not work on this machine: {why}; install what is missing, or leave it out"
        ) from None


def _under_srun() -> bool:
    """Tells whether srun started several processes; for Lightning too, jobs called bash or interactive do not count."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return not interactive and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def is_main_process() -> bool:
    """Tells whether this process speaks for all processes of a run; works before any of the others is started."""
    ranks = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID",) if _under_srun() else ("LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def is_running(process: int) -> bool:
    """Tells whether a process of this machine runs; one that has ended, and that nobody has waited for, does not."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2][:1]
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True
    return state != "Z"


@contextmanager
def generators_restored(with_gpus: bool = True) -> Iterator[None]:
    """Puts the global random generators of Python, numpy and torch back as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    in_use: Callable[[], bool] = torch.cuda.is_initialized
    gpus = range(torch.cuda.device_count()) if with_gpus and in_use() else ()
    try:
        with torch.random.fork_rng(devices=list(gpus)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
