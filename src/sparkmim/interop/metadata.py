"""Metadata of weight files, and their checks."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sparkmim.arguments import Check, Choice, Range, Several
from sparkmim.errors import UserError
from sparkmim.models.detector import BoxHead
from sparkmim.models.pyramid import PyramidNorm
from sparkmim.models.spark import DecoderKind

Task = Literal["detection", "segmentation"]


@dataclass(frozen=True)
class WeightsMetadata:
    """What a weight file says about its model; None where it says nothing.

    Attributes:
        version: of sparkmim, when the file was written.
        model: the network's name; None for a Python object.
        task: `detection` or `segmentation`.
        step: optimiser steps taken in pretraining.
        image_size: one size per axis, in pixels.
        channels: image channels.
        patch_size: side of a masked patch, in pixels.
        mask_ratio: share of the patches that was hidden.
        decoder: `spark` or `fcmae`.
        decoder_width: channels of the decoder at the deepest map.
        stages: how many feature maps were pretrained, from the shallowest on.
        feature_modules: names of the modules whose outputs are the feature maps.
        mean: of each channel.
        std: of each channel.
        crop: share of the resized image that the centre crop shows; 0 for the whole image, null in the file.
        pooled: whether the classifier is a linear layer on the pooled deepest map.
        classes: names of the classes.
        category_ids: COCO's numbers of the classes.
        masks: whether the detector predicts masks.
        box_head: of the detector.
        norm: of the pyramid and heads.
        eval_short_side: shorter side of images in evaluation, in pixels.
        long_side: maximum longer side of images in evaluation, in pixels.
        ignore: value in label maps that is not scored.
        reduce_labels: whether label maps count classes from 1, with 0 ignored.
        figures: validation figures by name, such as `top1` or `bbox/AP`, and other numbers found in the file.
    """

    version: str | None = None
    model: str | None = None
    task: Task | None = None
    step: int | None = None
    image_size: Sequence[int] | None = None
    channels: int = 3
    patch_size: int | None = None
    mask_ratio: float | None = None
    decoder: DecoderKind | None = None
    decoder_width: int | None = None
    stages: int | None = None
    feature_modules: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop: float | None = None
    pooled: bool | None = None
    classes: Sequence[str] | None = None
    category_ids: Sequence[int] | None = None
    masks: bool | None = None
    box_head: BoxHead | None = None
    norm: PyramidNorm | None = None
    eval_short_side: int | None = None
    long_side: int | None = None
    ignore: int | None = None
    reduce_labels: bool | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def given(self, *names: str) -> dict[str, Any]:
        """Returns the named fields that are not None, as keyword arguments."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object for a file."""
        nulls = {"model", "feature_modules"}  # null where unknown: earlier versions look them up in every file
        if self.classes is None:
            nulls |= {"decoder_width", "stages", "mean", "std"}
        values = {name: getattr(self, name) for name in _CHECKS}
        content = {name: value for name, value in values.items() if value is not None or name in nulls}
        if self.crop == 0:
            content["crop"] = None
        return {**self.figures, **content}

    @classmethod
    def from_json(cls, content: Any, path: str | Path) -> WeightsMetadata:
        """Checks and returns the metadata of a file; unknown keys are ignored, unless they hold a number.

        Args:
            content: the JSON object.
            path: of the file, for messages.

        Raises:
            UserError: if a value is of a wrong type or out of its range, or one that the task needs is missing.
        """
        if not isinstance(content, dict):
            raise UserError(f"{path} has metadata that are not a JSON object; use another file")
        values: dict[str, Any] = {}
        for name, check in _CHECKS.items():
            value = content.get(name)
            if value is None:
                continue
            if complaint := check(value):
                raise UserError(f"{name} in the metadata of {path} is {reprlib.repr(value)}; {complaint}")
            values[name] = list(value) if isinstance(value, tuple) else value
        if "crop" in content and content["crop"] is None:
            values["crop"] = 0.0
        for name in _NEEDED.get(values.get("task", ""), ()):
            if name not in values:
                raise UserError(f"{name} is missing in the metadata of {path}; use another file")
        figures = {name: value for name, value in content.items() if name not in _CHECKS and _is_figure(value)}
        known = cls(**values, figures=figures)
        for name, other, count in (
            ("mean", "channels", known.channels),
            ("std", "channels", known.channels),
            ("category_ids", "classes", len(known.classes or ())),
        ):
            if name in values and len(values[name]) != count:
                raise UserError(
                    f"{name} in the metadata of {path} has {len(values[name])} values for {count} {other}; "
                    "it must have one each"
                )
        return known


class _Whole(Range):
    """Integers from `low` to `high`."""

    def __call__(self, value: Any) -> str | None:
        """Tells what `value` must be, if it is not that."""
        return super().__call__(value) if isinstance(value, int) else f"it must be a whole number, {self}"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "it must be true or false"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "it must be a text"


def _names(value: Any) -> str | None:
    listed = isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value)
    return None if listed else "it must be a list of names"


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # False for NaN


_PIXELS = _Whole(1, 2**24)  # signals are long
_COUNT = _Whole(1, 2**16)

_CHECKS: dict[str, Check] = {
    "version": _text,
    "model": _text,
    "task": Choice(get_args(Task)),
    "step": _Whole(0, 2**53),
    "image_size": Several(_PIXELS, counts=(1, 3)),
    "channels": _COUNT,
    "patch_size": _PIXELS,
    "mask_ratio": Range(0, 1, above=True, below=True),
    "decoder": Choice(get_args(DecoderKind)),
    "decoder_width": _COUNT,
    "stages": _COUNT,
    "feature_modules": _names,
    "mean": Several(Range(-1e12, 1e12)),
    "std": Several(Range(0, 1e12, above=True)),
    "crop": Range(0, 1),
    "pooled": _flag,
    "classes": _names,
    "category_ids": Several(_Whole(0, 2**53)),
    "masks": _flag,
    "box_head": Choice(get_args(BoxHead)),
    "norm": Choice(get_args(PyramidNorm)),
    "eval_short_side": _PIXELS,
    "long_side": _PIXELS,
    "ignore": _Whole(0, 2**16 - 1),
    "reduce_labels": _flag,
}
"""Checks of all fields but `figures`."""

_NEEDED = {
    "detection": (
        "classes", "category_ids", "masks", "mean", "std", "box_head", "norm", "eval_short_side", "long_side"
    ),
    "segmentation": ("classes", "image_size", "norm", "eval_short_side", "ignore", "reduce_labels"),
}  # fmt: skip
"""Fields without which a detector or segmenter cannot be built or used."""
