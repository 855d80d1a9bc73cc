"""Feature maps as colours. The public function is in `sparkmim.commands`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.data.inference import Preparation
from sparkmim.drawing.figures import (
    QUIET,
    axes_at,
    check_picture,
    new_figure,
    shortened,
    show_picture,
    tile_size,
    write_at,
    write_picture,
)
from sparkmim.drawing.pixels import middle_slice
from sparkmim.errors import UserError
from sparkmim.evaluation.features import check_stage, frozen_hierarchy
from sparkmim.interop.weights import open_weights
from sparkmim.machine import device_named
from sparkmim.models import Hierarchy
from sparkmim.models.encoders import own_module
from sparkmim.results import FeaturesResult
from sparkmim.visualize.inputs import read_shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROUNDING = 1e-6
"""Deviations this small, relative to the features' own size, are rounding errors of float32."""

_PERCENTILES = (1, 99)
"""Of the positions, between which colours run from dark to bright: a few that stand out leave the others theirs."""

_SIDE, _NARROWEST, _GAP = 1.8, 1.5, 0.08  # inches
_LEFT, _TOP, _EDGE = 0.34, 0.5, 0.1


@torch.no_grad()
def run_features(settings: Mapping[str, Any]) -> FeaturesResult:
    """Runs `sparkmim.features`.

    The network sees whole images, as large a centre crop as there is. Of volumes, all positions count for the
    directions, and the middle slice is shown.

    Args:
        settings: its arguments, as given.
    """
    out = check_picture(settings["out"], settings["overwrite"])
    device = device_named(settings["accelerator"])
    weights = open_weights(settings["weights"])
    preparation = weights.preparation(settings["image_size"], crop=1.0)
    check_pictured(preparation, weights.path)
    hierarchy = frozen_hierarchy(weights, own_module(settings["model"]), device)
    stages = _stages(settings["stages"], hierarchy, weights.path)
    shown = read_shown(settings["images"], preparation, settings["limit"], device)

    found: dict[int, list[Tensor]] = {stage: [] for stage in stages}
    for image in torch.split(shown.images, 1):  # one at a time: shallow maps are large
        maps = hierarchy(image)
        for stage in stages:
            found[stage].append(maps[stage - 1].float().cpu())
    colours: dict[int, Any] = {}
    explained: dict[int, float] = {}
    for stage in stages:
        of_stage = torch.cat(found.pop(stage))
        check_finite(of_stage, stage, weights.path)
        colours[stage], explained[stage] = as_colours(of_stage)
    result = FeaturesResult(shown.names, shown.pixels, colours, explained, shown.unreadable, draw_features, out)
    if out is not None:
        write_picture(draw_features(result), out)
    return result


def _stages(given: Sequence[int] | None, hierarchy: Hierarchy, path: Path) -> list[int]:
    """Those that were asked for, in ascending order; all if None."""
    if given is None:
        return list(range(1, len(hierarchy.strides) + 1))
    if not given:
        raise UserError("stages is empty; name at least one, such as [1, 4], or leave it out for all")
    return sorted({check_stage(stage, hierarchy, str(path)) for stage in given})


def check_pictured(preparation: Preparation, path: Path) -> None:
    """Refuses signals, which are no pictures.

    Raises:
        ValueError: if the network takes them.
    """
    if len(preparation.image_size) == 1:
        raise UserError(f"{path} is of a network for signals, which are no pictures; `sparkmim embed` writes features")


def check_finite(features: Tensor, stage: int, path: Path) -> None:
    """Refuses features that cannot be compared.

    Raises:
        ValueError: if any is infinite or not a number.
    """
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"stage {stage} of {path} gives values that are not finite; take weights that did not diverge")


# Principal components


def principal_components(points: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Coordinates of points along the directions in which they vary most, in float64 and without anything random.

    A direction has a sign of its own: its largest entry is positive.

    Args:
        points: `[m, C]`.
        count: of directions at most; those along which nothing varies, but for float32's rounding, are left out.

    Returns:
        Coordinates `[m, d]`, centred, the direction of most variance first, and the share of the variance along each,
        `[d]`.
    """
    points = points.double()
    rounding = _ROUNDING**2 * points.square().sum(1).mean()
    points = points - points.mean(0)
    m, channels = points.shape
    if channels <= m:
        variances, directions = torch.linalg.eigh(points.t() @ points / m)  # [C], [C, C], ascending
    else:  # the same from the smaller matrix, of inner products of points
        variances, scores = torch.linalg.eigh(points @ points.t() / m)  # [m], [m, m]
        directions = F.normalize(points.t() @ scores, dim=0)  # [C, m]
    total = variances.sum()
    variances, directions = variances.flip(0)[:count], directions.flip(1)[:, :count]
    varies = variances > rounding
    variances, directions = variances[varies], directions[:, varies]  # [d], [C, d]
    largest = directions.abs().argmax(0, keepdim=True)  # [1, d]
    directions = directions * directions.gather(0, largest).sign()
    return points @ directions, variances / total


def as_colours(maps: Tensor) -> tuple[Any, float]:
    """Feature maps as pictures: the directions of most variance over all their positions as red, green and blue.

    Each component is stretched by itself. Where there is one direction alone, as with maps of one channel, pictures
    are grey; one that is missing counts as medium.

    Args:
        maps: `[n, C, *S]` of images or volumes.

    Returns:
        float32 in 0…1, `[n, H, W, 3]`, of volumes the middle slice; and the share of the variance that they show, 0
        if there is none.
    """
    points = maps.flatten(2).transpose(1, 2).flatten(0, 1)  # [n · positions, C]
    coordinates, shares = principal_components(points)
    components = torch.from_numpy(_stretched(coordinates.numpy())).float()  # [n · positions, d]
    if components.shape[1] == 1:
        components = components.expand(-1, 3)
    components = F.pad(components, (0, 3 - components.shape[1]), value=0.5)
    pictures = components.view(len(maps), *maps.shape[2:], 3).movedim(-1, 1)  # [n, 3, *S]
    return middle_slice(pictures).movedim(1, -1).contiguous().numpy(), min(1.0, float(shares.sum()))


def _stretched(components: Any) -> Any:
    """Brings each column of `[m, d]` to 0…1, from its low percentile to its high one."""
    if not components.size:
        return components
    low, high = np.percentile(components, _PERCENTILES, axis=0)
    least, most = components.min(0), components.max(0)
    rare = high - low <= _ROUNDING * (most - least)  # nearly all are the same, and a few others are all there is
    low, high = np.where(rare, least, low), np.where(rare, most, high)
    return np.clip((components - low) / (high - low), 0, 1)


# Drawing


def draw_features(result: FeaturesResult) -> Figure:
    """A row per image: the image, and its map at each stage; every position of a map is a square."""
    size = wide, tall = tile_size(result.inputs, _SIDE, _NARROWEST)
    rows, columns = len(result.names), 1 + len(result.maps)
    figure = new_figure(_LEFT + columns * (wide + _GAP) - _GAP + _EDGE, _TOP + rows * (tall + _GAP) - _GAP + _EDGE)
    height = result.inputs.shape[1]
    titles = [
        "input",
        *(f"stage {stage} · stride {round(height / maps.shape[1])}" for stage, maps in result.maps.items()),
    ]
    notes = ["", *(f"{share:.0%} of variance" for share in result.explained.values())]
    for column, pictures in enumerate((result.inputs, *result.maps.values())):
        left = _LEFT + column * (wide + _GAP)
        write_at(figure, left + wide / 2, _TOP - 0.24, titles[column], va="bottom", ha="center")
        write_at(figure, left + wide / 2, _TOP - 0.08, notes[column], va="bottom", ha="center", fontsize=8, color=QUIET)
        for row, picture in enumerate(pictures):
            show_picture(axes_at(figure, left, _TOP + row * (tall + _GAP), size), picture)
    for row, name in enumerate(result.names):
        label = shortened(Path(name).stem, max(8, int(13 * tall)))
        write_at(
            figure, _LEFT - 0.08, _TOP + row * (tall + _GAP) + tall / 2, label, ha="right", va="center", rotation=90,
            fontsize=8, color=QUIET,
        )  # fmt: skip
    return figure
