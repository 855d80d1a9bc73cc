"""Layout of a run folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

from sparkmim.errors import Unwritable, UserError
from sparkmim.files import check_parents, replacing
from sparkmim.runs.config import commented_yaml, read_yaml, settled_notes

if sys.platform != "win32":
    import fcntl

CHECKPOINT = Path("checkpoints") / "last.ckpt"
LOCK = ".lock"
"""Name of the file that a training holds locked."""

PICTURES = "input, masked, reconstruction"
"""Name of pictures of reconstructions."""

_FROM_PYTHON = "# Python objects, to be given again: "


class RunFolder:
    """A folder that holds one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"  # arguments as the user gave them; `--config` takes this file
        self.checkpoint = self.path / CHECKPOINT  # everything that resuming needs
        self.previous = self.checkpoint.with_name("previous.ckpt")  # the one before, in case the last is damaged
        self.weights = self.path / "weights"
        self.history = self.path / "history.jsonl"  # events; see `runs.history`
        self.names = self.path / "images.txt.gz"  # names of the training images
        self.pictures = self.path / "pictures"
        self.metrics = self.path / "metrics.json"  # validation figures of the finished run
        self.evaluation = self.path / "evaluation"  # results of `sparkmim evaluate`
        self.tensorboard = self.path / "tensorboard"
        self.log = self.path / "log.txt"
        self.environment = self.path / "environment.json"  # at the start and at each resumption
        self.report = self.path / "report.html"

    def check_new(self) -> None:
        """Refuses a path where no new run can start: a file, or a folder that holds a run or anything else.

        A run that was killed before its first checkpoint holds nothing to keep, and may start over. PyTorch and
        TensorBoard write to paths in UTF-8 alone.
        """
        if (name := str(self.path)).encode("utf-8", "replace") != os.fsencode(name):
            raise UserError(f"the name of {self.path} is not UTF-8; choose another --out")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; --out names a folder")
        if self.config.is_file():
            if not self.may_start_over:
                raise UserError(f"{self.path} already holds a run; continue it with --resume, or choose another --out")
        elif self.path.is_dir() and any(
            inside.name != LOCK and ".partial." not in inside.name for inside in self.path.iterdir()
        ):
            raise UserError(f"{self.path} is not empty and holds no run; choose another --out")
        check_parents(self.path)

    def check_begun(self) -> None:
        """Refuses a path that holds no run."""
        if not self.config.is_file():
            raise UserError(f"{self.path} holds no run to resume; leave out --resume to start one there")

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.checkpoint.is_file() or self.previous.is_file()

    @property
    def may_start_over(self) -> bool:
        """Whether its run was killed before the first checkpoint, and has left nothing to keep.

        There may be weights, the best ones so far, but the history tells of no checkpoint.
        """
        if self.has_checkpoint:
            return False
        if not self.weights.exists():
            return True
        return self.history.is_file() and b'"event": "checkpoint"' not in self.history.read_bytes()

    def check_there(self) -> None:
        """Refuses to go on if the folder was moved or removed after the run had begun."""
        if not self.config.is_file():
            raise UserError(
                f"{self.path} was moved or removed while the run wrote there; continue it with --resume where it is "
                "now, or start anew"
            )

    def clear(self) -> None:
        """Removes what a run left that was killed before its first checkpoint; its arguments will be written over."""
        for path in (self.history, self.log, self.environment, self.names, *self.path.glob("*.partial.*")):
            path.unlink(missing_ok=True)
        for folder in (self.pictures, self.tensorboard, self.weights):
            shutil.rmtree(folder, ignore_errors=True)

    def tidy(self) -> None:
        """Removes checkpoints and weights that a killed run has half-written; for who holds the lock."""
        for folder in (self.checkpoint.parent, self.weights):
            for left in folder.glob("*.partial.*"):
                left.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other trainings out of the folder, within the context. If it is made and stays empty, it is removed.

        The lock is the kernel's (`flock`), which lets go of it when the process ends, however that happens. The file
        says who holds it.

        Raises:
            UserError: if another training holds it, or the folder cannot be made.
        """
        there = self.path.exists()
        with self._lock() as file:
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                yield
            finally:
                (self.path / LOCK).unlink(missing_ok=True)
                if not there:
                    with suppress(OSError):  # it is not empty
                        self.path.rmdir()

    def _lock(self) -> IO[str]:
        """Opens the file of the lock, and locks it."""
        path = self.path / LOCK
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                file = path.open("a+", encoding="utf-8")
            except OSError as error:
                raise Unwritable(self.path, error) from error
            if sys.platform == "win32":
                return file
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            except FileNotFoundError:
                pass  # who held it has just removed it
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise UserError(f"{self.path} is in use by {holder}; wait for it, or choose another --out") from None
            except OSError:  # a file system without locks
                return file
            file.close()

    def read_config(self) -> dict[str, Any]:
        """Reads the arguments of a run, and under `from_python` the names of those that were Python objects."""
        self.check_begun()
        try:
            text = self.config.read_text(encoding="utf-8")
            arguments = read_yaml(text)
        except (yaml.YAMLError, UnicodeDecodeError):
            arguments = None
        if not isinstance(arguments, dict):
            raise UserError(f"{self.config} cannot be read as the settings of a run; repair it, or name another run")
        first = text.partition("\n")[0]
        if first.startswith(_FROM_PYTHON):
            arguments["from_python"] = first.removeprefix(_FROM_PYTHON).split(", ")
        return arguments

    def write_config(self, asked: Mapping[str, Any], settled: Mapping[str, Any], objects: Sequence[str] = ()) -> None:
        """Saves arguments as the user gave them; notes the settled values of those left open as comments.

        `objects` names the arguments that are Python objects, which no file can hold.
        """
        plain = {name: None if name in objects else value for name, value in asked.items()}
        notes = settled_notes(plain, {**settled, **dict.fromkeys(objects)})
        head = f"{_FROM_PYTHON}{', '.join(objects)}\n" if objects else ""
        with replacing(self.config) as partial:
            partial.write_text(head + commented_yaml(plain, notes), encoding="utf-8")

    def write_environment(self, found: Mapping[str, Any], resumed: bool) -> None:
        """Saves the environment that a run starts in, after the earlier ones if it is resumed."""
        before = (read_json(self.environment) or []) if resumed else []
        with replacing(self.environment) as partial:
            partial.write_text(json.dumps([*before, dict(found)], indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file; None if there is none. Refuses a damaged one."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is no whole JSON file ({error}); move it away to have the rest reported") from error
