"""Pretraining recipes by name: the settings that a recipe decides, and that any of them can be overridden."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparkmim.models.decoder import NormKind


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

RECIPES = {"default": DEFAULT, "paper": PAPER}

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
        raise ValueError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
