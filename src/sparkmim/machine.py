"""The machine that a command runs on: device, precision, processes, allocator."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from sparkmim.errors import UserError


def is_main_process() -> bool:
    """Whether this process speaks for all; known before any of them is started."""
    ranks = ("RANK",) if "RANK" in os.environ else ("LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def keep_freed_memory() -> None:
    """Has glibc's allocator keep what is freed for the next step, instead of giving it back to the system.

    A training step frees and asks for the same hundreds of megabytes again; each time, the kernel has to clear them
    page by page. Does nothing where the C library is another, or its allocator was replaced.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        arenas, mapped, trim, pad = -8, -4, -1, -2  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
        for option, value in ((arenas, 1), (mapped, 0), (trim, 2**31 - 1), (pad, 64 * 2**20)):
            mallopt(option, value)


def has_bfloat16(accelerator: str) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself."""
    if accelerator == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return accelerator == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)


def device_named(accelerator: str) -> torch.device:
    """The device of a command.

    Raises:
        ValueError: if there is none of that kind.
    """
    if accelerator not in ("auto", "cpu", "cuda"):
        raise UserError(f"accelerator is {accelerator!r}; choose auto, cpu or cuda")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator is cuda, but PyTorch finds no GPU here; use --accelerator cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
