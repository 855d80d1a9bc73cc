"""Frozen features put to the test, from files to table and JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sparkmim
from processes import Cli
from sparkmim.data.augmentation import eval_transform
from sparkmim.data.decoding import decode
from sparkmim.evaluation import knn_accuracy, stage_features
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.models import Hierarchy, create_encoder

FAST: dict[str, Any] = {"workers": 0, "accelerator": "cpu"}


def test_the_command_line_prints_a_table_and_keeps_everything(
    cli: Cli, labelled: Path, run: Path, encoder_file: Path
) -> None:
    (labelled / "train" / "red" / "00.png").write_bytes(b"no picture")
    done = cli("evaluate", "--data", labelled, "--weights", run, "--compare", encoder_file, "--workers", 1)
    assert done.returncode == 0, done.stderr
    for word in ("k-NN accuracy", "stage 1", "stage 2", "weights", "random", "compare"):
        assert word in done.stdout
    assert "1 unreadable image" in done.stderr
    assert "red/00.png" in done.stderr
    report = json.loads((run / "evaluation" / "knn.json").read_text())
    assert report["settings"]["k"] == 20
    assert report["images"]["train"] == 36
    assert len(report["images"]["unreadable"]) == 1
    assert report["classes"] == ["blue", "green", "red"]
    assert [(row["network"], row["stage"], row["stride"]) for row in report["rows"]] == [
        (name, stage, stride) for name in ("weights", "random", "compare") for stage, stride in ((1, 2), (2, 4))
    ]
    again = sparkmim.evaluate(data=labelled, weights=run, compare=encoder_file, **FAST)
    assert [row.accuracy for row in again.rows] == [row["accuracy"] for row in report["rows"]]


def test_accuracies_are_those_of_features_computed_by_hand(labelled: Path, run: Path, network: str) -> None:
    result = sparkmim.evaluate(data=labelled, weights=run, k=3, seed=5, **FAST)
    transform = eval_transform((16, 16), [0.5] * 3, [0.25] * 3)

    def read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        paths = sorted((labelled / part).rglob("*.png"))
        classes = ["blue", "green", "red"]
        labels = torch.tensor([classes.index(path.parent.name) for path in paths])
        return torch.stack([transform(decode(path)) for path in paths]), labels

    torch.manual_seed(5)
    networks = {"random": create_encoder(network), "weights": weights.open_weights(run).encoder()}
    (known, known_labels), (asked, asked_labels) = read("train"), read("val")
    for name, encoder in networks.items():
        hierarchy = Hierarchy(encoder).eval()
        features = zip(stage_features(hierarchy, known), stage_features(hierarchy, asked), strict=True)
        for stage, (bank, queries) in enumerate(features, 1):
            [score] = [row for row in result.rows if (row.network, row.stage) == (name, stage)]
            assert score.accuracy == knn_accuracy(bank, known_labels, queries, asked_labels, k=3)


def test_the_linear_probe_and_few_shot(labelled: Path, run: Path, tmp_path: Path) -> None:
    linear = sparkmim.evaluate(data=labelled, weights=run, protocol="linear", epochs=1, **FAST)
    assert linear.out == run / "evaluation" / "linear.json"
    assert linear.deepest().accuracy > 0.9  # one bright channel each: easy
    assert linear.deepest().details["learning_rate"] in linear.deepest().details["held_out"]
    out = tmp_path / "few.json"
    shots: dict[str, Any] = {"protocol": "fewshot", "shots": [1, 4], "draws": 3, "stage": 1}
    few = sparkmim.evaluate(data=labelled, weights=run, out=out, **shots, **FAST)
    assert [(row.network, row.shots, row.stage) for row in few.rows] == [
        ("weights", 1, 1), ("weights", 4, 1), ("random", 1, 1), ("random", 4, 1)
    ]  # fmt: skip
    for row in few.rows:
        draws = np.array(row.details["draws"])
        assert len(draws) == 3
        assert row.accuracy == pytest.approx(draws.mean())
        assert row.spread == pytest.approx(draws.std(ddof=1))
    assert json.loads(out.read_text())["settings"]["shots"] == [1, 4]
    with pytest.raises(ValueError, match=r"exists already; choose another --out"):
        sparkmim.evaluate(data=labelled, weights=run, out=out, **FAST)


def test_a_module_from_python_stands_for_the_random_network_and_is_not_changed(
    labelled: Path, encoder_file: Path, network: str
) -> None:
    module = create_encoder(network)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = sparkmim.evaluate(data=labelled, weights=encoder_file, model=module, stage=2, **FAST)
    assert result.out is None
    assert [row.network for row in result.rows] == ["weights", "random"]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert module.training


def test_datasets_and_splits(run: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(30, 3, 16, 16, generator=generator)
    images[::2, 0] = 1.0
    dataset = [(image, place % 2) for place, image in enumerate(images)]
    result = sparkmim.evaluate(data=dataset, weights=run, val_split=0.3, **FAST)
    assert result.classes == ["0", "1"]
    assert result.deepest().accuracy == 1.0


def test_arrays_of_any_channels_are_read_whole(tmp_path: Path) -> None:
    rows = ["path,label"]
    generator = np.random.default_rng(0)
    for place in range(24):
        np.save(tmp_path / f"{place}.npy", generator.normal(3 * (place % 2), 1, (5, 18, 18)).astype(np.float32))
        rows.append(f"{place}.npy,{'ab'[place % 2]}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    known = {"model": "resnet10t", "image_size": [64, 64], "channels": 5, "mean": [0.0] * 5, "std": [1.0] * 5}
    weights.write(create_encoder("resnet10t", 5), tmp_path / "five.safetensors", WeightsMetadata(**known))
    files = {"data": tmp_path / "table.csv", "weights": tmp_path / "five.safetensors"}
    first, second = (sparkmim.evaluate(**files, val_split=0.5, stage=1, **FAST) for _ in range(2))
    assert first.rows == second.rows
    assert first.deepest().accuracy > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "nowhere"}, r"nowhere does not exist; --data names a folder"),
        ({"weights": "nowhere"}, r"nowhere does not exist; --weights names a run folder or a weight file"),
        ({"compare": "nowhere"}, r"nowhere does not exist"),
        ({"stage": 3}, r"stage is 3, but .* has 2 stages; choose 1 to 2"),
        ({"protocol": "kmeans"}, r"protocol is 'kmeans'; choose knn, linear or fewshot"),
        ({"protocol": "fewshot", "shots": [1, 13]}, r"shots asks for 13 images per class, but class 'blue' has 12"),
        ({"shots": []}, r"shots is \[\]; it must have 1 or more values"),
        ({"k": 0}, r"k is 0; it must be above 0"),
        ({"crop": 2.0}, r"crop is 2.0; it must be between 0 and 1"),
        ({"image_size": [16, 16, 16, 16]}, r"image_size is \[16, 16, 16, 16\]; it must have 1 to 3 values"),
        ({"accelerator": "tpu"}, r"accelerator is 'tpu'; choose auto, cpu or cuda"),
        ({"model": 3}, r"model is of type int; pass a name or a torch.nn.Module"),
        ({"workers": -1}, r"workers is -1"),
    ],
)
def test_mistakes_are_one_sentence(labelled: Path, run: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sparkmim.evaluate(**{"data": labelled, "weights": run, **FAST, **change})
    assert not (run / "evaluation").exists()


def test_images_without_a_test_set_a_single_class_or_none_readable(labelled: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no images to test on; name some with --val-data"):
        sparkmim.evaluate(data=labelled / "train", weights=run, **FAST)
    (tmp_path / "one" / "red").mkdir(parents=True)
    shutil.copy(labelled / "val" / "red" / "00.png", tmp_path / "one" / "red")
    with pytest.raises(ValueError, match="only one class folder, red"):
        sparkmim.evaluate(data=tmp_path / "one", weights=run, **FAST)
    for path in (labelled / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 12 images can be read; the first is .*the file is empty"):
        sparkmim.evaluate(data=labelled, weights=run, **FAST)


def test_the_probe_needs_two_images_of_every_class(labelled: Path, run: Path) -> None:
    for path in sorted((labelled / "train" / "green").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"class 'green' has 1 image to train on"):
        sparkmim.evaluate(data=labelled, weights=run, protocol="linear", **FAST)


def test_unreadable_images_count_nowhere(labelled: Path, run: Path) -> None:
    """Leaving a file broken is the same as leaving it out."""
    broken = labelled / "train" / "green" / "05.png"
    broken.write_bytes(b"no picture")
    with_it = sparkmim.evaluate(data=labelled, weights=run, k=1, **FAST)
    broken.unlink()
    without = sparkmim.evaluate(data=labelled, weights=run, k=1, **FAST)
    assert with_it.rows == without.rows
    assert len(with_it.unreadable) == 1
    assert not without.unreadable


def test_a_network_that_takes_other_channels_converts_images(labelled: Path, tmp_path: Path, network: str) -> None:
    known = {"model": network, "image_size": [16, 12], "channels": 1, "mean": [0.5], "std": [0.5]}
    weights.write(create_encoder(network, 1), tmp_path / "grey.safetensors", WeightsMetadata(**known))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(labelled / "val" / "red" / "grey.png")
    assert len(sparkmim.evaluate(data=labelled, weights=tmp_path / "grey.safetensors", **FAST).rows) == 4
