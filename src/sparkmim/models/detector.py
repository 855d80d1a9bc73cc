"""Faster R-CNN and Mask R-CNN of torchvision, on any encoder."""

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
"""Side of an anchor in steps of its level: 32 pixels at stride 4, 64 at stride 8 and so on (Lin et al. 2017)."""

_BOX_SIDE, _MASK_SIDE = 7, 14
"""Points per axis that a region is sampled at, for boxes and for masks (He et al. 2017)."""

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
    **settings: Any,
) -> nn.Module:
    """Builds a detector on an encoder: feature pyramid, region proposals, boxes, and masks (He et al. 2017).

    It takes and returns what torchvision's detectors do: a list of images `[C, H, W]` in 0…1, each of its own size,
    and in training a list of targets (`boxes` `[N, 4]` as left, top, right, bottom in pixels, `labels` `[N]` in
    1…classes, `masks` `[N, H, W]`) for a dictionary of losses; in evaluation a list of `boxes`, `labels`, `scores`
    and `masks` `[N, 1, H, W]` in 0…1. In training images keep their size, since the data set varies it; in evaluation
    they are resized, and what is found is mapped back.

    The encoder's tensors stand under `backbone.encoder.` and their own names. All of it is trained, BatchNorm included,
    but for parameters that no feature map depends on.

    Args:
        encoder: any 2-D network with a feature hierarchy, with its weights loaded; the module itself is used.
        classes: kinds of objects, without the background.
        masks: whether to segment the objects found (Mask R-CNN), or to box them only (Faster R-CNN).
        channels: image channels.
        mean: of each channel, as the encoder's weights know it; None for ImageNet's.
        std: of each channel; None for ImageNet's.
        box_head: four 3×3 convolutions and a linear layer, or two linear layers.
        norm: in the pyramid and between the convolutions of the heads: `batch` or `none`.
        short_side: of images in evaluation, unless the longer side would exceed `long_side`.
        long_side: of images in evaluation at most.
        image_size: as for `Hierarchy`.
        feature_modules: as for `Hierarchy`.
        settings: further arguments of torchvision's `FasterRCNN`, such as `rpn_post_nms_top_n_train`.

    Raises:
        ValueError: if the network has no hierarchy, or an argument does not fit it.
    """
    if classes < 1:
        raise UserError(f"there are {classes} classes; a detector needs at least one kind of object")
    if box_head not in ("4conv1fc", "2fc"):
        raise UserError(f"there is no box head {box_head!r}; choose 4conv1fc or 2fc")
    for name, values in (("mean", mean), ("std", std)):
        if values is None and channels != 3:
            raise UserError(f"images of {channels} channels need their {name}; give one number per channel")
        if values is not None and len(values) != channels:
            raise UserError(f"{name} has {len(values)} numbers for images of {channels} channels; give one each")
    backbone = PyramidBackbone(encoder, channels, norm, True, image_size, feature_modules)
    norm_layer = norm_layer_of(norm)
    if box_head == "2fc":
        head = TwoMLPHead(WIDTH * _BOX_SIDE**2, _HEAD_WIDTH)
    else:
        head = FastRCNNConvFCHead((WIDTH, _BOX_SIDE, _BOX_SIDE), [WIDTH] * 4, [_HEAD_WIDTH], norm_layer)
    strides = backbone.strides
    settings = {
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
        "_skip_resize": True,  # in training
        **settings,
    }
    if masks:
        settings["mask_roi_pool"] = _roi_align(_MASK_SIDE, strides[:-1])
        settings["mask_head"] = MaskRCNNHeads(WIDTH, [WIDTH] * 4, 1, norm_layer)
    # One class more: torchvision's 0 is the background.
    detector: nn.Module = (MaskRCNN if masks else FasterRCNN)(backbone, classes + 1, **settings)
    return detector


def _roi_align(side: int, strides: Sequence[int]) -> Any:
    """RoIAlign on the levels "0", "1", … of these strides.

    torchvision would read the strides off the first batch, which fails for images much smaller than their padding and
    for strides that do not double.
    """
    align = MultiScaleRoIAlign([str(level) for level in range(len(strides))], side, sampling_ratio=2)
    align.scales = [1 / stride for stride in strides]
    align.map_levels = _LevelOfBox(strides)
    return align


class _LevelOfBox:
    """The level to read a box from: that of stride 16 for one of 224², finer for smaller ones (Lin et al. 2017, eq. 1).

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 30, 30], [0, 0, 112, 112], [0, 0, 224, 224], [0, 0, 900, 900]])
        >>> _LevelOfBox((4, 8, 16, 32))([boxes])
        tensor([0, 1, 2, 3])
    """

    def __init__(self, strides: Sequence[int]) -> None:
        self.least = [side * 224 / 16 for side in strides[1:]]  # pixels; smaller boxes are for a finer level

    def __call__(self, boxes: Sequence[Tensor]) -> Tensor:
        """Boxes `[N_i, 4]` of each image to level numbers `[ΣN_i]`."""
        sizes = torch.cat([(box[:, 2:] - box[:, :2]).prod(1).sqrt() for box in boxes])  # [ΣN_i]
        return torch.bucketize(sizes, torch.tensor(self.least, device=sizes.device, dtype=sizes.dtype), right=True)
