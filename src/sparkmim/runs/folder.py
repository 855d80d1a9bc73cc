"""Layout of a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparkmim.errors import UserError
from sparkmim.files import replacing
from sparkmim.runs.config import commented_yaml, settled_notes

CHECKPOINT = Path("checkpoints") / "last.ckpt"
PICTURES = "input, masked, reconstruction"
"""Name of pictures of reconstructions."""

_FROM_PYTHON = "# Python objects, to be given again: "


class RunFolder:
    """A folder that holds one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"  # arguments as the user gave them; `--config` takes this file
        self.checkpoint = self.path / CHECKPOINT  # everything that resuming needs
        self.weights = self.path / "weights"
        self.history = self.path / "history.jsonl"  # events; see `runs.history`
        self.pictures = self.path / "pictures"
        self.metrics = self.path / "metrics.json"  # validation figures of the finished run
        self.evaluation = self.path / "evaluation"  # results of `sparkmim evaluate`
        self.tensorboard = self.path / "tensorboard"
        self.log = self.path / "log.txt"
        self.environment = self.path / "environment.json"  # at the start and at each resumption
        self.report = self.path / "report.html"

    def check_new(self) -> None:
        """Refuses a path where no new run can start: a file, or a folder that is not empty."""
        if self.config.is_file():
            raise UserError(f"{self.path} already holds a run; continue it with --resume, or choose another --out")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run; choose another --out")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; --out names a folder")

    def read_config(self) -> dict[str, Any]:
        """Reads the arguments of a run, and under `from_python` the names of those that were Python objects."""
        if not self.config.is_file():
            raise UserError(f"{self.path} holds no run to resume; leave out --resume to start one there")
        try:
            text = self.config.read_text(encoding="utf-8")
            arguments = yaml.safe_load(text)
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
    except ValueError as error:
        raise UserError(f"{path} is no whole JSON file ({error}); move it away to have the rest reported") from error
