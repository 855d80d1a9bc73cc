"""What befalls a command from outside is told in a sentence."""

from __future__ import annotations

import errno
import os

import pytest
from torch.utils.data import DataLoader, Dataset

from sparkmim.errors import Unwritable, UserError
from sparkmim.failures import Killed, told

MEMORY = "a loader worker was killed, as happens where memory runs out; use fewer --workers or a smaller batch"


def failed(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed. Details are lost"), MEMORY),
        (RuntimeError("DataLoader worker (pid(s) 71, 72) exited unexpectedly"), MEMORY),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "to allocate 30000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "there is not enough memory for 30.0 GB; use a smaller --batch-size or --image-size",
        ),
        (MemoryError(), "there is not enough memory; use a smaller --batch-size or --image-size"),
        (
            RuntimeError("DataLoader worker (pid 71) is killed by signal: Segmentation fault. "),
            "a loader worker ended (Segmentation fault); use --workers 0",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 71) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            "use --workers 0, or give a container more by --shm-size 8g",
        ),
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                "  ...\nRuntimeError: unable to allocate shared memory(shm) for file </torch_71>: No space left (28)\n"
            ),
            "use --workers 0, or give a container more by --shm-size 8g",
        ),
        (
            FileNotFoundError(
                "Caught FileNotFoundError in DataLoader worker process 0.\nOriginal Traceback:\n  ...\n"
                "FileNotFoundError: [Errno 2] No such file or directory: 'a.npy'\n"
            ),
            "FileNotFoundError: [Errno 2] No such file or directory: 'a.npy'",
        ),
        (failed(errno.ENOSPC), "run cannot be written (No space left on device); free space there, then resume"),
        (failed(errno.EROFS, "b.csv"), "b.csv cannot be written (Read-only file system); make it writable, then res"),
        (
            failed(errno.EIO, "a.csv"),
            "a.csv cannot be used (Input/output error); see that it is there and yours, then resume",
        ),
        (
            Unwritable("a.pth", failed(errno.ENOSPC), 12_345_678),
            "a.pth cannot be written (No space left on device); free 13 MB there, then resume",
        ),
    ],
)
def test_sentences(error: Exception, sentence: str) -> None:
    with pytest.raises(UserError) as found, told("run", lambda: "resume"):
        raise error
    assert sentence in str(found.value)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) <= 200
    assert isinstance(found.value, Killed) == (type(error) in (RuntimeError, MemoryError))
    assert str(found.value).endswith(", then resume") or "'a.npy'" in sentence


@pytest.mark.parametrize(
    "error",
    [
        UserError("as it is"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\n ...\nRuntimeError: x"),
        KeyError("own"),
    ],
)
def test_other_errors_stay(error: Exception) -> None:
    """Those of a user's own code keep their traceback."""
    with pytest.raises(type(error)) as found, told():
        raise error
    assert found.value is error


class Broken(Dataset[int]):
    """Breaks off as the connection to a killed worker does, where the loader reads from it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: int) -> int:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def test_a_connection_to_a_worker_that_breaks_off() -> None:
    with (
        pytest.raises(Killed, match="a loader worker was killed, .* or a smaller batch, then resume$"),
        told("run", lambda: "resume"),
    ):
        list(DataLoader(Broken(), collate_fn=list))
    with pytest.raises(UserError, match=r"run cannot be used \(Connection reset by peer\)"), told("run"):
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
