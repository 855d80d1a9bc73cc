"""Code that weights or a run name is not run, unless the user has named it."""

from __future__ import annotations

import importlib.util
import json
import py_compile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparkmim
from sparkmim.cli import main
from sparkmim.interop.weights import open_weights
from stopping import StopAt

MARK = "\nfrom pathlib import Path\nPath(__file__).with_name('was_run').touch()\n"


@pytest.fixture
def strange(small_pretraining: dict[str, Any], network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, not finished, as somebody else gives it: its code is not known here, and leaves a mark."""
    run = tmp_path / "run"
    sparkmim.pretrain(**small_pretraining, out=run, callbacks=[StopAt(4)])
    file = Path(network.rpartition(":")[0])
    file.write_text(file.read_text() + MARK)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return run


def was_run(tmp_path: Path) -> bool:
    return (tmp_path / "was_run").exists()


ROUTES: dict[str, Callable[[Path, Path], Any]] = {
    "load": lambda run, photos: sparkmim.load(run),
    "resume": lambda run, photos: sparkmim.pretrain(out=run, resume=True),
    "reconstruct": lambda run, photos: sparkmim.reconstruct(weights=run, images=str(photos)),
    "features": lambda run, photos: sparkmim.features(weights=run, images=str(photos)),
    "embed": lambda run, photos: sparkmim.embed(weights=run, images=str(photos), out=run / "features.npy"),
    "evaluate": lambda run, photos: sparkmim.evaluate(weights=run, data=str(photos), val_split=0.5),
    "export": lambda run, photos: sparkmim.export(weights=run, format="onnx", out=run / "net.onnx"),
    "explain": lambda run, photos: sparkmim.explain(weights=run),
    "finetune": lambda run, photos: sparkmim.finetune(weights=run, data=str(photos), out=run / "classifier"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_code_of_a_stranger_is_not_run(route: str, strange: Path, photos: Path, network: str, tmp_path: Path) -> None:
    with pytest.raises(sparkmim.UserError, match=r"would run code that you have not named before, .*tiny"):
        ROUTES[route](strange, photos)
    assert not was_run(tmp_path)


def test_no_spelling_of_a_path_gets_around_it(
    strange: Path, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = strange / "weights" / "spark.safetensors"
    with safe_open(file, "pt") as opened:
        content = json.loads(opened.metadata()["sparkmim"])
    for name in ("/proc/self/cwd/my_network.py:tiny", "my_network.py:tiny", "./run/../my_network.py:tiny"):
        save_file(load_file(file), file, {"format": "pt", "sparkmim": json.dumps({**content, "model": name})})
        with pytest.raises(sparkmim.UserError, match="would run code"):
            sparkmim.load(file)
    assert not was_run(tmp_path)


def test_code_that_the_user_names_is_trusted_until_it_changes(
    strange: Path, photos: Path, network: str, tmp_path: Path
) -> None:
    sparkmim.embed(weights=strange, images=str(photos), model=network, out=tmp_path / "a.npy")
    assert was_run(tmp_path)
    sparkmim.load(strange)
    assert sparkmim.pretrain(out=strange, resume=True).finished
    file = Path(network.rpartition(":")[0])
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(sparkmim.UserError, match="would run code"):
        sparkmim.load(strange)


def test_trust_is_in_a_function_not_in_all_of_its_file(strange: Path, photos: Path, network: str) -> None:
    """What a stranger names could be a script's `main`, which does other things than to make a network."""
    file = Path(network.rpartition(":")[0])
    file.write_text(file.read_text() + "\n\ndef other():\n    return tiny()\n")
    sparkmim.verify(f"{file}:other", image_size=64)
    with pytest.raises(sparkmim.UserError, match="would run code"):
        sparkmim.load(strange)


def test_bytecode_beside_a_trusted_file_is_not_run(strange: Path, photos: Path, network: str, tmp_path: Path) -> None:
    sparkmim.embed(weights=strange, images=str(photos), model=network, out=tmp_path / "a.npy")
    file = Path(network.rpartition(":")[0])
    copy = tmp_path / "copy" / file.name
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    other = tmp_path / "other.py"
    other.write_text(file.read_text() + "\nraise SystemExit('bytecode was run')\n")
    cached = importlib.util.cache_from_source(str(copy))
    py_compile.compile(str(other), cached, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    weights = strange / "weights" / "spark.safetensors"
    with safe_open(weights, "pt") as opened:
        content = json.loads(opened.metadata()["sparkmim"])
    metadata = {"format": "pt", "sparkmim": json.dumps({**content, "model": f"{copy}:tiny"})}
    save_file(load_file(weights), weights, metadata)
    sparkmim.load(weights)


def test_the_shell_may_trust(strange: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["embed", str(photos), "--weights", str(strange), "--out", str(tmp_path / "a.npy")]
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().err.count("\n") == 1
    main([*words, "--trust"])
    assert was_run(tmp_path)
    with pytest.raises(sparkmim.UserError, match="would run code"):
        open_weights(strange).encoder()  # it was for that command alone
