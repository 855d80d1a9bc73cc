"""Recipes: named sets of values for arguments that are left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from sparkmim.arguments import nearest
from sparkmim.errors import UserError


@dataclass(frozen=True)
class PretrainRecipe:
    """Values of arguments of `sparkmim.pretrain`; fields are named like them.

    `beta2` depends on the encoder's norm.
    """

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    beta2: Mapping[str, float]
    warmup_epochs: float
    weight_decay: float
    weight_decay_end: float
    clip_grad: float
    mask_ratio: float
    decoder_width: int
    crop_scale: float
    jitter: float
    contrast: float


PAPER = PretrainRecipe(
    epochs=1600,
    batch_size=4096,
    optimizer="lamb",
    learning_rate=2e-4,
    beta2={"batch": 0.95, "layer": 0.999, "none": 0.999},
    warmup_epochs=40,
    weight_decay=0.04,
    weight_decay_end=0.2,
    clip_grad=5.0,
    mask_ratio=0.6,
    decoder_width=768,
    crop_scale=0.67,
    jitter=0.0,
    contrast=0.0,
)
"""SparK's ImageNet pretraining at 224² (paper, appendix; drop path per network in `PAPER_DROP_PATH`)."""

DEFAULT = replace(
    PAPER,
    epochs=200,
    batch_size=128,
    optimizer="adamw",
    learning_rate=2e-3,
    warmup_epochs=10,
    decoder_width=256,
)
"""For thousands of images on one machine.

Measured on 10,000 images of CIFAR-10, pretraining a small network (`benchmarks/results/recipe.json`):
few steps need a higher rate than the paper's, at which AdamW is as good as LAMB; a decoder of width 256 gives better
features than one of 64 after the same epochs, and as good ones in the same time.
"""

CONTRAST = replace(
    DEFAULT, batch_size=256, learning_rate=1e-3, mask_ratio=0.25, crop_scale=0.2, jitter=0.5, contrast=1.0
)
"""The default with a contrastive loss between two masked views of each image (CAN, arXiv:2210.16870; colours and crops
of SimCLR's, arXiv:2002.05709)."""

PAPER_384 = replace(PAPER, batch_size=2048, learning_rate=4e-4, mask_ratio=0.75)
"""SparK's ImageNet pretraining at 384²."""

PRETRAIN_RECIPES = {"default": DEFAULT, "contrast": CONTRAST, "paper": PAPER, "paper_384": PAPER_384}

PAPER_DROP_PATH = {
    "resnet50": 0.05, "resnet101": 0.08, "resnet152": 0.10, "resnet200": 0.15,
    "convnext_small": 0.2, "convnext_base": 0.3, "convnext_large": 0.4,
}  # fmt: skip


@dataclass(frozen=True)
class FinetuneRecipe:
    """Values of arguments of `sparkmim.finetune`; fields are named like them."""

    epochs: int
    warmup_epochs: float
    batch_size: int
    optimizer: str
    learning_rate: float
    layer_decay: float
    weight_decay: float
    mixup: float
    cutmix: float
    smoothing: float
    loss: str
    repeats: int
    drop_path: float | None
    ema: float
    augment: str
    erase: float
    crop_scale: float
    eval_crop: float
    image_size: int | None
    clip_grad: float


_CONVNEXT = FinetuneRecipe(
    epochs=400,
    warmup_epochs=20,
    batch_size=4096,
    optimizer="adamw",
    learning_rate=2e-4,
    layer_decay=0.7,
    weight_decay=0.01,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    loss="ce",
    repeats=3,
    drop_path=0.3,
    ema=0.9999,
    augment="trivial",
    erase=0.25,
    crop_scale=0.08,
    eval_crop=0.95,
    image_size=224,
    clip_grad=0.0,
)
_CONVNEXT_L = replace(_CONVNEXT, epochs=200, warmup_epochs=10, learning_rate=1e-4, weight_decay=0.02, drop_path=0.5)
_RESNET = replace(
    _CONVNEXT, epochs=300, warmup_epochs=5, batch_size=2048, optimizer="lamb", learning_rate=1e-3, layer_decay=0.8,
    weight_decay=0.02, mixup=0.1, loss="bce", repeats=1, drop_path=0.2,
)  # fmt: skip

FINETUNE_DEFAULT = replace(
    _CONVNEXT,
    epochs=50,
    warmup_epochs=5,
    batch_size=64,
    learning_rate=3e-3,
    layer_decay=0.8,
    weight_decay=0.05,
    mixup=0.0,
    cutmix=0.0,
    repeats=1,
    drop_path=None,
    ema=0.0,
    augment="none",
    erase=0.0,
    crop_scale=0.35,
    image_size=None,
    clip_grad=5.0,
)
"""For tens to thousands of labelled images on one machine.

With 50 labels per class of CIFAR-10, six ways of pretraining a small network did best with this rate, and no
pretraining with 1e-2 (`benchmarks/results/transfer.json`). Layer decay 0.8 is milder than the paper's; on that network
1 and 0.7 were alike.
"""

FINETUNE_RECIPES = {
    "default": FINETUNE_DEFAULT,
    "convnext_small": _CONVNEXT,
    "convnext_base": replace(_CONVNEXT, learning_rate=1e-4, drop_path=0.4),
    "convnext_large": _CONVNEXT_L,
    "convnext_large_384": replace(
        _CONVNEXT_L, batch_size=1024, warmup_epochs=20, learning_rate=6e-5, weight_decay=0.01, ema=0.99995,
        augment="auto", eval_crop=0.0, image_size=384,
    ),
    "resnet50": replace(_RESNET, learning_rate=2e-3, layer_decay=0.7, drop_path=0.05),
    "resnet101": _RESNET,
    "resnet152": _RESNET,
    "resnet200": _RESNET,
}  # fmt: skip
"""`default`, and the paper's for ImageNet, by network (table of the appendix; the original's
`downstream_imagenet/arg.py` and `data.py` for what the table leaves open)."""


@dataclass(frozen=True)
class DetectRecipe:
    """Values of arguments of `sparkmim.detect`; fields are named like them. The optimiser is AdamW."""

    epochs: float | None
    iterations: int | None
    batch_size: int
    learning_rate: float
    layer_decay: float
    weight_decay: float
    warmup_iterations: int
    warmup_start: float
    drops: tuple[float, ...]
    drop_factor: float
    drop_path: float | None
    short_sides: tuple[int, ...]
    long_side: int
    eval_short_side: int
    crop: str
    box_head: str
    norm: str
    regions: int
    clip_grad: float


_RESNET50_1X = DetectRecipe(
    epochs=None,
    iterations=90_000,
    batch_size=16,
    learning_rate=2.5e-4,
    layer_decay=0.6,
    weight_decay=1e-4,
    warmup_iterations=1000,
    warmup_start=0.01,
    drops=(60 / 90, 80 / 90),
    drop_factor=0.25,
    drop_path=None,
    short_sides=tuple(range(480, 897, 32)),
    long_side=1333,
    eval_short_side=800,
    crop="none",
    box_head="4conv1fc",
    norm="batch",
    regions=512,
    clip_grad=0.0,
)
"""`downstream_d2/configs/coco_R_50_FPN_CONV_1x_moco_adam.yaml` of the original; the rest is Detectron2's default."""

_CONVNEXT_BASE_3X = replace(
    _RESNET50_1X,
    epochs=36,
    iterations=None,
    learning_rate=2e-4,
    layer_decay=0.65,
    weight_decay=0.05,
    warmup_iterations=500,
    warmup_start=0.001,
    drops=(27 / 36, 33 / 36),
    drop_factor=0.2,
    drop_path=0.5,
    short_sides=tuple(range(480, 801, 32)),
    crop="detr",
    box_head="2fc",
    norm="none",
)
"""`downstream_mmdet/configs/convnext_spark` of the original, on ConvNeXt's `mask_rcnn_convnext_fpn.py`; batch and
warm-up are what these inherit from MMDetection (2 images on each of 8 GPUs; `schedule_1x.py`)."""

DETECT_DEFAULT = replace(
    _CONVNEXT_BASE_3X,
    epochs=24,
    batch_size=4,
    learning_rate=4e-4,
    layer_decay=0.8,
    warmup_iterations=100,
    warmup_start=0.01,
    drop_factor=0.1,
    drop_path=None,
    short_sides=tuple(range(480, 641, 32)),
    long_side=1066,
    eval_short_side=640,
    crop="none",
    clip_grad=5.0,
)
"""For hundreds to thousands of images on one GPU: batches of 4 at four fifths of COCO's usual size. Layer decay as
in fine-tuning; no BatchNorm in the new parts, since four images give poor statistics."""

DETECT_RECIPES = {
    "default": DETECT_DEFAULT,
    "resnet50_1x": _RESNET50_1X,
    "convnext_base_3x": _CONVNEXT_BASE_3X,
}
"""`default`, and the paper's for COCO (appendix; `downstream_d2` and `downstream_mmdet` of the original)."""


@dataclass(frozen=True)
class SegmentRecipe:
    """Values of arguments of `sparkmim.segment`; fields are named like them. The optimiser is AdamW."""

    epochs: float | None
    iterations: int | None
    batch_size: int
    learning_rate: float
    layer_decay: float
    weight_decay: float
    warmup_iterations: int
    schedule: str
    drop_path: float | None
    short_side: int
    crop: int
    jitter: float
    eval_short_side: int
    norm: str
    clip_grad: float


_ADE20K = SegmentRecipe(
    epochs=None,
    iterations=160_000,
    batch_size=16,
    learning_rate=1e-4,
    layer_decay=0.9,
    weight_decay=0.05,
    warmup_iterations=1500,
    schedule="linear",
    drop_path=0.4,
    short_side=512,
    crop=512,
    jitter=0.5,
    eval_short_side=512,
    norm="none",
    clip_grad=0.0,
)
"""ConvNeXt-B's for UPerNet (facebookresearch/ConvNeXt, `upernet_convnext_base_512_160k_ade20k_ss.py`; sizes and colours
from MMSegmentation's `ade20k.py`, which it builds on). The head differs."""

SEGMENT_DEFAULT = replace(
    _ADE20K,
    epochs=50,
    iterations=None,
    batch_size=8,
    learning_rate=4e-4,
    layer_decay=0.8,
    warmup_iterations=100,
    schedule="cosine",
    drop_path=None,
    jitter=0.3,
    clip_grad=5.0,
)
"""For hundreds to thousands of images on one GPU; rate, layer decay and clipping as in detection."""

SEGMENT_RECIPES = {"default": SEGMENT_DEFAULT, "ade20k": _ADE20K}


RECIPES: dict[str, Mapping[str, Any]] = {
    "pretrain": PRETRAIN_RECIPES,
    "finetune": FINETUNE_RECIPES,
    "detect": DETECT_RECIPES,
    "segment": SEGMENT_RECIPES,
}
"""Recipes by command and name."""

R = TypeVar("R")


def recipe_named(name: str, recipes: Mapping[str, R]) -> R:
    """Returns a recipe.

    Raises:
        UserError: if there is none of that name.
    """
    if name not in recipes:
        near = nearest(name, recipes)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(recipes)}"
        raise UserError(f"there is no recipe {name!r}; {hint}")
    return recipes[name]


def notes_for(command: str, asked: Mapping[str, Any]) -> dict[str, str]:
    """Returns what the recipe decides for open arguments of a command, such as `200 (recipe default)`.

    Args:
        command: name of the command.
        asked: arguments by name.
    """
    name = str(asked.get("recipe"))
    recipe = RECIPES.get(command, {}).get(name)
    if recipe is None:
        return {}
    return {
        field.name: f"{_written(value)} (recipe {name})"
        for field in fields(recipe)
        if field.name in asked and asked[field.name] is None and (value := getattr(recipe, field.name)) is not None
    }


def _written(value: Any) -> str:
    if isinstance(value, Mapping):  # by the network's norm
        return " or ".join(dict.fromkeys(f"{item:g}" for item in value.values()))
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
