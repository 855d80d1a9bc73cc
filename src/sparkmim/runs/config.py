"""`config.yaml`: arguments as the user gave them, with what was settled for the open ones as comments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

_MACHINE = ("accelerator", "devices", "precision", "workers")
_DERIVED = (
    "channels", "classes", "feature_modules", "ignore", "masks", "mean", "model", "patch_size", "stages", "std",
)  # fmt: skip

ONCE = ("resume", "accept_changed_data")
"""Switches that concern one call, and are not kept."""


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases, by which a few lines can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)


def read_yaml(text: str) -> Any:
    """Reads YAML without aliases; raises a `yaml.YAMLError` if it is none."""
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 (a safe loader)
    except (ArithmeticError, RecursionError, TypeError, ValueError) as error:  # such as the date 2001-99-99
        raise yaml.YAMLError(str(error)) from error


def open_value(name: str, value: Any) -> bool:
    """Returns whether the value of an argument leaves the decision to the package.

    Example:
        >>> open_value("epochs", None), open_value("devices", "auto"), open_value("augment", "auto")
        (True, True, False)
    """
    return value is None or (name in _MACHINE and isinstance(value, str) and value == "auto")


def decided_by(name: str, asked: Any, settled: Any, recipe: Any) -> str:
    """Returns who settled the value of an argument that was left open: `this machine`, the recipe, or `derived` from
    network, weights or data; empty if it was not left open, or still is."""
    if not open_value(name, asked) or open_value(name, settled):
        return ""
    return "this machine" if name in _MACHINE else "derived" if name in _DERIVED else f"recipe {recipe}"


def settled_notes(asked: Mapping[str, Any], settled: Mapping[str, Any]) -> dict[str, str]:
    """Returns notes such as `200 (recipe default)` for the arguments that were left open and then settled."""
    who = {name: decided_by(name, value, settled.get(name), asked.get("recipe")) for name, value in asked.items()}
    return {name: f"{_one_line(settled[name])} ({decided})" for name, decided in who.items() if decided}


def commented_yaml(values: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """Writes values as YAML, one line each, with notes as comments. None becomes an empty value.

    Example:
        >>> print(commented_yaml({"epochs": None, "image_size": (32, 32)}, {"epochs": "200 (recipe default)"}), end="")
        epochs:  # 200 (recipe default)
        image_size: [32, 32]
    """
    lines = []
    for name, value in values.items():
        line = f"{name}:" if value is None else f"{name}: {_one_line(value)}"
        note = " ".join(notes.get(name, "").split())
        lines.append(f"{line}  # {note}\n" if note else f"{line}\n")
    return "".join(lines)


def _one_line(value: Any) -> str:
    """Returns YAML that fits behind a key."""
    value = str(value) if isinstance(value, PurePath) else value
    breaks = isinstance(value, str) and value.splitlines() != [value]
    # Inside a flow mapping PyYAML writes scalars without its end-of-document marker.
    text: str = yaml.safe_dump(
        {"_": value}, default_flow_style=True, default_style='"' if breaks else None, width=math.inf, sort_keys=False
    )
    return text.strip()[1:-1].partition(":")[2].strip()
