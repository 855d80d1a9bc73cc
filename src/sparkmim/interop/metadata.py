"""Metadata of weight files, and their checks."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from sparkmim.arguments import Check, Choice, Range, Several
from sparkmim.errors import UserError
from sparkmim.models.detector import BoxHead
from sparkmim.models.pyramid import PyramidNorm
from sparkmim.models.spark import DecoderKind

Task = Literal["detection", "segmentation"]


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


def _checked(check: Check, default: Any = None) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class WeightsMetadata:
    """What a weight file says about its model; None where it says nothing. Sizes are in pixels, one per axis."""

    version: str | None = _checked(_text)  # of sparkmim, when the file was written
    model: str | None = _checked(_text)  # None for a Python object
    task: Task | None = _checked(Choice(get_args(Task)))
    step: int | None = _checked(_Whole(0, 2**53))  # optimiser steps taken in pretraining
    image_size: Sequence[int] | None = _checked(Several(_PIXELS, counts=(1, 3)))
    channels: int = _checked(_COUNT, 3)
    patch_size: int | None = _checked(_PIXELS)
    mask_ratio: float | None = _checked(Range(0, 1, above=True, below=True))
    decoder: DecoderKind | None = _checked(Choice(get_args(DecoderKind)))
    decoder_width: int | None = _checked(_COUNT)  # channels at the deepest map
    stages: int | None = _checked(_COUNT)  # how many feature maps were pretrained, from the shallowest on
    feature_modules: Sequence[str] | None = _checked(_names)  # modules whose outputs are the feature maps
    mean: Sequence[float] | None = _checked(Several(Range(-1e12, 1e12)))
    std: Sequence[float] | None = _checked(Several(Range(0, 1e12, above=True)))
    crop: float | None = _checked(Range(0, 1))  # share of the resized image; 0 for the whole image, null in the file
    pooled: bool | None = _checked(_flag)  # whether the classifier is a linear layer on the pooled deepest map
    classes: Sequence[str] | None = _checked(_names)
    category_ids: Sequence[int] | None = _checked(Several(_Whole(0, 2**53)))  # COCO's numbers of the classes
    masks: bool | None = _checked(_flag)  # whether the detector predicts masks
    box_head: BoxHead | None = _checked(Choice(get_args(BoxHead)))
    norm: PyramidNorm | None = _checked(Choice(get_args(PyramidNorm)))  # of the pyramid and heads
    eval_short_side: int | None = _checked(_PIXELS)
    long_side: int | None = _checked(_PIXELS)
    ignore: int | None = _checked(_Whole(0, 2**16 - 1))  # value in label maps that is not scored
    reduce_labels: bool | None = _checked(_flag)  # whether label maps count classes from 1, with 0 ignored
    label_values: Sequence[int] | None = _checked(Several(_Whole(0, 2**16 - 1)))  # of the classes, if not numbered
    figures: dict[str, float] = field(default_factory=dict)  # `top1`, `bbox/AP`, and other numbers found in the file

    def given(self, *names: str) -> dict[str, Any]:
        """Returns the named fields that are not None, as keyword arguments."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object for a file."""
        nulls = {"model", "feature_modules"}  # null where unknown: earlier versions look them up in every file
        if self.classes is None:
            nulls |= {"decoder_width", "stages", "mean", "std"}
        content = {name: getattr(self, name) for name in _CHECKS if name in nulls or getattr(self, name) is not None}
        if self.crop == 0:
            content["crop"] = None
        return {**self.figures, **content}

    @classmethod
    def from_json(cls, content: Any, path: str | Path) -> WeightsMetadata:
        """Checks and returns the metadata of a file; unknown keys are ignored, unless they hold a number."""
        if not isinstance(content, dict):
            raise UserError(f"{path} has metadata that are not a JSON object; use another file")
        values: dict[str, Any] = {}
        for name, check in _CHECKS.items():
            if (value := content.get(name)) is None:
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
        counts = {"channels": known.channels, "classes": len(known.classes or ())}
        one_each = {"mean": "channels", "std": "channels", "category_ids": "classes", "label_values": "classes"}
        for name, other in one_each.items():
            if name in values and len(values[name]) != (count := counts[other]):
                found = f"{len(values[name])} values for {count} {other}"
                raise UserError(f"{name} in the metadata of {path} has {found}; it must have one each")
        return known


_CHECKS: dict[str, Check] = {one.name: one.metadata["check"] for one in fields(WeightsMetadata) if one.metadata}

_NEEDED = {
    "detection": (
        "classes", "category_ids", "masks", "mean", "std", "box_head", "norm", "eval_short_side", "long_side"
    ),
    "segmentation": ("classes", "image_size", "norm", "eval_short_side", "ignore", "reduce_labels"),
}  # fmt: skip
"""Fields without which a detector or segmenter cannot be built or used."""
