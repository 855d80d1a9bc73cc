"""Machine and versions that a run starts in."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from sparkmim._version import __version__


def environment(accelerator: str, processes: int) -> dict[str, Any]:
    """Returns the time, the versions and the hardware, in values that JSON takes; None where they are unknown."""
    cuda = accelerator == "cuda"
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "sparkmim": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: import_module(name).__version__ for name in ("torchvision", "timm", "lightning")},
        "platform": platform.platform(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),  # of each process
        "memory_gib": _memory(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "processes": processes,  # on all machines
    }


def processor() -> str:
    """Returns the processor's name; on Linux, `platform` does not know it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> float | None:
    """Returns the main memory in GiB; None where it cannot be asked for, as on Windows."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
