"""Every wrong command line is told in one sentence: those of `wrong_commands.txt`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from sparkmim.cli import main

TABLE = [
    line.split(" => ", 1)
    for line in (Path(__file__).parent / "wrong_commands.txt").read_text(encoding="utf-8").splitlines()
]

FILES = {
    "broken.yaml": b"epochs: [1\n",
    "list.yaml": b"- a\n- b\n",
    "typo.yaml": b"out: run\nepoch: 3\n",
    "synonym.yaml": b"lr: 3\n",
    "value.yaml": b"out: run\nepochs: many\n",
    "date.yaml": b"epochs: 2001-99-99\n",
    "deep.yaml": b"epochs: " + b"[" * 500,
    "binary.yaml": b"\xff\xfe\x00",
    "bomb.yaml": b"a: &a [x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (96 + n, 96 + n, b", ".join([b"*%c" % (95 + n)] * 9)) for n in range(2, 12)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wrong")
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    (root / "photos").mkdir()
    return root


@pytest.mark.parametrize(("command", "sentence"), TABLE, ids=[command for command, _ in TABLE])
def test_a_wrong_command_is_one_sentence(
    command: str, sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command))
    said, complained = capfd.readouterr()
    assert ended.value.code == 2
    assert said == ""
    assert complained.endswith(f": {sentence}\n")
    assert complained.startswith("sparkmim")
    assert complained.count("\n") == 1
    assert len(sentence) <= 200
    assert {path.name for path in folder.iterdir()} == {*FILES, "photos"}  # nothing was begun


def test_the_table_holds_every_command() -> None:
    from sparkmim.cli import COMMANDS

    assert len(TABLE) >= 300
    assert set(COMMANDS) <= {command.split(" ")[0] for command, _ in TABLE}
