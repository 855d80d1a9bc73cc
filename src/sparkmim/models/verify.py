"""Verification of encoders by name or instance, behind `sparkmim.verify`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from torch import nn

from sparkmim.models.encoders import create_encoder
from sparkmim.models.hierarchy import Hierarchy, rank_of
from sparkmim.models.masking import patch_grid
from sparkmim.sparse.verify import MASKS, TOLERANCE, VerifyReport, verify_packed

_ROUND_OFF = 1e-2
"""Largest relative error that round-off in float64 can reach."""


def verify_encoder(
    encoder: nn.Module | str,
    image_size: int | Sequence[int] | None = None,
    patch_size: int | None = None,
    channels: int = 3,
    stages: int | None = None,
    feature_modules: Sequence[str] | None = None,
    masks: Sequence[str] = MASKS,
) -> VerifyReport:
    """Compares a network on visible patches with its dense self and with the definition of a masked network.

    Runs forward and backward in float64, with all patches visible and with partial masks. The encoder is not changed.

    Args:
        encoder: a network, or a name for `create_encoder`.
        image_size: `S` or one size per axis; None for three patches along each axis.
        patch_size: side of a patch; None for the network's total stride.
        channels: image channels.
        stages: number of feature maps to use, from the shallowest; None for all.
        feature_modules: names of the modules whose outputs are the maps; None to find them.
        masks: comparisons to make, a selection of `MASKS`.

    Raises:
        ValueError: if sizes do not divide, or no hierarchy is found.
    """
    encoder = create_encoder(encoder, channels) if isinstance(encoder, str) else copy.deepcopy(encoder)
    axes = None if image_size is None or isinstance(image_size, int) else tuple(image_size)
    rank = len(axes) if axes else rank_of(encoder)
    if isinstance(image_size, int):
        axes = (image_size,) * rank
    hierarchy = Hierarchy(encoder, channels, rank, axes, stages, feature_modules)
    patch = hierarchy.patch_unit if patch_size is None else patch_size
    size = axes or (3 * patch,) * rank
    grid = patch_grid(size, patch, hierarchy.patch_unit)
    report = verify_packed(hierarchy, (2, channels, *size), grid, masks=masks)
    if _ROUND_OFF > report.error > TOLERANCE and patch_size is None and axes is None:
        # BatchNorm over few positions, layer after layer, can amplify round-off this far. Over four times as many it
        # does not, while a true difference remains.
        report = verify_packed(hierarchy, (2, channels, *(2 * extent for extent in size)), grid, masks=masks)
    # Name modules as the user's network does.
    module = None if report.module is None else report.module.removeprefix("encoder.")
    message = report.message.replace("`encoder.", "`").replace("`encoder`", f"`{type(encoder).__name__}`")
    return dataclasses.replace(report, module=module, message=message)
