"""torchvision's Faster R-CNN and Mask R-CNN on any encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import MultiScaleRoIAlign

from sparkmim.errors import UserError
from sparkmim.models.pyramid import WIDTH, PyramidBackbone, PyramidNorm, norm_layer_of

BoxHead = Literal["4conv1fc", "2fc"]

_ANCHOR = 8
"""Side of an anchor as a multiple of its level's stride: 32 pixels at stride 4 (Lin et al. 2017)."""

_BOX_SIDE, _MASK_SIDE = 7, 14
"""Sampling points per axis of a region, for boxes and for masks (He et al. 2017)."""

_HEAD_WIDTH = 1024


def create_detector(
    encoder: nn.Module,
    classes: int,
    masks: bool = True,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    box_head: BoxHead = "2fc",
    norm: PyramidNorm = "none",
    short_side: int = 800,
    long_side: int = 1333,
    image_size: Sequence[int] | None = None,
    feature_modules: Sequence[str] | None = None,
    **options: Any,
) -> nn.Module:
    """Builds a detector on an encoder: feature pyramid, region proposals, boxes, and masks (He et al. 2017).

    It is called as torchvision's detectors are, with a list of images `[C, H, W]` in 0…1 of any sizes. In training it
    also takes a list of targets (`boxes` `[N, 4]` as left, top, right, bottom in pixels, `labels` `[N]` in 1…classes,
    `masks` `[N, H, W]`), and returns a dictionary of losses; in evaluation it returns a dictionary of `boxes`,
    `labels`, `scores` and `masks` `[N, 1, H, W]` in 0…1 per image. Images keep their size in training, where the data
    set resizes them; in evaluation they are resized, and detections are mapped back.

    The encoder's parameters have the prefix `backbone.encoder.`. All are trained, BatchNorm included, except those that
    no feature map depends on.

    Args:
        encoder: any 2-D network with a feature hierarchy, with its weights loaded; the module itself is used.
        classes: number of classes, without the background.
        masks: whether to predict masks (Mask R-CNN) or boxes only (Faster R-CNN).
        channels: image channels.
        mean: per channel, that of the encoder's pretraining; None for ImageNet's.
        std: per channel; None for ImageNet's.
        box_head: `4conv1fc`, four 3×3 convolutions and a linear layer; or `2fc`, two linear layers.
        norm: norm of the pyramid's and the heads' convolutions, `batch` or `none`.
        short_side: shorter side of images in evaluation, smaller if the longer side would exceed `long_side`.
        long_side: maximum longer side of images in evaluation.
        image_size: as for `Hierarchy`.
        feature_modules: as for `Hierarchy`.
        options: further arguments of torchvision's `FasterRCNN`, such as `rpn_post_nms_top_n_train`.

    Raises:
        ValueError: if the encoder has no feature hierarchy, or an argument does not fit it.
    """
    if classes < 1:
        raise UserError(f"classes is {classes}; a detector needs 1 or more, without the background")
    if box_head not in ("4conv1fc", "2fc"):
        raise UserError(f"there is no box head {box_head!r}; choose 4conv1fc or 2fc")
    for name, values in (("mean", mean), ("std", std)):
        if values is None and channels != 3:
            raise UserError(f"channels is {channels}, which has no default {name}; give one number per channel")
        if values is not None and len(values) != channels:
            raise UserError(f"{name} has length {len(values)}, but channels is {channels}; give one number per channel")
    backbone = PyramidBackbone(encoder, channels, norm, True, image_size, feature_modules)
    norm_layer = norm_layer_of(norm)
    if box_head == "2fc":
        head = TwoMLPHead(WIDTH * _BOX_SIDE**2, _HEAD_WIDTH)
    else:
        head = FastRCNNConvFCHead((WIDTH, _BOX_SIDE, _BOX_SIDE), [WIDTH] * 4, [_HEAD_WIDTH], norm_layer)
    strides = backbone.strides
    options = {
        "rpn_anchor_generator": AnchorGenerator(
            tuple((_ANCHOR * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
        ),
        "box_roi_pool": _roi_align(_BOX_SIDE, strides[:-1]),
        "box_head": head,
        "image_mean": None if mean is None else list(mean),
        "image_std": None if std is None else list(std),
        "min_size": short_side,
        "max_size": long_side,
        "size_divisible": backbone.size_divisible,
        "_skip_resize": True,  # in training only
        **options,
    }
    if masks:
        options["mask_roi_pool"] = _roi_align(_MASK_SIDE, strides[:-1])
        options["mask_head"] = MaskRCNNHeads(WIDTH, [WIDTH] * 4, 1, norm_layer)
    # One class more: torchvision's 0 is the background.
    detector: nn.Module = (MaskRCNN if masks else FasterRCNN)(backbone, classes + 1, **options)
    return detector


def _roi_align(side: int, strides: Sequence[int]) -> Any:
    """Builds RoIAlign on the levels "0", "1", … with the given strides.

    torchvision derives strides from the first batch, which fails for images much smaller than their padded size and
    for strides that do not double.
    """
    align = MultiScaleRoIAlign([str(level) for level in range(len(strides))], side, sampling_ratio=2)
    align.scales = [1 / stride for stride in strides]
    align.map_levels = _LevelOfBox(strides)
    return align


class _LevelOfBox:
    """Assigns boxes to levels by size: one of 224² to stride 16, smaller ones to finer levels (Lin et al. 2017, eq. 1).

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 30, 30], [0, 0, 112, 112], [0, 0, 224, 224], [0, 0, 900, 900]])
        >>> _LevelOfBox((4, 8, 16, 32))([boxes])
        tensor([0, 1, 2, 3])
    """

    def __init__(self, strides: Sequence[int]) -> None:
        self.least = [side * 224 / 16 for side in strides[1:]]  # pixels; smaller boxes go to a finer level

    def __call__(self, boxes: Sequence[Tensor]) -> Tensor:
        """Boxes `[N_i, 4]` of each image to levels `[ΣN_i]`."""
        sizes = torch.cat([(box[:, 2:] - box[:, :2]).prod(1).sqrt() for box in boxes])  # [ΣN_i]
        return torch.bucketize(sizes, torch.tensor(self.least, device=sizes.device, dtype=sizes.dtype), right=True)
