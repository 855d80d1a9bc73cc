"""Images cut into patches, and the loss that compares them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_patches(images: Tensor, block: Sequence[int]) -> Tensor:
    """Cuts `[B, C, *S]` into `[B, patches, C · prod(block)]`."""
    rank = len(block)
    for axis, size in reversed(list(enumerate(block, start=2))):
        images = torch.unflatten(images, axis, (-1, size))  # [B, C, grid_1, block_1, …]
    grid_axes, block_axes = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    return images.permute(0, *grid_axes, 1, *block_axes).flatten(1 + rank).flatten(1, rank)


def from_patches(patches: Tensor, grid: Sequence[int], block: Sequence[int]) -> Tensor:
    """Puts `[B, patches, C · prod(block)]` together to `[B, C, *S]`."""
    rank = len(block)
    x = patches.view(patches.shape[0], *grid, -1, *block)  # [B, *grid, C, *block]
    order = [0, 1 + rank]
    for axis in range(rank):
        order += [1 + axis, 2 + rank + axis]
    x = x.permute(order)  # [B, C, grid_1, block_1, …]
    return x.reshape(*x.shape[:2], *(cells * size for cells, size in zip(grid, block, strict=True)))


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and `sqrt(variance + 1e-6)` of every patch, the variance unbiased: `[B, patches, 1]` each."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def reconstruction_loss(prediction: Tensor, images: Tensor, visible: Tensor, patch_size: int) -> Tensor:
    """Squared error to patches normalised one by one, averaged over the masked patches of the batch.

    Args:
        prediction: `[B, C, *S]`.
        images: `[B, C, *S]`.
        visible: bool `[B, *grid]`.
        patch_size: pixels per side.
    """
    block = [patch_size] * (images.ndim - 2)
    masked = ~visible.flatten(1)  # [B, patches]
    # In float32 at least: half precision would lose the digits that training is about.
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    target = to_patches(images.to(dtype), block)[masked]  # [masked, C · p²]
    mean, deviation = patch_statistics(target)
    error = to_patches(prediction.to(dtype), block)[masked] - (target - mean) / deviation
    # The original implementation guards its division like this; dropping it moves the ninth digit.
    return error.square().mean(1).sum() / (error.shape[0] + 1e-8)
