"""What the documentation shows works: its Python is run, its commands are parsed, its examples are exact."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import sparkmim
from sparkmim.cli import COMMANDS, build_parser
from sparkmim.sparse.packed import RULES
from sparkmim.words import spell

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(RULES)
    scope: dict[str, object] = {}
    try:
        for block in blocks(page, "python"):
            if "runs/" not in block:  # needs a run
                exec(compile(block, str(page), "exec"), scope)
    finally:
        RULES.clear()
        RULES.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page: Path) -> None:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    for command in (line.split("#")[0] for line in lines):
        words = shlex.split(command)
        if "sparkmim" in words:
            arguments = [word for word in words[words.index("sparkmim") + 1 :] if word != "--print_config"]  # exits
            build_parser().parse_args(spell(arguments, COMMANDS))


@pytest.mark.parametrize(
    ("example", "settings"),
    [
        ("own_rule.py:quantised_cnn", {"image_size": 16}),
        ("small_cnn.py:small_cnn", {"image_size": 32}),
        ("convnext_3d.py:convnext_3d", {"image_size": [32, 32, 32], "channels": 1}),
    ],
)
def test_examples_are_exact(example: str, settings: dict[str, object]) -> None:
    before = dict(RULES)
    torch.manual_seed(0)
    try:
        report = sparkmim.verify(str(ROOT / "examples" / example), **settings)
    finally:
        RULES.clear()
        RULES.update(before)
    assert report.exact, report.message


def test_every_page_is_linked() -> None:
    text = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    for page in PAGES[1:]:
        assert page.name in text, f"nothing links to {page.name}"


def test_recipes_page_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "recipes.py"))["page"]()
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == page, "run `python docs/recipes.py`"
