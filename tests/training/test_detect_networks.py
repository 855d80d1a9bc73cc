"""Networks of each family through every step of detection, by the command alone.

One of them on a few small images. `COCO=folder/ pytest tests/training/test_detect_networks.py` takes all, and the first
images of that folder, which has the form of COCO's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from coco_files import annotation, write_coco
from PIL import Image

from sparkmim.cli import main
from sparkmim.interop.weights import open_weights

NETWORKS = ["convnext_atto"]
if "COCO" in os.environ:
    NETWORKS += ["efficientnet_b0", "resnet18", "resnet50"]
PARTS = ("train2017", "val2017")
IMAGES = 4
STEPS = 3


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts of four images each."""
    root = tmp_path_factory.mktemp("coco")
    if "COCO" in os.environ:
        (root / "annotations").mkdir()
        for part in PARTS:
            (root / part).symlink_to(Path(os.environ["COCO"]).resolve() / part)
            file = Path("annotations") / f"instances_{part}.json"
            content = json.loads((Path(os.environ["COCO"]) / file).read_text())
            content["images"] = content["images"][:IMAGES]
            shown = {image["id"] for image in content["images"]}
            content["annotations"] = [one for one in content["annotations"] if one["image_id"] in shown]
            (root / file).write_text(json.dumps(content))
        return root
    found = [annotation(10, 3, (5, 5, 30, 30)), annotation(11, 7, (30, 10, 25, 30)), annotation(12, 12, (9, 8, 40, 36))]
    for part in PARTS:
        write_coco(root, found, images=IMAGES, part=part)
    return root


def interrupted(command: list[str], folder: Path) -> str:
    """Sends Ctrl-C as soon as the log has a first epoch; what the command says."""
    with subprocess.Popen(
        [sys.executable, "-m", "sparkmim", *command], cwd=folder, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        log = folder / "run" / "log.txt"
        while process.poll() is None and not (log.exists() and "epoch 1/" in log.read_text()):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    return said


@pytest.mark.parametrize("model", NETWORKS)
def test_every_step(
    coco: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trains, is stopped after a checkpoint, goes on to the end, is scored, and finds things on pictures."""
    monkeypatch.chdir(tmp_path)
    train = ["detect", "--data", str(coco), "--model", model, "--out", "run", "--epochs", str(STEPS), "--batch-size",
             str(IMAGES), "--short-sides", "[64]", "--eval-short-side", "64", "--long-side", "96", "--regions", "8",
             "--warmup-iterations", "1", "--workers", "0", "--eval-every", str(STEPS),
             "--precision", "32-true"]  # fmt: skip
    said = interrupted(train, tmp_path)
    assert f"of {STEPS}; continue with --out run --resume" in said
    assert Path("run/checkpoints/last.ckpt").is_file()
    assert not Path("run/metrics.json").exists()  # the end has not been reached, nor scored

    main(["detect", "--out", "run", "--resume"])
    assert "done: weights in run/weights" in capsys.readouterr().err
    trained = json.loads(Path("run/metrics.json").read_text())
    assert trained["history"][-1]["step"] == STEPS
    opened = open_weights("run")
    assert (opened.kind, opened.model) == ("detector", model)

    main(["detect", "--data", str(coco), "--weights", "run/weights/detector.safetensors", "--eval-only", "--out",
          "scores", "--workers", "0", "--precision", "32-true"])  # fmt: skip
    scored = json.loads(Path("scores/metrics.json").read_text())
    for name in ("bbox/AP", "segm/AP"):
        assert scored[name] == pytest.approx(trained[name], abs=1e-6)

    pictures = sorted((coco / "val2017").iterdir())[:2]
    main(["detect", "--predict", *map(str, pictures), "--weights", "run", "--out", "seen"])
    drawn = sorted(Path("seen").glob("*.jpg"))
    assert len(drawn) == len(json.loads(Path("seen/detections.json").read_text())["images"]) == 2
    for picture, drawing in zip(pictures, drawn, strict=True):
        with Image.open(picture) as one, Image.open(drawing) as other:
            assert one.size == other.size
