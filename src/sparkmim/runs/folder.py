"""The run folder: what stands where, and that nothing in it is ever lost by accident."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparkmim.errors import UserError
from sparkmim.files import replacing
from sparkmim.runs.config import commented_yaml, plain_yaml

CHECKPOINT = Path("checkpoints") / "last.ckpt"
PICTURES = "input, masked, reconstruction"
"""The tag of reconstructions in TensorBoard."""

_FROM_PYTHON = "# Python objects, to be given again: "


class RunFolder:
    """A folder that holds one run.

    `config.yaml` the settings in force; `checkpoints/last.ckpt` all that resuming needs; `weights/` the
    results; `tensorboard/` curves and pictures; `log.txt` what was said; `environment.json` the machine and the
    versions, at the start and at each resumption; `report.html` all of this to look at.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def check_new(self) -> None:
        """Refuses a folder that something stands in.

        Raises:
            ValueError: naming what to do instead.
        """
        if self.config.is_file():
            raise UserError(f"{self.path} already holds a run; continue it with --resume, or choose another --out")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run; choose another --out")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; --out names a folder")

    def read_config(self) -> dict[str, Any]:
        """The settings of an existing run.

        Raises:
            ValueError: if there is no run.
        """
        if not self.config.is_file():
            raise UserError(f"{self.path} holds no run to resume; leave out --resume to start one there")
        text = self.config.read_text()
        settings: dict[str, Any] = yaml.safe_load(text)
        first = text.partition("\n")[0]
        if first.startswith(_FROM_PYTHON):
            settings["from_python"] = first.removeprefix(_FROM_PYTHON).split(", ")
        return settings

    def write_config(
        self, asked: Mapping[str, Any], settled: Mapping[str, Any], from_python: Sequence[str] = ()
    ) -> None:
        """Saves arguments in a form that `--config` takes.

        Args:
            asked: arguments as they were given; open ones are noted with what they were settled to.
            settled: settings by name.
            from_python: names of arguments that were Python objects and are left out.
        """
        notes = {
            name: plain_yaml(value)
            for name, value in settled.items()
            if value is not None and asked.get(name) in (None, "auto") and value != asked.get(name)
        }
        note = f"{_FROM_PYTHON}{', '.join(from_python)}\n" if from_python else ""
        with replacing(self.config) as partial:
            partial.write_text(note + commented_yaml(asked, notes), encoding="utf-8")

    def write_environment(self, found: Mapping[str, Any], resumed: bool) -> None:
        """Notes what a run starts in; after what it started in before, if it is resumed."""
        before = json.loads(self.environment.read_text()) if resumed and self.environment.is_file() else []
        with replacing(self.environment) as partial:
            partial.write_text(json.dumps([*before, dict(found)], indent=1) + "\n")
