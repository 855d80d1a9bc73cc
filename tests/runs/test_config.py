"""The config of a run: what was asked, for a machine; what was settled, for people."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sparkmim.errors import UserError
from sparkmim.runs.config import commented_yaml
from sparkmim.runs.folder import RunFolder

ASKED = {"recipe": "paper", "epochs": None, "accelerator": "auto", "augment": "auto", "mean": None, "model": None,
         "seed": 0, "init_weights": None, "image_size": (32, 48), "devices": "auto"}  # fmt: skip
SETTLED = {"recipe": "paper", "epochs": 1600, "accelerator": "cuda", "augment": "auto", "mean": [0.5, 0.25],
           "model": None, "seed": 0, "init_weights": None, "image_size": (32, 48), "devices": 1}  # fmt: skip


def test_what_was_left_open_is_noted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_config({**ASKED, "data": [object()]}, {**SETTLED, "data": [object()]}, ["data"])
    assert folder.config.read_text().splitlines() == [
        "# Python objects, to be given again: data",
        "recipe: paper",
        "epochs:  # 1600 (recipe paper)",
        "accelerator: auto  # cuda (this machine)",
        "augment: auto",
        "mean:  # [0.5, 0.25] (derived)",
        "model:",
        "seed: 0",
        "init_weights:",
        "image_size: [32, 48]",
        "devices: auto  # 1 (this machine)",
        "data:",
    ]
    assert folder.read_config() == {**ASKED, "image_size": [32, 48], "data": None, "from_python": ["data"]}


def test_values_come_back_from_one_line_each() -> None:
    values = {
        "path": Path("a/b c"), "words": "x: y # z", "lines": "a\nb", "end": "a\n", "wide": "ü" * 300,
        "separator": "\u2028", "small": 1e-5, "truth": True, "text": "null", "empty": "", "nothing": None,
        "nested": [1, None, {"k": "v, w"}], "digits": "12", "long": "a b " * 200,
    }  # fmt: skip
    text = commented_yaml(values, dict.fromkeys(values, "first\nsecond: third"))
    assert len(text.splitlines()) == len(values)
    assert yaml.safe_load(text) == {**values, "path": "a/b c"}


@pytest.mark.parametrize("content", [b"a: [1", b"just words", b"", b"a: \xff"])
def test_a_damaged_config_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.config.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as the settings of a run; repair it"):
        folder.read_config()
