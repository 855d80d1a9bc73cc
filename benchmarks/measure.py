"""What benchmarks share: taking turns, peak memory, and what was measured where."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparkmim.runs.environment import processor

Step = Callable[[], object]


def take_turns(steps: Mapping[Any, Step], rounds: int) -> dict[Any, float]:
    """Returns the best time of each, in seconds.

    They take turns, round by round, so that a machine whose speed drifts treats them alike; one round more warms up.
    """
    best = dict.fromkeys(steps, float("inf"))
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_memory(step: Step, device: str) -> float:
    """Returns the bytes that one step takes at its peak, above what was held before."""
    step()  # allocators, caches and lazy state are not the step's
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return float(peak)


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Returns the command, the machine and the versions, to keep beside the figures."""
    return {
        "command": "python " + " ".join(sys.argv),
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
