"""Semantic segmentation on any encoder with the head of Panoptic FPN."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparkmim.errors import UserError
from sparkmim.models.pyramid import WIDTH, PyramidBackbone, PyramidNorm

_BRANCH_WIDTH = 128
_GROUPS = 32


class Segmenter(nn.Module):
    """A feature pyramid whose levels are upsampled to the finest, summed, and classified per position.

    Each level is upsampled by 3×3 convolution, GroupNorm, ReLU and bilinear doubling, as often as the resolution
    doubles (Kirillov et al. 2019, section 3.1).

    Args:
        backbone: a pyramid without pooled level.
        classes: number of classes; the background counts as one.
    """

    def __init__(self, backbone: PyramidBackbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        finest = backbone.strides[0]
        self.branches = nn.ModuleList(_branch(stride / finest) for stride in backbone.strides)
        self.classify = nn.Conv2d(_BRANCH_WIDTH, classes, 1)
        for module in (*self.branches.modules(), self.classify):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `[B, C, H, W]` of any size to float32 logits `[B, classes, H, W]`."""
        height, width = images.shape[2:]
        unit = self.backbone.size_divisible
        padded = F.pad(images, (0, -width % unit, 0, -height % unit))  # [B, C, H', W']
        levels = self.backbone(padded)  # [B, 256, H' / s_i, W' / s_i]
        size = levels["0"].shape[2:]
        branched = [branch(level) for branch, level in zip(self.branches, levels.values(), strict=True)]
        resized = [_resize(map_, size) for map_ in branched]  # [B, 128, H' / s_1, W' / s_1]
        logits = self.classify(torch.stack(resized).sum(0)).float()  # [B, classes, H' / s_1, W' / s_1]
        return _resize(logits, padded.shape[2:])[..., :height, :width]


def create_segmenter(
    encoder: nn.Module,
    classes: int,
    channels: int = 3,
    norm: PyramidNorm = "none",
    image_size: Sequence[int] | None = None,
    feature_modules: Sequence[str] | None = None,
) -> Segmenter:
    """Builds a segmentation network on an encoder, whose parameters get the prefix `backbone.encoder.`.

    Args:
        encoder: any 2-D network with a feature hierarchy, with its weights loaded; the module itself is used.
        classes: number of classes, with the background.
        channels: image channels.
        norm: norm of the pyramid, `batch` or `none`.
        image_size: as for `Hierarchy`.
        feature_modules: as for `Hierarchy`.

    Raises:
        ValueError: if the encoder has no feature hierarchy, or there are fewer than two classes.
    """
    if classes < 2:
        raise UserError(f"classes is {classes}; segmentation needs 2 or more, with the background")
    return Segmenter(PyramidBackbone(encoder, channels, norm, False, image_size, feature_modules), classes)


def _branch(ratio: float) -> nn.Sequential:
    """Builds the branch of a level `ratio` times as coarse as the finest: it doubles the size `log2(ratio)` times."""
    doublings = round(math.log2(ratio))
    layers: list[nn.Module] = []
    width = WIDTH
    for _ in range(max(1, doublings)):
        layers += [
            nn.Conv2d(width, _BRANCH_WIDTH, 3, padding=1, bias=False),
            nn.GroupNorm(_GROUPS, _BRANCH_WIDTH),
            nn.ReLU(inplace=True),
        ]
        if doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
        width = _BRANCH_WIDTH
    return nn.Sequential(*layers)


def _resize(map_: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes `[B, C, *S]` to `[B, C, *size]` bilinearly."""
    if map_.shape[2:] == tuple(size):
        return map_
    return F.interpolate(map_, size=list(size), mode="bilinear", align_corners=False)
