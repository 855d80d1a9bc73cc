"""Whatever a name holds, it is printed and written as letters; and files go by such names through a whole training."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image
from rich.table import Table

from sparkmim.cli import main
from sparkmim.terminal import Terminal, printable, written

ODD = [
    b"caf\xe9.png", b"a\nsparkmim: done.png", b"\x1b[31mred.png", b"[red]x[b].png", b"a\\xe9.png", b"$a^{$.png",
    "line\u2028right\u202eleft.png".encode(), b":car: \xff\xfe.png",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_printable_and_turn_back(name: bytes) -> None:
    path = os.fsdecode(name)
    assert printable(path).isprintable()
    assert os.fsdecode(written(path).encode().decode("unicode_escape").encode("latin-1")) == path


def test_other_names_stay() -> None:
    for name in ("photos/IMG 0001 (ü).jpg", "写真.png", "r18[lr=0.002]"):
        assert printable(name) == written(name) == name
    assert printable("\ud800") == r"\xed\xa0\x80"  # half of a pair, from JSON


def test_a_terminal_obeys_no_name() -> None:
    terminal = Terminal()
    terminal.file = io.StringIO()
    table = Table("[red]head")
    table.add_row("\x1b[31m[/new] :car:")
    terminal.print("r18[lr=0.002] [/new]\nsecond \x1b[2J")
    terminal.print(table)
    said = terminal.file.getvalue()
    assert "r18[lr=0.002] [/new]\nsecond \\x1b[2J\n" in said
    assert "[red]head" in said
    assert "\\x1b[31m[/new] :car:" in said


def test_a_training_on_odd_names(network: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    classes = [os.fsencode(tmp_path) + b"/data/" + name for name in (b"[new]", b"\x1b[2J$_{", b"caf\xe9")]
    for folder in classes:
        os.makedirs(folder)  # noqa: PTH103 (bytes)
        for number, name in enumerate(ODD):
            path = os.fsdecode(folder + b"/" + name)
            Image.new("RGB", (16, 16), (30 * number, 60, 90)).save(path)
        Path(os.fsdecode(folder + b"/broken " + ODD[1])).write_bytes(b"no picture")
    out = tmp_path / "r18[lr=0.002]"
    flags = {"data": tmp_path / "data", "out": out, "model": network, "image-size": 16, "epochs": 1, "val-split": 0.3,
             "workers": 0, "batch-size": 8, "max-unreadable": 0.5, "warmup-epochs": 0, "augment": "none"}  # fmt: skip
    main(["finetune", *(f"--{name}={value}" for name, value in flags.items())])
    said, complained = capfd.readouterr()
    assert "\x1b" not in said + complained
    assert "Logging error" not in complained
    assert "r18[lr=0.002]" in complained.replace("\n", "")
    log = (out / "log.txt").read_text(encoding="utf-8")
    assert r"broken a\x0asparkmim: done.png: not an image" in log
    page = (out / "report.html").read_text(encoding="utf-8")
    assert r"\x1b[2J$_{" in page
    assert r"caf\xe9" in page
    assert "\x1b" not in page + log
    assert (out / "confusion.png").is_file()
    with pytest.raises(SystemExit):
        main(["finetune", *(f"--{name}={value}" for name, value in flags.items()), "--out", os.fsdecode(b"\xe9")])
    assert r"the name of \xe9 is not UTF-8; choose another --out" in capfd.readouterr().err
