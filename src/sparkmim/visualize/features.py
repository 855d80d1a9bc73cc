"""Feature maps as colours, for `sparkmim.features`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.drawing.figures import (
    QUIET,
    new_figure,
    picture_at,
    shortened,
    tile_size,
    write_at,
    write_picture,
)
from sparkmim.drawing.pixels import middle_slice
from sparkmim.evaluation.features import check_stage
from sparkmim.results import FeaturesResult
from sparkmim.visualize.inputs import check_finite, open_encoder, read_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROUNDING = 1e-6
"""Deviations below this share of the features' size are rounding errors of float32."""

_PERCENTILES = (1, 99)
"""Percentiles of positions shown darkest and brightest, so that a few outliers leave the others their contrast."""

_SIDE, _NARROWEST, _GAP = 1.8, 1.5, 0.08  # inches
_LEFT, _TOP, _EDGE = 0.34, 0.5, 0.1


@torch.no_grad()
def run_features(
    *,
    weights: str | Path,
    images: Any,
    out: str | Path | None,
    stages: Sequence[int] | None,
    model: Any,
    image_size: int | Sequence[int] | None,
    limit: int,
    accelerator: str,
) -> FeaturesResult:
    """Runs `sparkmim.features`, on the largest centre crop of each image.

    For volumes, the directions are those of all positions, and the middle slice is shown.
    """
    encoder = open_encoder(weights, model, image_size, 1.0, accelerator)
    path, count = encoder.weights.path, len(encoder.hierarchy.strides)
    chosen = sorted({check_stage(stage, encoder.hierarchy, str(path)) for stage in stages or range(1, count + 1)})
    shown = read_images(images, encoder.preparation, limit, encoder.device)

    found: dict[int, list[Tensor]] = {stage: [] for stage in chosen}
    for image in torch.split(shown.images, 1):  # one at a time: shallow maps are large
        maps = encoder.hierarchy(image)
        for stage in chosen:
            found[stage].append(maps[stage - 1].float().cpu())
    colours: dict[int, Any] = {}
    explained: dict[int, float] = {}
    for stage in chosen:
        of_stage = torch.cat(found.pop(stage))
        check_finite(of_stage, stage, path)
        colours[stage], explained[stage] = as_colours(of_stage)
    result = FeaturesResult(
        names=shown.names, inputs=shown.pixels, maps=colours, explained=explained, draw=draw_features,
        unreadable=shown.unreadable, out=None if out is None else Path(out),
    )  # fmt: skip
    write_picture(result)
    return result


# Principal components


def principal_components(points: Tensor, count: int = 3) -> tuple[Tensor, Tensor]:
    """Computes principal components of `[m, C]` in float64; the largest entry of a direction is positive.

    Returns centred coordinates `[m, d]`, by descending variance, and the share of the variance along each, `[d]`.
    Directions without variance, but for float32's rounding, are left out, so d may be below `count`.
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
    """Shows the three directions of most variance over all positions as red, green and blue, each stretched to 0…1.

    A single direction, as of maps with one channel, gives grey pictures; of two, blue is constant. Maps `[n, C, *S]`
    become float32 `[n, H, W, 3]`, for volumes the middle slice; the second value is the share of the variance shown.
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
    """Stretches each column of `[m, d]` to 0…1, from its low percentile to its high one."""
    if not components.size:
        return components
    low, high = np.percentile(components, _PERCENTILES, axis=0)
    least, most = components.min(0), components.max(0)
    rare = high - low <= _ROUNDING * (most - least)  # nearly all are the same: only the outliers vary
    low, high = np.where(rare, least, low), np.where(rare, most, high)
    return np.clip((components - low) / (high - low), 0, 1)


# Drawing


def draw_features(result: FeaturesResult) -> Figure:
    """Draws a row per image: the image, and its map at each stage, without interpolation."""
    size = wide, tall = tile_size(result.inputs, _SIDE, _NARROWEST)
    rows, columns = len(result.names), 1 + len(result.maps)
    figure = new_figure(_LEFT + columns * (wide + _GAP) - _GAP + _EDGE, _TOP + rows * (tall + _GAP) - _GAP + _EDGE)
    drawn = [("input", "", result.inputs)]
    for stage, maps in result.maps.items():
        stride = round(result.inputs.shape[1] / maps.shape[1])
        drawn.append((f"stage {stage} · stride {stride}", f"{result.explained[stage]:.0%} of variance", maps))
    quiet = {"fontsize": 8, "color": QUIET}
    for column, (title, note, pictures) in enumerate(drawn):
        left = _LEFT + column * (wide + _GAP)
        write_at(figure, left + wide / 2, _TOP - 0.24, title, va="bottom", ha="center")
        write_at(figure, left + wide / 2, _TOP - 0.08, note, va="bottom", ha="center", **quiet)
        for row, picture in enumerate(pictures):
            picture_at(figure, left, _TOP + row * (tall + _GAP), size, picture)
    for row, name in enumerate(result.names):
        label, middle = shortened(Path(name).stem, max(8, int(13 * tall))), _TOP + row * (tall + _GAP) + tall / 2
        write_at(figure, _LEFT - 0.08, middle, label, ha="right", va="center", rotation=90, **quiet)
    return figure
