"""Arguments as YAML: `config.yaml` of a run folder, and what `--print_config` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def commented_yaml(values: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """Writes arguments as YAML, with notes behind those left open.

    Args:
        values: plain values by name; None is written as an empty value.
        notes: by name, what an open argument is settled to.

    Example:
        >>> print(commented_yaml({"epochs": None, "seed": 0}, {"epochs": "200 (recipe default)"}), end="")
        epochs:  # 200 (recipe default)
        seed: 0
    """
    lines = []
    for name, value in values.items():
        line = f"{name}:" if value is None else f"{name}: {plain_yaml(value)}"
        lines.append(f"{line}  # {notes[name]}\n" if name in notes else f"{line}\n")
    return "".join(lines)


def plain_yaml(value: Any) -> str:
    """Writes one value as YAML on one line.

    Example:
        >>> plain_yaml([1, 2]), plain_yaml("a: b"), plain_yaml(0.5)
        ('[1, 2]', "'a: b'", '0.5')
    """
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return str(text).removesuffix("...\n").rstrip("\n")
