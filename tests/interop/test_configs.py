"""The configs for Detectron2 and MMDetection say what our recipes say; neither library is needed to read them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import timm
import torch

from sparkmim.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from sparkmim.interop.detectron2 import detectron2_name
from sparkmim.interop.openmmlab import openmmlab_name
from sparkmim.training.layer_decay import layer_decay_exponents
from sparkmim.training.recipes import DETECT_RECIPES, DetectRecipe

EXAMPLES = Path(__file__).parents[2] / "examples"
RESNET, CONVNEXT = DETECT_RECIPES["resnet50_1x"], DETECT_RECIPES["convnext_base_3x"]


@pytest.fixture
def detectron2(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The config, in which a lazy call is its arguments, and a part of Detectron2's configs takes anything."""
    detectron2 = ["detectron2", "detectron2.config", "detectron2.solver", "detectron2.solver.build"]
    for name in [*detectron2, "fvcore", "fvcore.common", "fvcore.common.param_scheduler"]:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    sys.modules["detectron2.config"].LazyCall = lambda target: SimpleNamespace
    return runpy.run_path(str(EXAMPLES / "detectron2" / "mask_rcnn_r50_fpn_1x.py"))


def mmdetection(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "mmdetection" / name))


def resnet_exponents() -> dict[str, int]:
    """Those of the original's detection: as in classification, but with the second stage in one group."""
    with torch.device("meta"):
        ours = layer_decay_exponents(timm.create_model("resnet50", num_classes=0))
    assert set(ours.values()) == {1, 2, 3, 4, 5, 6, 7}
    return {name: exponent - (exponent >= 5) for name, exponent in ours.items()}


def test_detectron2_settings(detectron2: dict[str, Any]) -> None:
    dataloader, optimizer, schedule = (detectron2[name] for name in ("dataloader", "optimizer", "lr_multiplier"))
    steps = RESNET.iterations
    assert steps is not None
    assert detectron2["train"].max_iter == schedule.scheduler.num_updates == steps
    assert dataloader.train.total_batch_size == RESNET.batch_size
    assert (optimizer.lr, optimizer.weight_decay) == (RESNET.learning_rate, RESNET.weight_decay)
    assert schedule.warmup_factor == RESNET.warmup_start
    assert schedule.warmup_length * steps == pytest.approx(RESNET.warmup_iterations)
    assert schedule.scheduler.milestones == pytest.approx([drop * steps for drop in RESNET.drops])
    assert schedule.scheduler.values == [RESNET.drop_factor**drops for drops in range(3)]
    resize = dataloader.train.mapper.augmentations[0]
    assert (tuple(resize.short_edge_length), resize.max_size) == (RESNET.short_sides, RESNET.long_side)


def test_detectron2_takes_the_export(detectron2: dict[str, Any]) -> None:
    """Channels, statistics and strides as in the pretrained network."""
    model = detectron2["model"]
    assert model.input_format == detectron2["dataloader"].train.mapper.image_format == "RGB"
    assert model.pixel_mean == pytest.approx([255 * mean for mean in IMAGENET_MEAN])
    assert model.pixel_std == pytest.approx([255 * std for std in IMAGENET_STD])
    assert model.backbone.bottom_up.stages.stride_in_1x1 is False


def test_detectron2_layer_decay(detectron2: dict[str, Any]) -> None:
    factor = detectron2["optimizer"].params.lr_factor_func
    for name, exponent in resnet_exponents().items():
        assert factor(f"backbone.bottom_up.{detectron2_name(name)}") == RESNET.layer_decay**exponent, name
    for new in ("backbone.fpn_lateral2.weight", "roi_heads.box_head.fc1.weight", "proposal_generator.head.conv.bias"):
        assert factor(new) == 1


def assert_schedule(config: dict[str, Any], recipe: DetectRecipe) -> None:
    warmup, drops = config["param_scheduler"]
    length = recipe.epochs or recipe.iterations  # the schedule counts what the recipe counts
    assert length is not None
    optimizer = config["optim_wrapper"]["optimizer"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (recipe.learning_rate, recipe.weight_decay)
    assert (warmup["start_factor"], warmup["end"]) == (recipe.warmup_start, recipe.warmup_iterations)
    assert warmup["by_epoch"] is False
    assert drops["by_epoch"] is (recipe.epochs is not None)
    assert drops["end"] == length
    assert drops["milestones"] == pytest.approx([drop * length for drop in recipe.drops])
    assert drops["gamma"] == recipe.drop_factor


def test_mmdetection_convnext() -> None:
    config = mmdetection("mask_rcnn_convnext_base_fpn_3x.py")
    assert_schedule(config, CONVNEXT)
    assert config["optim_wrapper"]["paramwise_cfg"] == {"decay_rate": CONVNEXT.layer_decay, "num_layers": 12}
    assert config["model"]["backbone"]["drop_path_rate"] == CONVNEXT.drop_path
    with torch.device("meta"):
        backbone = timm.create_model("convnext_base", features_only=True)
    assert config["model"]["neck"]["in_channels"] == backbone.feature_info.channels()


def test_mmdetection_resnet() -> None:
    config = mmdetection("mask_rcnn_r50_fpn_1x.py")
    assert_schedule(config, RESNET)
    scales = [scale for step in config["train_pipeline"] for scale in step.get("scales", [])]
    assert scales == [(RESNET.long_side, side) for side in RESNET.short_sides]


def test_mmdetection_resnet_layer_decay() -> None:
    """MMEngine gives a parameter the settings of the longest key that its name contains."""
    keys = mmdetection("mask_rcnn_r50_fpn_1x.py")["optim_wrapper"]["paramwise_cfg"]["custom_keys"]
    for name, exponent in resnet_exponents().items():
        key = max((key for key in keys if key in openmmlab_name(name)), key=len)
        assert keys[key]["lr_mult"] == RESNET.layer_decay**exponent, name
