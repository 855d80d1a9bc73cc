"""Every wrong command line is told in one sentence: those of `wrong_commands.txt`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from PIL import Image

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
    "begun/config.yaml": b"epochs: 3\n",
    "begun/weights/spark.safetensors": b"",
    "binary.txt": b"\xff\xfe\x00",
    "blank.txt": b"# no image\n",
    "damaged/a.jpg": b"no image",
    "full/letter.txt": b"Dear all",
    "lost.txt": b"photos/a.png\nphotos/z.png\n",
    "net.py": b"""import math


def tiny(width):
    return None


def failing(in_chans=3):
    return broken(0)


def broken(size):
    return math.log(size)


def number():
    return 3
""",
    "nothing.csv": b"",
    "own/importing.py": b"import math\nimport nowhere\n",
    "own/leaving.py": b"import sys\n\nsys.exit(3)\n",
    "own/syntax.py": b"def net():\n    return (\n",
    "page.pth": b"<html>not found</html>",
    "page.safetensors": b"<html>not found</html>",
    "table.csv": b"name,kind\na.png,cat\n",
    "taken.csv": b"taken",
    "taken.html": b"taken",
    "taken.npy": b"taken",
    "taken.onnx": b"taken",
    "taken.png": b"taken",
    "taken.txt": b"taken",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the table's commands name."""
    root = tmp_path_factory.mktemp("wrong")
    for name, content in FILES.items():
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(content)
    (root / "empty").mkdir()
    (root / "link").symlink_to("nowhere")
    for name in ("photos/a.png", "photos/b.png", "labelled/cat/a.png", "labelled/dog/a.png", "single/cat/a.png"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (8, 8), "red").save(root / name)
    return root


@pytest.mark.parametrize(("command", "sentence"), TABLE, ids=[command for command, _ in TABLE])
def test_a_wrong_command_is_one_sentence(
    command: str, sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(command))
    said, complained = capfd.readouterr()
    assert ended.value.code == 2
    assert said == ""
    assert complained.replace(f"{folder}/", "").endswith(f": {sentence}\n")
    assert complained.startswith("sparkmim")
    assert complained.count("\n") == 1
    assert len(sentence) <= 200
    assert sorted(folder.rglob("*")) == before  # nothing was begun


def test_the_table_holds_every_command() -> None:
    from sparkmim.cli import COMMANDS

    assert len(TABLE) >= 300
    assert set(COMMANDS) <= {command.split(" ")[0] for command, _ in TABLE}
