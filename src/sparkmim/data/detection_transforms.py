"""Transforms of images with boxes and masks, for detectors.

Images get their final size, but are not normalised: torchvision's detectors do that, and must not resize them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from sparkmim.data.coco import Sample
from sparkmim.errors import UserError

DetectionTransform = Callable[[Any], Sample]
"""From an item of `CocoImages` to an image, float32 `[3, h, w]` in 0…1, and its target, as plain tensors."""

Crop = Literal["none", "detr"]


def detection_transform(
    shortest: Sequence[int], longest: int = 1333, flip: float = 0.5, crop: Crop = "none"
) -> DetectionTransform:
    """Makes the usual augmentation for detectors: mirroring, random crops if wanted, and a random size.

    The shorter side is resized to a size drawn from `shortest`, or the longer side to `longest` if that is less. The
    crop of DETR (Carion et al., ECCV 2020) comes before that, with probability 0.5: the shorter side is resized to 400,
    500 or 600, and a part of 384 to 600 pixels per axis is cut out.

    Boxes are clipped to the rest of the image. Those of less than a pixel on a side, or whose mask is cut away, are
    left out.
    """
    _check_sizes(shortest, longest)
    steps: list[nn.Module] = [v2.RandomHorizontalFlip(flip)]
    if crop == "detr":
        part = v2.Compose([v2.RandomShortestSize([400, 500, 600]), _RandomPart(384, 600)])
        steps.append(v2.RandomApply([part], 0.5))
    steps.append(v2.RandomShortestSize(list(shortest), longest))
    transform: DetectionTransform = v2.Compose([*steps, _Visible(), to_float(), v2.ToPureTensor()])
    return transform


def detection_resize(shortest: int, longest: int) -> Callable[[Tensor], Tensor]:
    """Makes the transform for evaluation, from uint8 `[3, H, W]` to float32 in 0…1, without anything random.

    The shorter side is resized to `shortest`, or the longer one to `longest` if that is less.
    """
    _check_sizes([shortest], longest)
    resize = v2.RandomShortestSize([shortest], longest)
    transform: Callable[[Tensor], Tensor] = v2.Compose([resize, v2.ToDtype(torch.float32, scale=True)])
    return transform


class _RandomPart(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Crop of `fewest` to `most` pixels per axis, or of the whole axis if that is less, at a random place."""

    def __init__(self, fewest: int, most: int) -> None:
        super().__init__()
        self.fewest, self.most = fewest, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        sizes = [self._draw(min(self.fewest, side), min(self.most, side)) for side in (height, width)]
        top, left = self._draw(0, height - sizes[0]), self._draw(0, width - sizes[1])
        return {"top": top, "left": left, "height": sizes[0], "width": sizes[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)

    @staticmethod
    def _draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, ()))


class _Visible(nn.Module):
    """Clips boxes to the image, and leaves out objects that are no longer on it."""

    def forward(self, sample: Sample) -> Sample:
        image, target = sample
        boxes = v2.functional.clamp_bounding_boxes(target["boxes"])
        _, seen = v2.functional.sanitize_bounding_boxes(boxes)  # bool [n]
        kept = {"boxes": boxes, "labels": target["labels"]}
        if "masks" in target:
            kept["masks"] = target["masks"]
            seen = seen & target["masks"].flatten(1).any(1).bool()
        return image, {**target, **{name: values[seen] for name, values in kept.items()}}


def to_float() -> nn.Module:
    """Makes the step that converts uint8 images to float32 in 0…1; float images and targets are left unchanged."""
    step: nn.Module = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return step


def _check_sizes(shortest: Sequence[int], longest: int) -> None:
    if not shortest or min(shortest) < 1:
        raise UserError(f"shortest is {list(shortest)}; it takes sizes in pixels, at least one, above 0")
    if longest < max(shortest):
        raise UserError(f"longest is {longest}, but the shorter side may have {max(shortest)} pixels already")
