"""Recipes by name: the settings that a recipe decides, each of which can be overridden."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from sparkmim.data.detection_transforms import Crop
from sparkmim.errors import UserError
from sparkmim.models.decoder import NormKind
from sparkmim.models.detector import BoxHead
from sparkmim.models.pyramid import PyramidNorm


@dataclass(frozen=True)
class Recipe:
    """What a recipe decides; every field is an argument of `sparkmim.pretrain` too.

    Attributes:
        epochs: passes over the data.
        batch_size: images per optimiser step, over all processes.
        optimizer: `lamb` or `adamw`.
        learning_rate: peak rate for 256 images per step; scales in proportion to the batch size.
        beta2: decay of the optimiser's second moment, by the encoder's norm; the first is 0.9.
        warmup_epochs: epochs of linear warm-up.
        weight_decay: at the start.
        weight_decay_end: at the end, after a cosine.
        clip_grad: largest global gradient norm.
        mask_ratio: share of the patches that is hidden.
        decoder_width: channels of the decoder at the deepest map.
        crop_scale: smallest share of the image's area that a random crop covers; the largest is all of it.
    """

    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    beta2: dict[NormKind, float]
    warmup_epochs: float
    weight_decay: float
    weight_decay_end: float
    clip_grad: float
    mask_ratio: float
    decoder_width: int
    crop_scale: float


PAPER = Recipe(
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

Measured on 10,000 images of CIFAR-10, pretraining a small network (`benchmarks/recipe.py`, `results/recipe.json`):
few steps need a higher rate than the paper's, at which AdamW is as good as LAMB; a decoder of width 256 gives better
features than one of 64 after the same epochs, and as good ones in the same time.
"""

PAPER_384 = replace(PAPER, batch_size=2048, learning_rate=4e-4, mask_ratio=0.75)
"""The same at 384²."""

RECIPES = {"default": DEFAULT, "paper": PAPER, "paper_384": PAPER_384}

PAPER_DROP_PATH = {
    "resnet50": 0.05, "resnet101": 0.08, "resnet152": 0.10, "resnet200": 0.15,
    "convnext_small": 0.2, "convnext_base": 0.3, "convnext_large": 0.4,
}  # fmt: skip


def recipe_named(name: str) -> Recipe:
    """Looks a recipe up.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


@dataclass(frozen=True)
class FinetuneRecipe:
    """What a recipe decides; every field is an argument of `sparkmim.finetune` too.

    Attributes:
        epochs: passes over the data.
        warmup_epochs: epochs of linear warm-up.
        batch_size: images per optimiser step, over all processes.
        optimizer: `lamb` (without bias correction, always adapting) or `adamw`.
        learning_rate: peak rate for 256 images per step; scales in proportion to the batch size.
        layer_decay: share of the rate that each group of layers keeps of the one above.
        weight_decay: constant; none on vectors.
        mixup: alpha.
        cutmix: alpha; with mixup, one of both is chosen for each batch.
        smoothing: of labels.
        loss: `bce` or `ce`.
        repeats: times that an image stands in a row in an epoch's order (repeated augmentation).
        drop_path: stochastic depth rate; None for the network's own.
        ema: decay of the average of the weights; 0 for none.
        augment: `trivial`, `auto` or `none`.
        erase: how often a part of an image is erased.
        crop_scale: smallest share of the image's area that a random crop covers.
        eval_crop: share of the shorter side that the centre crop covers in evaluation; 0 to resize the whole image.
        image_size: of the images; None for that of the pretrained weights.
        clip_grad: largest global gradient norm; 0 for any.
    """

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
    loss: Literal["bce", "ce"]
    repeats: int
    drop_path: float | None
    ema: float
    augment: Literal["trivial", "auto", "none"]
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
"""For some ten to some thousand labelled images on one machine.

The rate is the middle of the three tried with a small network on CIFAR-10 (`benchmarks/transfer.py`,
`results/transfer.json`): ten labels per class prefer 1e-3, 200 prefer 1e-2. Layer decay 0.8 is milder than the paper's;
on that network 1 and 0.7 were alike.
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


def finetune_recipe_named(name: str) -> FinetuneRecipe:
    """Looks a recipe up.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in FINETUNE_RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(FINETUNE_RECIPES)}")
    return FINETUNE_RECIPES[name]


@dataclass(frozen=True)
class DetectRecipe:
    """What a recipe decides; every field is an argument of `sparkmim.detect` too. The optimiser is AdamW.

    Attributes:
        epochs: passes over the data; None where `iterations` are given instead.
        iterations: optimiser steps of the run; None where `epochs` are given instead.
        batch_size: images per optimiser step, over all processes.
        learning_rate: peak rate for 16 images per step; scales in proportion to the batch size.
        layer_decay: share of the rate that each group of the encoder's layers keeps of the one above.
        weight_decay: constant; none on vectors.
        warmup_iterations: optimiser steps of linear warm-up.
        warmup_start: rate at the first step, as a share of the peak.
        drops: when the rate is multiplied by `drop_factor`, as shares of the run.
        drop_factor: see there.
        drop_path: stochastic depth rate; None for the network's own.
        short_sides: lengths of the shorter side in training, one drawn for each image.
        long_side: of the longer side at most; the shorter one gives way.
        eval_short_side: length of the shorter side in evaluation.
        crop: `detr` cuts a random part out of every other image first (see `detection_transform`); or `none`.
        box_head: four convolutions and a linear layer, or two linear layers.
        norm: in the pyramid and between the convolutions of the heads.
        regions: of each image that the heads learn from.
        clip_grad: largest global gradient norm; 0 for any.
    """

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
    crop: Crop
    box_head: BoxHead
    norm: PyramidNorm
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
"""For some hundred to some thousand images on one GPU: batches of 4 at four fifths of COCO's usual size. Layer decay as
in fine-tuning; no BatchNorm in the new parts, whose statistics four images would have to give."""

DETECT_RECIPES = {
    "default": DETECT_DEFAULT,
    "resnet50_1x": _RESNET50_1X,
    "convnext_base_3x": _CONVNEXT_BASE_3X,
}
"""`default`, and the paper's for COCO (appendix; `downstream_d2` and `downstream_mmdet` of the original)."""


def detect_recipe_named(name: str) -> DetectRecipe:
    """Looks a recipe up.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in DETECT_RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(DETECT_RECIPES)}")
    return DETECT_RECIPES[name]


SegmentSchedule = Literal["cosine", "linear"]


@dataclass(frozen=True)
class SegmentRecipe:
    """What a recipe decides; every field is an argument of `sparkmim.segment` too. The optimiser is AdamW.

    Attributes:
        epochs: passes over the data; None where `iterations` are given instead.
        iterations: optimiser steps of the run; None where `epochs` are given instead.
        batch_size: images per optimiser step, over all processes.
        learning_rate: peak rate for 16 images per step; scales in proportion to the batch size.
        layer_decay: share of the rate that each group of the encoder's layers keeps of the one above.
        weight_decay: constant; none on vectors.
        warmup_iterations: optimiser steps of linear warm-up.
        schedule: how the rate falls.
        drop_path: stochastic depth rate; None for the network's own.
        short_side: usual length of the shorter side in training, from which it is scaled by 0.5 to 2.
        crop: side of the square that is cut out.
        jitter: how much colours change (see `segmentation_transform`).
        eval_short_side: length of the shorter side in evaluation.
        norm: in the pyramid.
        clip_grad: largest global gradient norm; 0 for any.
    """

    epochs: float | None
    iterations: int | None
    batch_size: int
    learning_rate: float
    layer_decay: float
    weight_decay: float
    warmup_iterations: int
    schedule: SegmentSchedule
    drop_path: float | None
    short_side: int
    crop: int
    jitter: float
    eval_short_side: int
    norm: PyramidNorm
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
from MMSegmentation's `ade20k.py`, which it builds on). The head is another one here."""

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
"""For some hundred to some thousand images on one GPU; rate, layer decay and clipping as in detection."""

SEGMENT_RECIPES = {"default": SEGMENT_DEFAULT, "ade20k": _ADE20K}


def segment_recipe_named(name: str) -> SegmentRecipe:
    """Looks a recipe up.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in SEGMENT_RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(SEGMENT_RECIPES)}")
    return SEGMENT_RECIPES[name]
