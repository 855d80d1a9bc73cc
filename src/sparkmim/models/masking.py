"""Random masks, and checks of masks and image sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparkmim.errors import UserError


def visible_per_sample(grid: Sequence[int], mask_ratio: float) -> int:
    """Returns the visible patches per sample: `round(patches · (1 - mask_ratio))`, at least 1, at most all but one.

    Raises:
        ValueError: if there are fewer than two patches, or the ratio is not between 0 and 1.
    """
    patches = int(torch.Size(grid).numel())
    if patches < 2:
        raise UserError(
            f"a grid of {'×'.join(map(str, grid))} patches leaves nothing to hide; use images of at least two patches"
        )
    if not 0 < mask_ratio < 1:
        raise UserError(f"mask_ratio is {mask_ratio}; it must lie between 0 and 1, both excluded (the paper's is 0.6)")
    return min(max(round(patches * (1 - mask_ratio)), 1), patches - 1)


def random_visible(
    batch_size: int, grid: Sequence[int], mask_ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draws masks uniformly at random, independently for each sample.

    Returns:
        bool `[batch_size, *grid]`, true where visible, with equally many true values in each sample; on the
        generator's device, the CPU without one.
    """
    count = visible_per_sample(grid, mask_ratio)
    device = "cpu" if generator is None else generator.device
    noise = torch.rand(batch_size, math.prod(grid), generator=generator, device=device)
    visible = torch.zeros_like(noise, dtype=torch.bool)
    visible.scatter_(1, noise.argsort(1)[:, :count], True)
    return visible.view(batch_size, *grid)


def patch_grid(image_size: Sequence[int], patch_size: int, stride: int) -> tuple[int, ...]:
    """Returns the number of patches along each axis.

    Raises:
        ValueError: if the patch size is not a multiple of the encoder's stride, the image size not one of the
            patch size, or the image has fewer than two patches; the message names the nearest valid sizes.
    """
    if patch_size <= 0 or patch_size % stride:
        lower, upper = patch_size // stride * stride, (patch_size // stride + 1) * stride
        near = f"{lower} or {upper}" if lower > 0 else f"{upper}"
        raise UserError(f"patch_size {patch_size} is not a multiple of the encoder's stride {stride}; use {near}")
    if any(size <= 0 or size % patch_size for size in image_size):
        below = [size // patch_size * patch_size for size in image_size]
        above = [max(1, -(-size // patch_size)) * patch_size for size in image_size]
        if math.prod(above) == patch_size ** len(above):  # a single patch leaves nothing to hide
            above = [2 * patch_size] * len(above)
        enough = math.prod(below) >= 2 * patch_size ** len(below)
        near = " or ".join("×".join(map(str, sizes)) for sizes in ([below, above] if enough else [above]))
        shown = "×".join(map(str, image_size))
        raise UserError(f"image_size {shown} is not a multiple of the patch size {patch_size}; use {near}")
    grid = tuple(size // patch_size for size in image_size)
    if int(torch.Size(grid).numel()) < 2:
        shown = "×".join(map(str, image_size))
        raise UserError(
            f"image_size {shown} holds a single patch of {patch_size}, which leaves nothing to hide; use images of "
            f"{2 * patch_size} or more"
            + (f", or a patch_size of {stride}" if patch_size > stride and min(image_size) >= 2 * stride else "")
        )
    return grid


def check_visible(visible: Tensor, batch_size: int, grid: Sequence[int]) -> None:
    """Checks a mask.

    Raises:
        ValueError: if its shape or type is wrong, or it hides all or none of a sample's patches.
    """
    if visible.dtype != torch.bool or list(visible.shape) != [batch_size, *grid]:
        raise UserError(
            f"visible must be boolean of shape {[batch_size, *grid]}, not {visible.dtype} of {list(visible.shape)}"
        )
    counts = visible.flatten(1).sum(1).tolist()
    patches = int(torch.Size(grid).numel())
    for sample, count in enumerate(counts):
        if count in (0, patches):
            what = "hides every patch" if count == 0 else "hides nothing"
            raise UserError(f"the mask of sample {sample} {what}; show between 1 and {patches - 1} patches")
