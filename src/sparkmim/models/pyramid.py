"""A feature pyramid on the maps of any encoder: what detection and segmentation stand on."""

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
"""Channels of every level."""

_FINEST = 4
"""Maps of smaller stride are left out where there are coarser ones: they cost more than all others together."""


class PyramidBackbone(nn.Module):
    """An encoder and a feature pyramid network on its maps (Lin et al. 2017), for images of any size.

    The maps of a LayerNorm network are normalised first, as in ConvNeXt's own detectors: its stages hand on a residual
    stream that nothing bounds. Parameters that no map depends on, such as a classifier's, are set not to be trained.

    Args:
        encoder: any 2-D network with a feature hierarchy; the module itself is used.
        channels: image channels.
        norm: after the convolutions of the pyramid: `batch` or `none`.
        pooled: whether to add a level at twice the deepest stride.
        image_size: one more size to try in finding the maps, for networks that ask for it.
        feature_modules: names of the modules whose outputs are the maps; None to find them.

    Attributes:
        strides: of the levels, ascending.
        out_channels: channels of every level, the name that torchvision's detectors look for.
        low_precision: whether this part computes in bfloat16, whatever surrounds it; what stands on it gets float32,
            for boxes are too fine for that.
        size_divisible: what the sizes of images must be multiples of.

    Raises:
        ValueError: if the network has no hierarchy.
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
        self._hierarchy = [hierarchy]  # in a list: its parameters are the encoder's
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
        """How the encoder's feature maps are found."""
        return self._hierarchy[0]

    def freeze(self, stages: int) -> None:
        """Keeps the encoder as it is up to its feature map of this number, counted from 1 at the shallowest.

        Its parameters are not trained from then on, and statistics of BatchNorm not updated. Of a ResNet, 1 is the stem
        and the first stage: what Detectron2 calls `FREEZE_AT: 2`.

        Args:
            stages: how many maps; 0 for none.

        Raises:
            ValueError: if there are fewer.
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
        """As usual; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()  # with all in it, stochastic depth too
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Levels `[B, 256, H / s_i, W / s_i]` of images `[B, C, H, W]`, fine to coarse, by name: "0", "1", … "pool"."""
        low = torch.autocast(images.device.type, torch.bfloat16) if self.low_precision else nullcontext()
        with low:
            maps = self.hierarchy(images)[self._first :]  # [B, C_i, H / s_i, W / s_i]
            named = {str(i): norm(map_) for i, (norm, map_) in enumerate(zip(self.norms, maps, strict=True))}
            levels: dict[str, Tensor] = self.pyramid(named)
        return {name: level.float() for name, level in levels.items()} if self.low_precision else levels


class RegionBatchNorm(nn.BatchNorm2d):
    """BatchNorm over regions of images, of which a batch may have none: its statistics then stay as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, h, w]`, N possibly 0."""
        if len(x):
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def norm_layer_of(norm: PyramidNorm) -> type[nn.Module] | None:
    """The layer to put after convolutions of pyramids and heads, or None; a BatchNorm that SyncBatchNorm can replace.

    Raises:
        ValueError: if there is no such norm.
    """
    if norm not in ("batch", "none"):
        raise UserError(f"there is no norm {norm!r} for pyramids and heads; choose batch or none")
    return RegionBatchNorm if norm == "batch" else None
