"""Verification of encoders by name or instance. The public function is `sparkmim.verify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from sparkmim.models.encoders import create_encoder
from sparkmim.models.hierarchy import Hierarchy
from sparkmim.models.masking import patch_grid
from sparkmim.sparse.verify import TOLERANCE, VerifyReport, verify_packed

_ROUND_OFF = 1e-2
"""A relative error that round-off in float64 can reach at worst."""


def verify_encoder(
    encoder: nn.Module | str,
    image_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    channels: int = 3,
) -> VerifyReport:
    """Runs a network on visible patches, and against its dense self and the method's definition.

    Forward and backward, in float64, with all patches visible and with partial masks. The encoder is not changed.

    Args:
        encoder: a network, or a name for `create_encoder`.
        image_size: `S` or one size per axis; None for three patches along both axes of a 2-D image.
        patch_size: side of a patch; None for the network's total stride.
        channels: image channels.

    Raises:
        ValueError: if sizes do not divide, or no hierarchy is found.
    """
    if isinstance(encoder, str):
        encoder = create_encoder(encoder, channels)
    rank = 2 if image_size is None or isinstance(image_size, int) else len(image_size)
    hierarchy = Hierarchy(encoder, channels, rank)
    patch = hierarchy.patch_unit if patch_size is None else patch_size
    if image_size is None:
        size: tuple[int, ...] = (3 * patch,) * rank
    else:
        size = (image_size,) * rank if isinstance(image_size, int) else tuple(image_size)
    grid = patch_grid(size, patch, hierarchy.stride)
    report = verify_packed(hierarchy, (2, channels, *size), grid)
    if _ROUND_OFF > report.error > TOLERANCE and patch_size is None and image_size is None:
        # BatchNorm over a handful of positions, layer after layer, can amplify round-off as far. With four times the
        # positions it does not, while a true difference remains.
        report = verify_packed(hierarchy, (2, channels, *(2 * extent for extent in size)), grid)
    # Name modules as the user's network does.
    module = None if report.module is None else report.module.removeprefix("encoder.")
    message = report.message.replace("`encoder.", "`").replace("`encoder`", f"`{type(encoder).__name__}`")
    return dataclasses.replace(report, module=module, message=message)
