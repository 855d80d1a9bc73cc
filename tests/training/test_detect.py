"""Training, scoring and using detectors through the command line and from Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import annotation, write_coco
from PIL import Image

import sparkmim
from interrupting import InterruptAt
from sparkmim.cli import main
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import open_weights
from sparkmim.models import create_encoder
from sparkmim.runs.history import read_history

SMALL = ["--short-sides", "[48]", "--eval-short-side", "48", "--long-side", "64", "--workers", "0",
         "--warmup-iterations", "2", "--precision", "32-true", "--regions", "16"]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two parts of three images each, with three classes, of which one image shows nothing."""
    root = tmp_path / "coco"
    for part in ("train2017", "val2017"):
        write_coco(
            root, [annotation(10, 3, (5, 5, 30, 30)), annotation(10, 7, (30, 10, 25, 30)),
                   annotation(11, 12, (10, 8, 40, 36))], part=part
        )  # fmt: skip
    return root


def settings(data: Path, network: str, out: Path) -> dict[str, Any]:
    return {
        "data": data, "model": network, "out": out, "epochs": 3, "batch_size": 1, "short_sides": [48],
        "eval_short_side": 48, "long_side": 64, "workers": 0, "warmup_iterations": 2, "precision": "32-true",
        "eval_every": 3, "regions": 16,
    }  # fmt: skip


def test_resumes_exactly(data: Path, network: str, tmp_path: Path) -> None:
    whole = sparkmim.detect(**settings(data, network, tmp_path / "whole"))
    assert whole.finished
    assert whole.steps == 9
    assert set(whole.figures) >= {"bbox/AP", "segm/AP", "bbox/AR100"}
    part = sparkmim.detect(**settings(data, network, tmp_path / "part"), callbacks=[InterruptAt(4)])
    assert not part.finished
    assert part.step in (4, 5)
    rest = sparkmim.detect(out=tmp_path / "part", resume=True)
    assert rest.finished
    expected, found = whole.model.state_dict(), rest.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert rest.figures == pytest.approx(whole.figures, nan_ok=True)


def test_commands(
    data: Path, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train from pretrained weights, score, and predict; an EXIF-free picture and a broken one among the images."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    pretrained = sparkmim.SparK(network, image_size=16, decoder_width=16)
    from sparkmim.interop import weights

    known = {"model": network, "image_size": [16, 16], "decoder_width": 16, "channels": 3, "mean": [0.4] * 3,
             "std": [0.3] * 3}  # fmt: skip
    weights.save(pretrained, tmp_path / "pre" / "weights", WeightsMetadata(**known))
    main(["detect", "--data", str(data), "--weights", "pre", "--out", "det", "--iterations", "2", "--batch-size", "2",
          "--frozen-stages", "1", *SMALL])  # fmt: skip
    said = capsys.readouterr().err
    assert "frozen stages 1" in " ".join(said.split())
    assert "Mask R-CNN on" in said
    assert "from pre" in said
    assert "report:" in said
    assert ">Detection<" in (tmp_path / "det" / "report.html").read_text()
    trained = json.loads((tmp_path / "det" / "metrics.json").read_text())
    opened = open_weights(tmp_path / "det")
    assert opened.kind == "detector"
    assert opened.metadata.mean == [0.4] * 3
    assert opened.metadata.classes == ["cat", "dog", "owl"]
    encoder, before = opened.encoder().state_dict(), pretrained.encoder.state_dict()  # a start for others too
    assert all(torch.equal(encoder[name], before[name]) for name in encoder if name.startswith("stem."))
    assert not torch.equal(encoder["body.0.weight"], before["body.0.weight"])

    main(["detect", "--data", str(data), "--weights", "det/weights/detector.safetensors", "--eval-only",
          "--out", "scored", "--precision", "32-true"])  # fmt: skip
    scored = json.loads((tmp_path / "scored" / "metrics.json").read_text())
    assert scored["bbox/AP"] == pytest.approx(trained["bbox/AP"], abs=1e-9)
    assert scored["segm/AP"] == pytest.approx(trained["segm/AP"], abs=1e-9)

    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)).save(photos / "noise.png")
    (photos / "broken.jpg").write_bytes(b"nothing")
    main(["detect", "--predict", "photos", str(data / "val2017" / "10.png"), "--weights", "det", "--out", "seen"])
    found = json.loads((tmp_path / "seen" / "detections.json").read_text())
    assert [Path(image["file_name"]).name for image in found["images"]] == ["noise.png", "10.png"]
    assert {category["id"] for category in found["categories"]} == {3, 7, 12}
    for detection in found["annotations"]:
        left, top, width, height = detection["bbox"]
        image = found["images"][detection["image_id"] != found["images"][0]["id"]]
        assert -0.01 <= left <= left + width <= image["width"] + 0.01
        assert -0.01 <= top <= top + height <= image["height"] + 0.01
        assert detection["segmentation"]["size"] == [image["height"], image["width"]]
    assert len(list((tmp_path / "seen").glob("*.jpg"))) == 2
    assert "broken.jpg" in capsys.readouterr().err


def test_boxes_alone(data: Path, network: str, tmp_path: Path) -> None:
    result = sparkmim.detect(**settings(data, network, tmp_path / "run") | {"epochs": 1, "masks": False, "ema": 0.5})
    assert "segm/AP" not in result.figures
    files = {path.stem for path in (tmp_path / "run" / "weights").iterdir()}
    assert {"detector", "detector_ema"} <= files


def test_validation_may_have_fewer_categories(data: Path, network: str, tmp_path: Path) -> None:
    """Detections of the other one count for nothing, when it is trained and when it is scored."""
    file = data / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    for part in ("categories", "annotations"):
        content[part] = [entry for entry in content[part] if entry.get("category_id", entry["id"]) != 7]
    file.write_text(json.dumps(content))
    trained = sparkmim.detect(**settings(data, network, tmp_path / "run") | {"epochs": 1, "masks": False})
    (data / "annotations" / "instances_train2017.json").unlink()  # not needed to score
    shutil.rmtree(data / "train2017")
    known: dict[str, Any] = {"data": data, "weights": tmp_path / "run", "eval_only": True, "precision": "32-true"}
    scored = sparkmim.detect(**known, out=tmp_path / "scored")
    assert scored.figures == pytest.approx(trained.figures, nan_ok=True)
    found = json.loads((tmp_path / "scored" / "detections.json").read_text())
    assert {detection["category_id"] for detection in found} <= {3, 7, 12}
    content["categories"].append({"id": 8, "name": "cow"})
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1 category that .*detector.* does not have .* cow \(id 8\)"):
        sparkmim.detect(**known, out=tmp_path / "other")


def test_a_detector_is_used_as_asked(data: Path, network: str, tmp_path: Path) -> None:
    """Sizes, colours and masks other than those of training; images without masks."""
    sparkmim.detect(**settings(data, network, tmp_path / "run") | {"iterations": 1, "epochs": None})
    known: dict[str, Any] = {"data": data, "weights": tmp_path / "run", "eval_only": True}
    change = {"eval_short_side": 96, "long_side": 130, "mean": [0.1] * 3, "std": [0.2] * 3, "masks": False}
    scored = sparkmim.detect(**known, **change, out=tmp_path / "other", precision="bf16-mixed")
    model: Any = scored.model
    assert (model.transform.min_size, model.transform.max_size) == ((96,), 130)
    assert (model.transform.image_mean, model.transform.image_std) == ([0.1] * 3, [0.2] * 3)
    assert model.backbone.low_precision
    assert "segm/AP" not in scored.figures
    assert "segmentation" not in json.loads((tmp_path / "other" / "detections.json").read_text())[0]
    file = data / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    file.write_text(json.dumps(content))
    boxes = sparkmim.detect(**known, out=tmp_path / "boxes", precision="32-true")
    assert "bbox/AP" in boxes.figures
    assert "segm/AP" not in boxes.figures
    plain: Any = boxes.model
    assert not plain.backbone.low_precision
    sparkmim.detect(**settings(data, network, tmp_path / "plain") | {"iterations": 1, "epochs": None, "masks": False})
    with pytest.raises(ValueError, match="finds boxes alone; leave out --masks"):
        sparkmim.detect(**known | {"weights": tmp_path / "plain"}, masks=True, out=tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 5}, "epochs 3 and iterations 5 both say how long to train"),
        ({"clip_grad": -1.0}, "clip_grad is -1.0; it must be 0 or more"),
        ({"model": None}, "no model given; --model names the network"),
        ({"data": None}, "there are no images to train on; name them as --annotations and --images"),
        ({"annotations": __file__}, "annotations and images go together"),
        ({"recipe": "best"}, "there is no recipe 'best'"),
        ({"layer_decay": 2.0}, "layer_decay is 2.0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"eval_only": True}, "no weights given; --weights names the run folder or the weight file of a detector"),
        ({"weights": "nowhere"}, "nowhere does not exist"),
        ({"short_sides": []}, "short"),
        ({"frozen_stages": 3}, r"frozen_stages is 3; Tiny has 2 stages, so it takes 0 \(none\) to 2"),
    ],
)
def test_mistakes(data: Path, network: str, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparkmim.detect(**{**settings(data, network, tmp_path / "run"), **change})
    assert not (tmp_path / "run").exists()


def test_weights_of_grey_images(data: Path, network: str, tmp_path: Path) -> None:
    grey = tmp_path / "grey.safetensors"
    metadata = WeightsMetadata(model=network, image_size=[16, 16], channels=1, mean=[0.5], std=[0.2])
    weights.write(create_encoder(network, 1), grey, metadata)
    with pytest.raises(
        ValueError, match="grey.safetensors takes images of 1 channel, but detectors take colour images"
    ):
        sparkmim.detect(**settings(data, network, tmp_path / "run") | {"weights": grey, "model": None})
    assert not (tmp_path / "run").exists()


def test_broken_data_are_told_all_at_once(data: Path, network: str, tmp_path: Path) -> None:
    (data / "train2017" / "10.png").unlink()
    file = data / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"].append(annotation(11, 99, (0, 0, 5, 5), id=50))
    content["annotations"].append(annotation(11, 3, (3, 3, 0, 5), id=51))
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cannot be used as it is") as failure:
        sparkmim.detect(**settings(data, network, tmp_path / "run"))
    text = str(failure.value)
    assert "10.png" in text
    assert "99" in text
    assert "worth knowing" in text


def test_weights_of_something_else(data: Path, network: str, tmp_path: Path) -> None:
    from sparkmim.interop import weights
    from sparkmim.models import create_encoder

    weights.write(create_encoder(network), tmp_path / "encoder.safetensors", WeightsMetadata(model=network, channels=3))
    with pytest.raises(ValueError, match="holds no detector; `sparkmim detect` makes one"):
        sparkmim.detect(weights=tmp_path / "encoder.safetensors", predict=str(data), out=tmp_path / "seen")


def test_unreadable_validation_images_are_in_the_history_once(data: Path, network: str, tmp_path: Path) -> None:
    """And so in the report."""
    broken = sorted((data / "val2017").rglob("*.*"))[0]
    broken.write_bytes(broken.read_bytes()[:-60])
    sparkmim.detect(**settings(data, network, tmp_path / "run") | {"epochs": 2, "eval_every": 1})
    found = [event for event in read_history(tmp_path / "run" / "history.jsonl") if event.kind == "unreadable"]
    assert [(event.fields["image"], event.fields["part"]) for event in found] == [(str(broken), "validation")]
    assert broken.name in (tmp_path / "run" / "report.html").read_text()
