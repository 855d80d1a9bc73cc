"""Metadata of weight files: what is written is read, and nothing unusable is."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparkmim.data.inference import CROP
from sparkmim.errors import UserError
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import Weights, open_weights

PRETRAINED = {
    "model": "resnet18", "image_size": [64, 96], "patch_size": 32, "mask_ratio": 0.6, "decoder": "spark",
    "decoder_width": None, "stages": None, "feature_modules": None, "channels": 3, "mean": None, "std": None, "step": 7,
}  # fmt: skip
CLASSIFIER = {
    "model": None, "pooled": True, "classes": ["cat", "dog"], "image_size": [64, 64], "crop": None, "channels": 3,
    "feature_modules": ["a", "b"], "mean": [0.5] * 3, "std": [0.25] * 3, "top1": 87.5, "top5": 99.0,
}  # fmt: skip
DETECTOR = {
    "task": "detection", "model": "resnet18", "channels": 3, "classes": ["cat", "dog"], "category_ids": [3, 90],
    "masks": False, "mean": [0.5] * 3, "std": [0.25] * 3, "feature_modules": None, "box_head": "2fc", "norm": "none",
    "eval_short_side": 800, "long_side": 1333, "bbox/AP": 0.4, "bbox/AP50": 0.6,
}  # fmt: skip
SEGMENTER = {
    "task": "segmentation", "model": "resnet18", "image_size": [512, 512], "classes": ["cat", "dog"], "channels": 1,
    "mean": [0.5], "std": [0.25], "feature_modules": None, "norm": "batch", "eval_short_side": 512, "ignore": 255,
    "reduce_labels": False, "mIoU": 0.4,
}  # fmt: skip

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
JSON = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


@pytest.mark.parametrize("content", [PRETRAINED, CLASSIFIER, DETECTOR, SEGMENTER])
def test_layout(content: dict[str, Any]) -> None:
    """Every kind of file keeps its keys, those that are null among them."""
    metadata = WeightsMetadata.from_json(content, "file")
    assert metadata.to_json() == content
    assert WeightsMetadata.from_json(metadata.to_json(), "file") == metadata


@pytest.mark.parametrize(
    ("content", "expected"), [({}, CROP), ({"crop": None}, None), ({"crop": 0}, None), ({"crop": 0.95}, 0.95)]
)
def test_crop(content: dict[str, Any], expected: float | None) -> None:
    """Not known, the default; null, the whole image."""
    metadata = WeightsMetadata.from_json(content, "file")
    assert Weights(Path("file"), "encoder", {}, metadata).preparation().crop == expected


def test_unknown_keys() -> None:
    """Numbers are kept as figures; all else is ignored."""
    others = {"bbox/AP": 0.5, "epoch": 3, "flag": True, "nan": float("nan"), "text": "x", "list": [1], "null": None}
    assert WeightsMetadata.from_json(others, "file") == WeightsMetadata(figures={"bbox/AP": 0.5, "epoch": 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 1), ("model", ["resnet50"]), ("model", 50), ("task", "pose"), ("task", ["detection"]),
        ("step", -1), ("step", 1.5), ("image_size", 0), ("image_size", [0, 64]), ("image_size", [10**9, 64]),
        ("image_size", [64.5, 64]), ("image_size", [64] * 4), ("image_size", "64"), ("image_size", []),
        ("image_size", {"height": 64}), ("channels", -1), ("channels", 0), ("channels", [3]), ("channels", True),
        ("channels", 10**400), ("patch_size", 0), ("mask_ratio", 1), ("mask_ratio", float("nan")),
        ("decoder", "unet"), ("decoder_width", 10**9), ("stages", 0), ("feature_modules", "layer1"),
        ("feature_modules", [1]), ("feature_modules", []), ("mean", 0.5), ("mean", [float("nan")] * 3),
        ("mean", [float("inf")] * 3), ("mean", [0.5]), ("mean", [None] * 3), ("std", [0.0] * 3), ("std", [1, 1, -1]),
        ("std", [1.0] * 4), ("crop", 1.5), ("crop", -0.1), ("crop", "whole"), ("pooled", 1), ("classes", "cat"),
        ("classes", []), ("classes", [1, 2]), ("classes", {"cat": 0}), ("category_ids", [1, 2, 3]),
        ("category_ids", ["1", "2"]), ("category_ids", [-1, 1]), ("masks", "yes"), ("box_head", "3fc"),
        ("norm", "layer"), ("eval_short_side", 0), ("long_side", "big"), ("ignore", -7), ("reduce_labels", 0),
        ("label_values", [-1, 1]), ("label_values", [0, 1, 2]),
    ],
)  # fmt: skip
def test_unusable_values(name: str, value: Any) -> None:
    """One sentence with the file and the field."""
    with pytest.raises(UserError) as refusal:
        WeightsMetadata.from_json({**DETECTOR, name: value}, "runs/weights.safetensors")
    message = str(refusal.value)
    assert message.startswith(f"{name} in the metadata of runs/weights.safetensors ")
    assert len(message.splitlines()) == 1
    assert len(message) < 300


@pytest.mark.parametrize(("content", "name"), [(DETECTOR, "classes"), (DETECTOR, "norm"), (SEGMENTER, "image_size")])
def test_missing_values(content: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} is missing in the metadata of file"):
        WeightsMetadata.from_json({**content, name: None}, "file")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([field.name for field in fields(WeightsMetadata)]), JSON)
def test_any_json(name: str, value: Any) -> None:
    """A value is usable, or refused in a sentence."""
    try:
        metadata = WeightsMetadata.from_json({name: value}, "file")
    except UserError as refusal:
        message = str(refusal)
    else:
        message = f"{name} in the metadata of file is usable"
        assert WeightsMetadata.from_json(json.loads(json.dumps(metadata.to_json())), "file") == metadata
    assert "in the metadata of file" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(("text", "message"), [("[1]", "not a JSON object"), ("{", "metadata that are not JSON")])
def test_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"sparkmim": text})
    with pytest.raises(UserError, match=message):
        open_weights(path)
    save_file({"a": torch.zeros(1)}, path)
    assert open_weights(path).metadata == WeightsMetadata()
