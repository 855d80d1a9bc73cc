"""The paths among the arguments of all commands: what must be there, and what must not.

Checked in one place, before a command imports anything that takes seconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparkmim.arguments import one_of
from sparkmim.errors import MissingPath, UserError
from sparkmim.files import are_paths, new_file, new_folder
from sparkmim.runs.folder import RunFolder

_PROCESSES = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class Input:
    """A path that must exist.

    Attributes:
        what: what it may name, for the message.
        folder: whether it may be a folder, which must not be empty.
        file: whether it may be a file.
        several: whether a list of paths is taken too.
        holds: what a folder must hold; nothing in particular if empty.
        besides: a word that names no path.
    """

    what: str
    folder: bool = True
    file: bool = True
    several: bool = False
    holds: str = ""
    besides: str = ""

    def check(self, flag: str, value: Any) -> None:
        """Raises a `UserError` if a value is not that; Python objects and None pass."""
        if are_paths(value):
            if not self.several:
                raise UserError(f"{flag} has {len(value)} values, and takes one; it names {self.what}")
            for item in value:
                self.check(flag, item)
        elif isinstance(value, str | Path) and str(value) != self.besides:
            if not os.path.lexists(value):
                raise MissingPath(f"{value} does not exist; {flag} names {self.what}")
            if complaint := self._complaint(value):
                raise UserError(f"{value} is {complaint}; {flag} names {self.what}")

    def _complaint(self, path: str | Path) -> str | None:
        # Not pathlib, whose functions raise an error at names that are too long.
        if os.path.isdir(path):  # noqa: PTH112
            if not self.folder:
                return "a folder"
            if os.access(path, os.R_OK) and not os.listdir(path):  # noqa: PTH208
                return "an empty folder"
            held = not self.holds or os.path.exists(os.path.join(path, self.holds))  # noqa: PTH110, PTH118
            return None if held else f"a folder without {self.holds}"
        if os.path.isfile(path):  # noqa: PTH113
            return None if self.file else "a file"
        return "neither a file nor a folder" if os.path.exists(path) else "a link to nothing"  # noqa: PTH110


_IMAGES = Input("an image, a folder of images, or a text file of paths", several=True)
_DATA = Input("a folder of images or arrays, or a text file of paths", several=True)
_LABELLED = Input("a folder with a folder for each class, or a CSV file of paths and labels")
_FOLDER = Input("a folder of images", file=False)
_JSON = Input("a JSON file", folder=False)
_LABELS = Input("a folder of label maps", file=False)
_WEIGHTS = Input("a run folder or a weight file", holds="weights", besides="none")

INPUTS: dict[str, Input] = {
    "annotations": _JSON,
    "classes": Input("a text file of class names", folder=False),
    "compare": _WEIGHTS,
    "detect.data": Input("a folder of images and their annotations", file=False),
    "detect.images": _FOLDER,
    "evaluate.data": _LABELLED,
    "evaluate.val_data": _LABELLED,
    "finetune.data": _LABELLED,
    "finetune.val_data": _LABELLED,
    "images": _IMAGES,
    "init_weights": _WEIGHTS,
    "labels": _LABELS,
    "neighbors.data": _IMAGES,
    "predict": _IMAGES,
    "pretrain.data": _DATA,
    "pretrain.val_data": _DATA,
    "probe": _LABELLED,
    "query": _IMAGES,
    "run": Input("the run folder of a training", file=False, holds="config.yaml"),
    "segment.data": Input("a folder of images and their label maps", file=False),
    "segment.images": _FOLDER,
    "statistics.data": _DATA,
    "val_annotations": _JSON,
    "val_images": _FOLDER,
    "val_labels": _LABELS,
    "weights": _WEIGHTS,
}
"""Paths to read, by the name of an argument; by `command.argument` where commands differ."""

PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")

OUTPUTS: dict[str, tuple[str, ...]] = {
    "evaluate": (),
    "predict": (),
    "embed": (".npy", ".parquet"),
    "reconstruct": PICTURES,
    "explain": PICTURES,
    "features": PICTURES,
    "neighbors": PICTURES,
    "report": (".html", ".htm"),
}
"""Endings of the file that a command writes; empty for any."""

EXPORTS: dict[str, tuple[str, ...]] = {
    "timm": (".safetensors", ".pth"),
    "torchvision": (".safetensors", ".pth"),
    "detectron2": (".pkl",),
    "mmdet": (".pth",),
    "mmpretrain": (".pth",),
    "huggingface": (),  # a folder
    "onnx": (".onnx",),
    "torch-export": (".pt2",),
    "spark": (".pth",),
}
"""Endings of exported files by format."""


def check_paths(command: str, arguments: Mapping[str, Any]) -> None:
    """Checks the paths among all arguments of a command, before any work is done for it.

    Raises:
        MissingPath: if one does not exist.
        UserError: if one is of the wrong kind, or must not be replaced.
    """
    for name, value in arguments.items():
        if wanted := INPUTS.get(f"{command}.{name}", INPUTS.get(name)):
            wanted.check(f"--{name.replace('_', '-')}", value)
    if isinstance(model := arguments.get("model"), str):
        _check_code(model)
    if (out := arguments.get("out")) is not None:
        _check_out(command, out, arguments)


def _check_code(model: str) -> None:
    """Checks the file of a network that is named `path/to/file.py:NAME`."""
    file, _, function = (model, "", "") if model.endswith(".py") else model.rpartition(":")
    if not file.endswith(".py"):
        return
    if not os.path.isfile(file):  # noqa: PTH113
        raise MissingPath(f"{file} does not exist; --model path/to/file.py:NAME names a function in a file")
    if not function:
        found = re.findall(r"^def (\w+)", _text_of(file), re.MULTILINE)
        raise UserError(f"{file} is a file; --model names a function in it, {file}:{found[-1] if found else 'NAME'}")


def _text_of(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _check_out(command: str, out: str | Path, arguments: Mapping[str, Any]) -> None:
    """Checks what a command is to write."""
    overwrite = arguments.get("overwrite", command == "report")
    if command == "export":
        if arguments["format"] not in EXPORTS:
            raise UserError(f"there is no format {arguments['format']!r}; {one_of(arguments['format'], [*EXPORTS])}")
        if endings := EXPORTS[arguments["format"]]:
            new_file(out, overwrite, endings)
        else:
            new_folder(out, overwrite)
    elif command in OUTPUTS:
        path = new_file(out, overwrite, OUTPUTS[command])
        if command == "embed" and path.suffix == ".npy":
            new_file(path.with_suffix(".txt"), overwrite)
    elif arguments.get("eval_only") or arguments.get("predict") is not None:
        new_folder(out)
    elif arguments["resume"]:
        RunFolder(out).check_begun()
    elif not any(name in os.environ for name in _PROCESSES):  # else another process may have begun the run already
        RunFolder(out).check_new()
