"""From the demo's run folder to everything that its weights are good for, through the command line."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from originals import original_file
from processes import run
from sparkmim.cli import main
from sparkmim.paths import EXPORTS
from sparkmim.visualize.playground_session import Playground
from sparkmim.visualize.reconstruct import Reconstructor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves, after one epoch; and a table of labels, for which it has no use."""
    folder = tmp_path_factory.mktemp("downstream")
    done = run([sys.executable, ROOT / "examples" / "demo.py", "--out", folder / "demo", "--epochs", 1], folder)
    assert done.returncode == 0, done.stderr
    labels = load_digits().target
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", "split"])
        for index in (*range(200), *range(1300, 1400)):
            part = "train" if index < 1300 else "val"
            name = "test" if part == "val" else "train"
            table.writerow([f"demo/digits/{name}/{index:04d}.png", labels[index], part])
    return folder


@pytest.fixture(scope="module")
def classifier(demo: Path) -> Path:
    arguments = ["--data", "labels.csv", "--weights", "demo/run", "--out", "cls", "--epochs", 10, "--ema", 0.9,
                 "--flip", 0, "--workers", 0]  # fmt: skip
    done = run([sys.executable, "-m", "sparkmim", "finetune", *arguments], demo)
    assert done.returncode == 0, done.stderr
    assert "layer decay 0.8" in done.stderr
    return demo / "cls"


def test_finetune(classifier: Path) -> None:
    metrics = json.loads((classifier / "metrics.json").read_text())
    assert metrics["classes"] == [str(digit) for digit in range(10)]
    assert metrics["best_model"]["top1"] > 0.5
    assert {"best_ema", "last_ema", "last_model"} <= metrics.keys()
    with Image.open(classifier / "confusion.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("protocol", ["knn", "linear", "fewshot"])
def test_evaluate(
    demo: Path, protocol: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    main(["evaluate", "--data", "labels.csv", "--weights", "demo/run", "--protocol", protocol, "--workers", "0"])
    shown = capsys.readouterr()
    assert "random" in shown.out + shown.err
    assert (demo / "demo" / "run" / "evaluation" / f"{protocol}.json").is_file()


def test_predict(demo: Path, classifier: Path) -> None:
    done = run(
        [sys.executable, "-m", "sparkmim", "predict", "--weights", classifier, "demo/digits/test", "--out", "p.csv"],
        demo,
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((demo / "p.csv").read_text().splitlines()))
    assert len(rows) == 497
    labels = load_digits().target
    right = sum(row["class"] == str(labels[int(Path(row["path"]).stem)]) for row in rows)
    assert right > 0.5 * len(rows)


def test_embed(demo: Path) -> None:
    done = run(
        [sys.executable, "-m", "sparkmim", "embed", "--weights", "demo/run", "demo/digits/test", "--out", "f.npy"], demo
    )
    assert done.returncode == 0, done.stderr
    features = np.load(demo / "f.npy")
    assert features.shape == (497, 256)
    assert np.isfinite(features).all()


@pytest.mark.parametrize("format", EXPORTS)
def test_export(
    demo: Path, format: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Every format holds the demo's own network: programs agree with PyTorch, tensors are those of the run."""
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(demo)
    out = Path(f"encoder-{format}{(*EXPORTS[format], '')[0]}")
    main(["export", "--weights", "demo/run", "--format", format, "--out", str(out)])
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1
    if format in ("onnx", "torch-export"):
        assert float(said.split()[-1]) < 1e-4  # the largest difference to PyTorch
        assert out.stat().st_size > 1e6
        return
    assert said.endswith(" tensors under its own names\n")
    if format == "huggingface":
        assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
        out /= "model.safetensors"
    found = _held(out)
    trained = load_file("demo/run/weights/encoder.safetensors")
    prefix = {"mmdet": "backbone.", "mmpretrain": "backbone.", "spark": "sparse_encoder.sp_cnn."}.get(format, "")
    whole = format in ("timm", "torchvision", "huggingface", "mmpretrain")
    expected = {name: tensor for name, tensor in trained.items() if whole or not name.startswith("classifier.")}
    assert len(expected) > 20
    assert {name for name in found if name.startswith(prefix)} == {prefix + name for name in expected}
    assert all(torch.equal(found[prefix + name], tensor) for name, tensor in expected.items())


def _held(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an exported file."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pkl":
        return {name: torch.from_numpy(array) for name, array in pickle.loads(path.read_bytes())["model"].items()}
    content = torch.load(path, weights_only=True)
    tensors = content.get("state_dict", content.get("module", content))
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


@pytest.mark.parametrize(("name", "suffix"), [("onnx", ".onnx"), ("torch-export", ".pt2")])
def test_export_of_a_classifier(
    demo: Path, classifier: Path, name: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(demo)
    main(["export", "--weights", "cls", "--format", name, "--out", f"cls{suffix}"])
    assert (demo / f"cls{suffix}").stat().st_size > 1e6


def test_the_original_form_goes_on(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the form of the original release, of the demo's own network, rebuilds images as the run does."""
    monkeypatch.chdir(demo)
    main(["export", "--weights", "demo/run", "--format", "spark", "--out", "there.pth"])
    model = f"{ROOT}/examples/small_cnn.py:small_cnn"
    for name, weights in (("here", ["demo/run"]), ("there", ["there.pth", "--model", model])):
        main(["reconstruct", "--images", "demo/digits/test/1300.png", "--weights", *weights, "--out", f"{name}.png"])
    with Image.open("here.png") as one, Image.open("there.png") as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight file as the authors released it."""
    return original_file("resnet50", tmp_path_factory.mktemp("original"))


PICTURES = {
    "reconstruct": ["--images", "demo/digits/test/1300.png", "demo/digits/test/1301.png", "--errors", "--masks", 2],
    "features": ["--images", "demo/digits/test", "--limit", 2],
    "neighbors": ["--query", "demo/digits/test/1300.png", "--data", "near", "--workers", 0, "--k", 3],
    "explain": ["vanishing", "--images", "demo/digits/test/1300.png"],
}  # fmt: skip


@pytest.mark.parametrize("source", ["demo", "original"])
@pytest.mark.parametrize("command", PICTURES)
def test_pictures(
    demo: Path, original: Path, command: str, source: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of the demo's run, and of a weight file in the original form."""
    monkeypatch.chdir(demo)
    if not Path("near").exists():
        shutil.copytree("demo/digits/test", "near", ignore=lambda _, names: [name for name in names if name > "1310"])
    weights = ["demo/run"] if source == "demo" else [original, "--image-size", 64]
    out = f"{command}-{source}.png"
    main([command, *map(str, PICTURES[command]), "--out", out, "--weights", *map(str, weights)])
    with Image.open(out) as picture:
        assert min(picture.size) > 200
        assert picture.convert("L").entropy() > 1
    assert out in capsys.readouterr().out


@pytest.mark.parametrize("source", ["demo", "original"])
def test_playground_command(demo: Path, original: Path, source: str) -> None:
    """The command serves its page; tests/browser looks at one."""
    pytest.importorskip("gradio")
    weights = ["demo/run"] if source == "demo" else [original, "--image-size", 64]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sparkmim", "playground", "--port", port, "--weights", *weights]
    with subprocess.Popen(
        list(map(str, command)), cwd=demo, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as server:
        assert server.stdout is not None
        assert "is open at" in server.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}") as page:
            assert b"sparkmim playground" in page.read()
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)


@pytest.mark.parametrize("source", ["demo", "original"])
def test_playground(demo: Path, original: Path, source: str) -> None:
    """What the page does."""
    reconstructor = Reconstructor(demo / "demo" / "run") if source == "demo" else Reconstructor(original, image_size=64)
    playground = Playground([reconstructor])
    view = playground.view(playground.open(demo / "demo" / "digits" / "test" / "1300.png", 0.5))
    assert view.seen.shape == view.rebuilt[0].shape == (448, 448, 3)
    assert np.isfinite(view.losses[0])


def test_report(demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(demo)
    assert Path("demo/run/report.html").is_file()  # each run ends with it
    main(["report", "demo/run", "--out", "again.html"])
    assert "again.html" in capsys.readouterr().out
    text = Path("again.html").read_text()
    assert "small_cnn" in text
    assert "data:image" in text


def test_weights_go_back_into_their_network(demo: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from small_cnn import small_cnn
    finally:
        sys.path.pop(0)
    small_cnn(in_chans=1).load_state_dict(load_file(demo / "demo" / "run" / "weights" / "encoder.safetensors"))
    assert torch.get_num_threads() == 1
