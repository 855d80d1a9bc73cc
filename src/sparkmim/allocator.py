"""The allocator of memory. Imports nothing that takes seconds, as the command line needs it before all else."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of returning it to the system.

    A training step on a CPU frees and asks for the same hundreds of megabytes again; each time, the kernel has to
    clear them page by page. Concerns the whole process, so the command line alone calls it. Does nothing with another
    C library or allocator.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        arenas, mapped, trim, pad = -8, -4, -1, -2  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
        for option, value in ((arenas, 1), (mapped, 0), (trim, 2**31 - 1), (pad, 64 * 2**20)):
            mallopt(option, value)
