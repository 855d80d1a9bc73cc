"""Training, scoring and using segmenters through the command line and from Python."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from label_map_files import NAMES, shapes, write_label_map, write_shapes
from PIL import Image

import sparkmim
from interrupting import InterruptAt
from sparkmim.cli import main
from sparkmim.data.label_maps import IGNORED, read_values
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import open_weights
from sparkmim.models import create_encoder
from sparkmim.models.segmenter import create_segmenter
from sparkmim.runs.history import read_history
from sparkmim.training.modules import OptimizerSettings, SegmentModule
from sparkmim.training.recipes import SEGMENT_RECIPES
from sparkmim.training.segment import Segmentation

SMALL = {
    "crop": 32, "short_side": 32, "eval_short_side": 32, "workers": 0, "warmup_iterations": 2, "precision": "32-true",
}  # fmt: skip
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four images to train on, and three to validate on, of four classes."""
    return write_shapes(tmp_path / "shapes")


def settings(data: Path, network: str, out: Path) -> dict[str, Any]:
    return {**SMALL, "data": data, "model": network, "out": out, "epochs": 3, "batch_size": 2, "eval_every": 2.5}


def pretrained(folder: Path, network: str) -> sparkmim.SparK:
    torch.manual_seed(1)
    model = sparkmim.SparK(network, image_size=16, decoder_width=16)
    known = {"model": network, "image_size": [16, 16], "decoder_width": 16, "channels": 3, "mean": [0.4] * 3,
             "std": [0.3] * 3}  # fmt: skip
    weights.save(model, folder / "weights", WeightsMetadata(**known))
    return model


@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "accumulate": 2, "schedule": "linear"}])
def test_resumes_exactly(data: Path, network: str, tmp_path: Path, more: dict[str, Any]) -> None:
    whole = sparkmim.segment(**settings(data, network, tmp_path / "whole"), **more)
    assert whole.finished
    assert whole.steps == 6
    assert set(whole.figures) == {"mIoU", "pixel_accuracy"}
    part = sparkmim.segment(**settings(data, network, tmp_path / "part"), **more, callbacks=[InterruptAt(2)])
    assert not part.finished
    rest = sparkmim.segment(out=tmp_path / "part", resume=True)
    assert rest.finished
    expected, found = whole.model.state_dict(), rest.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert rest.figures == whole.figures
    files = {path.name for path in (tmp_path / "whole" / "weights").iterdir()}
    assert files == {path.name for path in (tmp_path / "part" / "weights").iterdir()}
    assert {"segmenter.safetensors", "segmenter_best.safetensors"} <= files
    assert ("segmenter_ema.safetensors" in files) == bool(more)
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert metrics == json.loads((tmp_path / "part" / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics["history"]] == [5, 6]
    assert list(metrics["per_class"]) == NAMES


def test_it_learns(tmp_path: Path, network: str) -> None:
    """Shapes of their own colours, told apart much better than by chance after a few seconds."""
    root = write_shapes(tmp_path / "shapes", train=24, val=6)
    change = {"epochs": 12, "batch_size": 4, "learning_rate": 1e-2, "crop": 48, "short_side": 64, "eval_short_side": 64}
    trained = sparkmim.segment(**settings(root, network, tmp_path / "run") | change)
    change |= {"epochs": 0.01, "learning_rate": 1e-9}
    random = sparkmim.segment(**settings(root, network, tmp_path / "random") | change)
    assert random.figures["mIoU"] < 0.3
    assert trained.figures["mIoU"] > 0.65
    assert trained.figures["pixel_accuracy"] > 0.9


def test_commands(
    data: Path, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train from pretrained weights, score, predict; embed and export the encoder; a broken image among the others."""
    monkeypatch.chdir(tmp_path)
    before = pretrained(tmp_path / "pre", network).encoder.state_dict()
    main(["segment", "--data", str(data), "--weights", "pre", "--out", "seg", "--iterations", "2", "--batch-size", "2",
          *FLAGS])  # fmt: skip
    said = capsys.readouterr().err
    for words in ("Panoptic FPN's head on", "from pre", "layer decay 0.8", "pixel accuracy", "bar", "report:"):
        assert words in said
    assert ">Segmentation<" in (tmp_path / "seg" / "report.html").read_text()
    opened = open_weights(tmp_path / "seg")
    assert opened.kind == "segmenter"
    assert opened.path.name == "segmenter_best.safetensors"
    assert opened.metadata.classes == NAMES
    assert opened.metadata.mean == [0.4] * 3
    encoder = opened.encoder().state_dict()
    assert torch.allclose(encoder["stem.0.weight"], before["stem.0.weight"], atol=1e-2)  # started from it
    assert not torch.equal(encoder["stem.0.weight"], before["stem.0.weight"])

    main(["segment", "--data", str(data), "--weights", "seg/weights/segmenter.safetensors", "--eval-only", "--out",
          "scores", "--precision", "32-true"])  # fmt: skip
    trained = json.loads((tmp_path / "seg" / "metrics.json").read_text())
    scored = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert scored == {name: trained[name] for name in ("mIoU", "pixel_accuracy", "per_class")}

    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(shapes(7, 50, 70)[0]).save(photos / "a.jpg")
    (photos / "broken.jpg").write_bytes(b"nothing")
    Image.new("L", (33, 21), 90).save(photos / "grey.png")
    capsys.readouterr()
    main(["segment", "--predict", "photos", str(data / "images" / "val" / "even"), "--weights", "seg", "--out", "seen"])
    said = capsys.readouterr().err
    assert "left out: " in said
    assert "broken.jpg" in said
    assert "4 images, " in said
    assert "of 4 classes found: seen" in said
    names = sorted(path.name for path in (tmp_path / "seen").iterdir())
    assert names == [
        f"0000{number}-{name}.{end}" for number, name in ((1, "a"), (3, "grey"), (4, "1000"), (5, "1002"))
        for end in ("jpg", "png")
    ]  # fmt: skip
    values = read_values(tmp_path / "seen" / "00003-grey.png")
    assert values.shape == (21, 33)
    assert values.max() < 4

    main(["embed", "photos", "--weights", "seg", "--out", "features.npy", "--image-size", "16"])
    assert np.load(tmp_path / "features.npy").shape == (2, 16)
    main(["export", "--weights", "seg", "--format", "torch-export", "--out", "encoder.pt2", "--image-size", "16"])
    assert (tmp_path / "encoder.pt2").is_file()


def test_predictions_are_those_that_are_scored(data: Path, network: str, tmp_path: Path) -> None:
    """And they are written with the numbers of the label maps, where these count from 1."""
    for path in (data / "labels").rglob("*.png"):
        write_label_map(path, read_values(path) + 1)
    change = {"reduce_labels": True, "epochs": 1}
    result = sparkmim.segment(**settings(data, network, tmp_path / "run") | change)
    sparkmim.segment(
        weights=tmp_path / "run", predict=str(data / "images" / "val"), out=tmp_path / "seen", precision="32-true"
    )
    found = [read_values(path) for path in sorted((tmp_path / "seen").glob("*.png"))]
    truth = [read_values(path) for path in sorted((data / "labels" / "val").rglob("*.png"))]
    assert min(values.min() for values in found) >= 1
    right = np.mean([predicted == true for predicted, true in zip(found, truth, strict=True)])
    assert right == pytest.approx(result.figures["pixel_accuracy"], abs=1e-9)


def test_black_and_white_masks(data: Path, network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 and 255 are two classes, from training to what is predicted; 255 is not ignored."""
    (data / "classes.txt").unlink()
    for path in (data / "labels").rglob("*.png"):
        write_label_map(path, np.where(read_values(path) > 0, 255, 0).astype(np.uint8))
    run = tmp_path / "run"
    trained = sparkmim.segment(**settings(data, network, run) | {"epochs": 1})
    assert "note: 0 and 255 are the only values in the label maps, and so two classes" in capsys.readouterr().err
    metadata = open_weights(run).metadata
    assert (metadata.classes, metadata.label_values) == (["0", "255"], [0, 255])
    scored = sparkmim.segment(weights=run, data=data, eval_only=True, out=tmp_path / "scores", precision="32-true")
    assert scored.figures == trained.figures
    sparkmim.segment(weights=run, predict=str(data / "images" / "val"), out=tmp_path / "seen", precision="32-true")
    found = [read_values(path) for path in sorted((tmp_path / "seen").glob("*.png"))]
    assert {*np.unique(found)} <= {0, 255}
    truth = [read_values(path) for path in sorted((data / "labels" / "val").rglob("*.png"))]
    right = np.mean([predicted == true for predicted, true in zip(found, truth, strict=True)])
    assert right == pytest.approx(trained.figures["pixel_accuracy"], abs=1e-9)


def test_a_share_is_set_apart(data: Path, network: str, tmp_path: Path) -> None:
    """Of a folder without parts, and scored alike later."""
    for kind in ("images", "labels"):
        shutil.rmtree(data / kind / "val")
        (data / kind / "train").rename(data / "moved")
        (data / kind).rmdir()
        (data / "moved").rename(data / kind)
    trained = sparkmim.segment(**settings(data, network, tmp_path / "run") | {"epochs": 1}, val_split=0.5, seed=3)
    assert trained.steps == 1
    scored = sparkmim.segment(
        weights=tmp_path / "run", data=data, eval_only=True, out=tmp_path / "scores", precision="32-true",
        val_split=0.5, seed=3,
    )  # fmt: skip
    assert scored.figures == trained.figures


def test_arrays_of_many_channels_and_more_classes_than_a_byte(tmp_path: Path, network: str) -> None:
    root = tmp_path / "arrays"
    for part in ("train", "val"):
        (root / "images" / part).mkdir(parents=True)
        for number in range(2):
            values = np.random.default_rng(number).normal(1000, 200, (20, 30, 5)).astype(np.float32)
            np.save(root / "images" / part / f"{number}.npy", values)
            labels = (np.arange(600) % 300).astype(np.uint16).reshape(20, 30)
            labels[0] = 65535
            write_label_map(root / "labels" / part / f"{number}.png", labels)
    change = {"channels": 5, "ignore": 65535, "epochs": 1, "batch_size": 2}
    result = sparkmim.segment(**settings(root, network, tmp_path / "run") | change)
    assert result.model.classify.out_channels == 300
    metadata = open_weights(tmp_path / "run").metadata
    assert metadata.mean == pytest.approx([1000] * 5, rel=0.05)
    sparkmim.segment(weights=tmp_path / "run", predict=str(root / "images" / "val"), out=tmp_path / "seen")
    with Image.open(tmp_path / "seen" / "00001-0.png") as image:
        assert (image.mode, image.size) == ("I;16", (30, 20))


def test_pictures_and_logged_figures(data: Path, network: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sparkmim.segment(**settings(data, network, tmp_path / "run") | {"epochs": 1})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"val/mIoU", "val/pixel_accuracy", "loss"} <= set(events.Tags()["scalars"])
    shown = sorted(events.Tags()["images"])
    assert shown == [f"image, truth, prediction/{name}" for name in ("even/1000.jpg", "even/1002.jpg",
                                                                     "odd/deep/1001.png")]  # fmt: skip
    assert "validation: mIoU" in (tmp_path / "run" / "log.txt").read_text()


def test_loss_is_the_mean_over_pixels_that_count(network: str) -> None:
    torch.manual_seed(0)
    model = create_segmenter(create_encoder(network), 3).eval()
    optimizer = OptimizerSettings("adamw", 1e-3, (0.9, 0.999), 0.05, 0.05, None, 10, 0)
    module = SegmentModule(model, optimizer, 0, 1.0, "cosine")
    images, labels = torch.rand(2, 3, 16, 16), torch.randint(-1, 3, (2, 16, 16))
    loss = module.training_step({"image": images, "target": labels}, 0)
    logits = model(images).log_softmax(1)
    counted = labels != IGNORED
    expected = -logits.gather(1, labels.clamp(min=0)[:, None])[:, 0][counted].mean()
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert module.training_step({"image": images, "target": torch.full_like(labels, IGNORED)}, 0) == 0


def test_the_recipe_for_ade20k() -> None:
    """ConvNeXt's `upernet_convnext_base_512_160k_ade20k_ss.py`."""
    recipe = SEGMENT_RECIPES["ade20k"]
    assert (recipe.iterations, recipe.warmup_iterations, recipe.batch_size, recipe.crop) == (160_000, 1500, 16, 512)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.layer_decay, recipe.drop_path) == (1e-4, 0.05, 0.9, 0.4)
    defaults = {name: each.default for name, each in inspect.signature(sparkmim.segment).parameters.items()}
    given = {**defaults, "out": "run", "model": "resnet18", "recipe": "ade20k", "norm": "batch"}
    settled = Segmentation().settle(given, {}, None)
    assert (settled.schedule, settled.norm, settled.epochs) == ("linear", "batch", None)
    assert settled.layer_decay == 1.0  # from scratch, all layers must learn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "no model given; --model names the network"),
        ({"data": None}, "there are no images to train on; name them as --images and --labels"),
        ({"val_labels": Path(__file__).parent}, "val_images and val_labels go together"),
        ({"recipe": "best"}, "there is no recipe 'best'; choose one of default, ade20k"),
        ({"layer_decay": 2.0}, "layer_decay is 2.0"),
        ({"val_split": 1.0}, "val_split is 1.0"),
        ({"val_split": 0.5}, "val_split was given, but there are validation images already; leave it out"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"iterations": 0, "epochs": None}, "iterations is 0"),
        ({"crop": 0}, "crop is 0"),
        ({"schedule": "steps"}, "schedule is 'steps'; choose cosine or linear"),
        ({"mean": [0.5]}, r"mean has 1 value for 3 channels"),
        ({"channels": 4}, "holds image files only, which have 1 or 3 channels"),
        ({"eval_only": True}, "no weights given; --weights names the run folder or the weight file of a segmenter"),
        ({"weights": "nowhere"}, "nowhere does not exist"),
        ({"batch_size": 9}, "batch_size 9 is more than the 4 images there are"),
    ],
)
def test_mistakes(data: Path, network: str, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparkmim.segment(**{**settings(data, network, tmp_path / "run"), **change})
    assert not (tmp_path / "run").exists()


def test_broken_data_are_told_all_at_once(
    data: Path, network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "labels" / "train" / "even" / "0000.png").unlink()
    (data / "classes.txt").write_text("ground\ndisc\n")
    with pytest.raises(SystemExit) as leaving:
        main(["segment", "--data", str(data), "--model", network, "--out", str(tmp_path / "run"), *FLAGS])
    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert "cannot be used as it is" in said
    assert "1 image without label map: even/0000.jpg" in said
    assert "3 label maps with values that are none of the 2 classes" in said
    assert not (tmp_path / "run").exists()


def test_a_frozen_encoder(data: Path, network: str, tmp_path: Path) -> None:
    before = pretrained(tmp_path / "pre", network).encoder.state_dict()
    more = {"weights": tmp_path / "pre", "model": None, "frozen_stages": 2}
    result = sparkmim.segment(**settings(data, network, tmp_path / "run") | more)
    after = result.model.backbone.encoder.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if not name.startswith("fc."))


def test_weights_of_something_else(data: Path, network: str, tmp_path: Path) -> None:
    weights.write(create_encoder(network), tmp_path / "encoder.safetensors", WeightsMetadata(model=network, channels=3))
    with pytest.raises(ValueError, match="holds no segmenter; `sparkmim segment` makes one"):
        sparkmim.segment(weights=tmp_path / "encoder.safetensors", predict=str(data / "images"), out=tmp_path / "seen")
    sparkmim.segment(**settings(data, network, tmp_path / "run") | {"epochs": 0.5})
    (data / "classes.txt").write_text("\n".join([*NAMES, "sky"]))
    with pytest.raises(ValueError, match="the data have other classes than .*: 5 and 4 names"):
        sparkmim.segment(weights=tmp_path / "run", data=data, eval_only=True, out=tmp_path / "scores")
    with pytest.raises(ValueError, match="run is not empty; choose another --out"):
        sparkmim.segment(weights=tmp_path / "run", predict=str(data / "images"), out=tmp_path / "run")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        sparkmim.segment(weights=tmp_path / "run", predict=str(tmp_path / "photos"), out=tmp_path / "seen")
    assert not (tmp_path / "seen").exists()


def test_unreadable_validation_images_are_in_the_history_once(data: Path, network: str, tmp_path: Path) -> None:
    """And so in the report."""
    broken = next((data / "images" / "val").rglob("*.jpg"))
    broken.write_bytes(broken.read_bytes()[:-200])
    sparkmim.segment(**settings(data, network, tmp_path / "run") | {"eval_every": 1})
    found = [event for event in read_history(tmp_path / "run" / "history.jsonl") if event.kind == "unreadable"]
    assert [(event.fields["image"], event.fields["part"]) for event in found] == [(str(broken), "validation")]
    assert broken.name in (tmp_path / "run" / "report.html").read_text()
