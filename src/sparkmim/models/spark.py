"""SparK: masked image modelling for convolutional networks (Tian et al., ICLR 2023, arXiv:2301.03580)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparkmim.errors import UserError
from sparkmim.models.checkpointing import checkpointing
from sparkmim.models.decoder import Decoder, Densify, NormKind, from_patches, initialise, to_patches
from sparkmim.models.encoders import create_encoder
from sparkmim.models.fcmae import FCMAEDecoder
from sparkmim.models.hierarchy import Hierarchy, rank_of
from sparkmim.models.masking import check_visible, patch_grid, random_visible, visible_per_sample
from sparkmim.sparse import PackedTensor, PatchLayout, naming_modules, pack, unpack

DecoderKind = Literal["spark", "fcmae"]

DECODER_WIDTH: dict[DecoderKind, int] = {"spark": 768, "fcmae": 512}
"""Decoder widths of the papers."""


@dataclass
class SparKOutput:
    """Result of a forward pass, on the images' device.

    Attributes:
        loss: scalar.
        visible: bool `[B, *grid]`, the mask.
        prediction: `[B, C, *S]`, the decoder's output: patches normalised by their own mean and deviation.
        images: `[B, C, *S]`, the input.
        features: `[B, C_k]`, the deepest feature map, averaged over visible positions; None unless asked for.
    """

    loss: Tensor
    visible: Tensor
    prediction: Tensor
    images: Tensor
    features: Tensor | None = None

    @property
    def reconstruction(self) -> Tensor:
        """`[B, C, *S]` in the input's units: hidden patches predicted, visible ones copied from the input."""
        block = [size // cells for size, cells in zip(self.images.shape[2:], self.visible.shape[1:], strict=True)]
        with torch.no_grad():
            mean, deviation = patch_statistics(to_patches(self.images, block))
            predicted = to_patches(self.prediction.to(self.images.dtype), block) * deviation + mean
            visible = self.visible.flatten(1)[..., None]  # [B, patches, 1]
            return from_patches(
                torch.where(visible, to_patches(self.images, block), predicted), self.visible.shape[1:], block
            )


class SparK(nn.Module):
    """A convolutional encoder with the decoder that pretrains it.

    Args:
        encoder: any convolutional network, or a name for `create_encoder`. The module itself is used: same
            parameters, same `state_dict`, usable on dense images at any time.
        image_size: one size per axis; a single number for a square, or for a cube if the encoder convolves in 3-D.
        mask_ratio: share of hidden patches.
        patch_size: side of a patch in pixels, a multiple of the encoder's stride; None for the stride, or the
            smallest multiple that its inner maps allow.
        decoder_width: channels of the decoder at the deepest map; None for the paper's, 768 (FCMAE: 512).
        channels: image channels.
        decoder: `spark`, hierarchical; or `fcmae`, the single block of ConvNeXt V2 on the deepest map.
        stages: number of feature maps to use, from the shallowest; None for all (at most four). Fewer give a
            smaller stride and allow smaller patches.
        feature_modules: names of the encoder's modules whose outputs are the maps, shallow to deep; None to find them.
        checkpoint_gradients: whether to save memory by computing activations again in the backward pass.

    Raises:
        ValueError: if sizes do not divide, or the encoder has no feature hierarchy.

    Example:
        >>> model = SparK("resnet18", image_size=64, decoder_width=64)
        >>> out = model(torch.randn(2, 3, 64, 64))
        >>> out.loss.shape, out.visible.shape, out.reconstruction.shape
        (torch.Size([]), torch.Size([2, 2, 2]), torch.Size([2, 3, 64, 64]))
    """

    def __init__(
        self,
        encoder: nn.Module | str,
        image_size: int | Sequence[int] = 224,
        mask_ratio: float = 0.6,
        patch_size: int | None = None,
        decoder_width: int | None = None,
        channels: int = 3,
        decoder: DecoderKind = "spark",
        stages: int | None = None,
        feature_modules: Sequence[str] | None = None,
        checkpoint_gradients: bool = False,
    ) -> None:
        super().__init__()
        if decoder not in get_args(DecoderKind):
            raise UserError(f"there is no decoder {decoder!r}; choose spark or fcmae")
        if isinstance(encoder, str):
            encoder = create_encoder(encoder, channels)
        size = (image_size,) * rank_of(encoder) if isinstance(image_size, int) else tuple(image_size)
        rank = len(size)
        self.encoder = encoder
        # A list keeps the encoder from being registered twice.
        self._hierarchy = [Hierarchy(encoder, channels, rank, size, stages, feature_modules)]
        hierarchy = self.hierarchy
        self.channels = channels
        self.image_size = size
        self.patch_size = hierarchy.patch_unit if patch_size is None else patch_size
        self.grid = patch_grid(size, self.patch_size, hierarchy.patch_unit)
        self.mask_ratio = mask_ratio
        self.checkpoint_gradients = checkpoint_gradients
        visible_per_sample(self.grid, mask_ratio)

        width = DECODER_WIDTH[decoder] if decoder_width is None else decoder_width
        norm = encoder_norm(encoder)
        self.decoder: Decoder | FCMAEDecoder
        self.densify = nn.ModuleList()
        if decoder == "fcmae":
            self.decoder = FCMAEDecoder(width, hierarchy.channels[-1], hierarchy.stride, channels, rank)
        else:
            self.decoder = Decoder(width, hierarchy.strides, channels, rank, checkpoint_gradients)
            for width_in, stride in zip(hierarchy.channels, hierarchy.strides, strict=True):
                deepest = stride == hierarchy.stride
                self.densify.append(Densify(width_in, self.decoder.width_at(stride), norm, deepest, rank))
        initialise(self.decoder)
        initialise(self.densify)

    @property
    def hierarchy(self) -> Hierarchy:
        """The encoder's feature hierarchy, with its `strides`, `channels` and `unreached` parameters."""
        return self._hierarchy[0]

    @property
    def unreached_parameters(self) -> tuple[str, ...]:
        """Names of the parameters without a gradient in pretraining, such as a classifier's.

        Keep them out of the optimiser, and set their `requires_grad` to False under
        `DistributedDataParallel`; `sparkmim.pretrain` does both.
        """
        return tuple(f"encoder.{name}" for name in self.hierarchy.unreached)

    def draw_visible(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws a mask, on the CPU or the generator's device: bool `[batch_size, *grid]`, true where visible."""
        return random_visible(batch_size, self.grid, self.mask_ratio, generator)

    def encode_packed(self, images: Tensor, visible: Tensor) -> list[PackedTensor]:
        """Packed feature maps `[B, C_i, *(S / s_i)]` of the visible patches, shallow to deep."""
        if list(images.shape[2:]) != list(self.image_size):
            expected, got = ("×".join(map(str, size)) for size in (self.image_size, images.shape[2:]))
            raise UserError(f"images are {got}, but this model was built for {expected}")
        if images.shape[1] != self.channels or not images.is_floating_point():
            got = f"{images.shape[1]} channels of {images.dtype}"
            raise UserError(f"images have {got}, but this model takes {self.channels} channels, normalised, as floats")
        check_visible(visible, images.shape[0], self.grid)
        packed = pack(images, PatchLayout(visible, images.device))
        saving = self.checkpoint_gradients and torch.is_grad_enabled()
        with naming_modules(self.encoder), checkpointing(self.encoder) if saving else nullcontext():
            maps: list[PackedTensor] = self.hierarchy(packed)
        return maps

    def encode(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        """Dense feature maps `[B, C_i, *(S / s_i)]`, shallow to deep, zero where masked.

        Args:
            images: `[B, C, *S]`.
            visible: bool `[B, *grid]`, on any device; on the CPU, it costs a GPU no synchronisation.
        """
        return [unpack(map_) for map_ in self.encode_packed(images, visible)]

    def _densified(
        self, images: Tensor, visible: Tensor, with_features: bool
    ) -> tuple[list[Tensor], PatchLayout, Tensor | None]:
        """Returns dense maps for the decoder, the layout of the mask, and the pooled features."""
        maps = self.encode_packed(images, visible)
        deepest, patches = maps[-1], maps[0].patches
        features = deepest.mean(tuple(range(2, deepest.ndim))) if with_features else None  # [B, C_k]
        if isinstance(self.decoder, FCMAEDecoder):
            return [self.decoder.fill(deepest)], patches, features
        return [densify(map_) for densify, map_ in zip(self.densify, maps, strict=True)], patches, features

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        generator: torch.Generator | None = None,
        with_features: bool = False,
    ) -> SparKOutput:
        """Hides patches, predicts them, and computes the loss.

        Args:
            images: `[B, C, *S]`, normalised.
            visible: bool `[B, *grid]`, true where visible, on any device; on the CPU, it costs a GPU no
                synchronisation. None draws it by `draw_visible`.
            generator: draws the mask.
            with_features: whether to average the deepest map too.

        Raises:
            ValueError: if the image size is not the model's, or the mask hides all or none of a sample's patches.
        """
        if visible is None:
            visible = self.draw_visible(images.shape[0], generator)
        densified = self._densified
        if torch.compiler.is_compiling():  # masks differ in every step, and with them the graph
            densified = torch.compiler.disable(densified)  # type: ignore[no-untyped-call]
        maps, patches, features = densified(images, visible, with_features)
        prediction = self.decoder(maps)
        loss = reconstruction_loss(prediction, images, patches)
        return SparKOutput(loss, patches.visible, prediction, images, features)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and `sqrt(unbiased variance + 1e-6)` of each patch: `[…, C · p²]` to `[…, 1]` each."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def reconstruction_loss(prediction: Tensor, images: Tensor, patches: PatchLayout) -> Tensor:
    """Mean squared error to the hidden patches of the batch, each normalised by its own mean and deviation.

    Args:
        prediction: `[B, C, *S]`.
        images: `[B, C, *S]`.
        patches: the layout of the mask.
    """
    block = [size // cells for size, cells in zip(images.shape[2:], patches.grid, strict=True)]
    # At least float32: half precision would lose the digits that training improves.
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    target, predicted = (
        to_patches(x.to(dtype), block).flatten(0, 1).index_select(0, patches.hidden)  # [hidden, C · p²]
        for x in (images, prediction)
    )
    mean, deviation = patch_statistics(target)
    error = predicted - (target - mean) / deviation
    # 1e-8 as in the original implementation; without it, the ninth digit differs.
    return error.square().mean(1).sum() / (error.shape[0] + 1e-8)


def encoder_norm(encoder: nn.Module) -> NormKind:
    """Returns the most frequent kind of norm in an encoder."""
    kinds: Counter[NormKind] = Counter()
    for module in encoder.modules():
        if isinstance(module, _BatchNorm):
            kinds["batch"] += 1
        elif isinstance(module, nn.LayerNorm) or type(module).__name__.startswith("LayerNorm"):
            kinds["layer"] += 1
        elif isinstance(module, nn.GroupNorm):
            kinds["none"] += 1
    return kinds.most_common(1)[0][0] if kinds else "none"
