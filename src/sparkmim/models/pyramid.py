"""Feature pyramid on any encoder, for detection and segmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from sparkmim.errors import UserError
from sparkmim.models.decoder import ChannelLayerNorm
from sparkmim.models.hierarchy import Hierarchy
from sparkmim.models.spark import encoder_norm

PyramidNorm = Literal["batch", "none"]

WIDTH = 256
"""Channels of each level."""

_FINEST = 4
"""Maps of smaller stride are left out if there are coarser ones: they cost more than all others together."""


class PyramidBackbone(nn.Module):
    """An encoder and a feature pyramid network on its maps (Lin et al. 2017), for images of any size.

    The maps of a LayerNorm network are normalised first, as in ConvNeXt's own detectors, since its residual stream
    is unbounded. Parameters that no map depends on, such as a classifier's, get `requires_grad=False`.

    Args:
        encoder: any 2-D network with a feature hierarchy; the module itself is used.
        channels: image channels.
        norm: norm after the pyramid's convolutions, `batch` or `none`.
        pooled: whether to add a level at twice the deepest stride.
        image_size: as for `Hierarchy`.
        feature_modules: as for `Hierarchy`.

    Attributes:
        strides: strides of the levels, ascending.
        out_channels: channels of each level, under the name that torchvision's detectors expect.
        low_precision: whether encoder and pyramid compute in bfloat16. The levels are float32 all the same: heads
            need that precision for boxes.
        size_divisible: number that image sizes must be multiples of.

    Raises:
        ValueError: if the encoder has no feature hierarchy.
    """

    def __init__(
        self,
        encoder: nn.Module,
        channels: int = 3,
        norm: PyramidNorm = "none",
        pooled: bool = True,
        image_size: Sequence[int] | None = None,
        feature_modules: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self._hierarchy_of = partial(
            Hierarchy, channels=channels, image_size=image_size, feature_modules=feature_modules
        )
        hierarchy = self._hierarchy_of(encoder)
        self.encoder = encoder
        self._hierarchy = [hierarchy]  # a list keeps the encoder from being registered twice
        self._frozen: list[nn.Module] = []
        for name in hierarchy.unreached:
            encoder.get_parameter(name).requires_grad_(False)
        fine = sum(stride < _FINEST for stride in hierarchy.strides)
        self._first = min(fine, len(hierarchy.strides) - 1)
        widths, strides = hierarchy.channels[self._first :], hierarchy.strides[self._first :]
        normed = encoder_norm(encoder) == "layer"
        self.norms = nn.ModuleList(ChannelLayerNorm(width, eps=1e-6) if normed else nn.Identity() for width in widths)
        self.pyramid: nn.Module = FeaturePyramidNetwork(
            list(widths), WIDTH, LastLevelMaxPool() if pooled else None, norm_layer_of(norm)
        )
        self.strides = (*strides, 2 * strides[-1]) if pooled else strides
        self.out_channels = WIDTH
        self.low_precision = False
        self.size_divisible = math.lcm(hierarchy.patch_unit, self.strides[-1])

    @property
    def hierarchy(self) -> Hierarchy:
        """The encoder's feature hierarchy."""
        return self._hierarchy[0]

    def freeze(self, stages: int) -> None:
        """Freezes the encoder's first stages: parameters and BatchNorm statistics.

        For a ResNet, 1 freezes the stem and the first stage, as `FREEZE_AT: 2` of Detectron2.

        Args:
            stages: freeze the part up to this feature map, counted from 1 at the shallowest; 0 for none.

        Raises:
            ValueError: if the encoder has fewer feature maps.
        """
        count = len(self.hierarchy.strides)
        if not 0 <= stages <= count:
            kind = type(self.encoder).__name__
            raise UserError(f"frozen_stages is {stages}; {kind} has {count} stages, so it takes 0 (none) to {count}")
        if not stages:
            return
        others = set(self._hierarchy_of(self.encoder, stages=stages).unreached)
        for name, parameter in self.encoder.named_parameters():
            if name not in others:
                parameter.requires_grad_(False)
        for prefix, module in self.encoder.named_modules():
            within = {name for name, _ in module.named_parameters(prefix)}
            if within and others.isdisjoint(within):
                self._frozen.append(module)
        self.train(self.training)

    def train(self, mode: bool = True) -> PyramidBackbone:
        """Sets the mode of all modules but the frozen ones, which stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()  # turns off their stochastic depth too
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `[B, C, H, W]` to levels `[B, 256, H / s_i, W / s_i]`, fine to coarse, named "0", "1", … "pool"."""
        low = torch.autocast(images.device.type, torch.bfloat16) if self.low_precision else nullcontext()
        with low:
            maps = self.hierarchy(images)[self._first :]  # [B, C_i, H / s_i, W / s_i]
            named = {str(i): norm(map_) for i, (norm, map_) in enumerate(zip(self.norms, maps, strict=True))}
            levels: dict[str, Tensor] = self.pyramid(named)
        return {name: level.float() for name, level in levels.items()} if self.low_precision else levels


class RegionBatchNorm(nn.BatchNorm2d):
    """BatchNorm over regions of images; a batch without regions leaves its statistics as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, h, w]` to the same shape; N may be 0."""
        if len(x):
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def norm_layer_of(norm: PyramidNorm) -> type[nn.Module] | None:
    """Returns the norm layer of pyramids and heads, None for `none`; SyncBatchNorm conversion replaces it.

    Raises:
        ValueError: if `norm` is neither `batch` nor `none`.
    """
    if norm not in ("batch", "none"):
        raise UserError(f"there is no norm {norm!r} for pyramids and heads; choose batch or none")
    return RegionBatchNorm if norm == "batch" else None
