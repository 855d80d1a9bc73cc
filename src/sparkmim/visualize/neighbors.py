"""The images of a folder that are most like some others. The public function is in `sparkmim.commands`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.data.inference import Preparation, still_batches
from sparkmim.data.source import Source, images_source
from sparkmim.drawing.figures import (
    ACCENT,
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
from sparkmim.drawing.pixels import Tones, to_array
from sparkmim.errors import UserError
from sparkmim.evaluation.features import check_stage, features_of, frozen_hierarchy, stage_features
from sparkmim.interop.weights import open_weights
from sparkmim.machine import device_named
from sparkmim.models.encoders import own_module
from sparkmim.results import NeighborsResult
from sparkmim.visualize.features import check_finite, check_pictured
from sparkmim.visualize.inputs import read_shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PER_LINE = 10
"""Neighbours side by side; more go on below."""

_SIDE, _NARROWEST, _GAP, _CAPTION = 1.3, 1.15, 0.1, 0.42  # inches
_BESIDE_QUERY, _BELOW_QUERY = 0.4, 0.12
_TOP, _EDGE = 0.4, 0.12

_SMALL = {"fontsize": 6.5, "color": QUIET}


def run_neighbors(settings: Mapping[str, Any]) -> NeighborsResult:
    """Runs `sparkmim.neighbors`.

    Features are compared as by the nearest-neighbour classifier of `sparkmim evaluate`: averaged over positions, by
    their plain cosine. A query is left out of its own neighbours by its file, links resolved; copies of it are found.
    Where there are fewer than k images, all are neighbours.

    Args:
        settings: its arguments, as given.
    """
    out = check_picture(settings["out"], settings["overwrite"])
    k = settings["k"]
    if k < 1:
        raise UserError(f"k is {k}; it must be above 0")
    device = device_named(settings["accelerator"])
    weights = open_weights(settings["weights"])
    preparation = weights.preparation(settings["image_size"], settings["crop"])
    check_pictured(preparation, weights.path)
    source = images_source(settings["data"], preparation.channels, preparation.rank)
    if images_source(settings["query"], preparation.channels, preparation.rank).arrays != source.arrays:
        raise UserError("one of query and data holds image files and the other arrays; give one kind")
    hierarchy = frozen_hierarchy(weights, own_module(settings["model"]), device)
    stage = check_stage(settings["stage"], hierarchy, str(weights.path))
    if source.arrays and (preparation.mean is None or preparation.std is None):
        measured = source.statistics()  # of the folder, for the queries too
        preparation = replace(preparation, mean=measured.mean, std=measured.std)

    asked = read_shown(settings["query"], preparation, settings["limit"], device)
    batches = still_batches(
        source, preparation, settings["batch_size"], settings["workers"], device, f"{len(source.items):,} images"
    )
    found = features_of([(hierarchy, [stage])], batches)[0]
    bank = found.stages[stage]
    parts = torch.split(asked.images, settings["batch_size"])
    wanted = torch.cat([stage_features(hierarchy, part, [stage])[0].cpu() for part in parts])
    check_finite(torch.cat([bank, wanted]), stage, weights.path)

    names = [_name(source, place) for place in found.places.tolist()]
    queries = asked.names
    if settings["query"] is not settings["data"]:  # items of two datasets are not the same for having one number
        queries = [f"query {name.removeprefix('item ')}" if name.startswith("item ") else name for name in queries]
    rows, similarities = _nearest(names, bank, queries, wanted, k)
    if not any(rows):
        raise UserError("data holds no other image than the query; name a folder with more")
    chosen = list(dict.fromkeys(row for of_query in rows for row in of_query))
    places = [int(found.places[row]) for row in chosen]
    pictures = {
        **_read_again(source, places, [names[row] for row in chosen], preparation, asked.tones),
        **dict(zip(queries, asked.pixels, strict=True)),
    }
    unreadable = list(dict.fromkeys([*asked.unreadable, *found.unreadable]))
    neighbors = [[names[row] for row in of_query] for of_query in rows]
    result = NeighborsResult(queries, neighbors, similarities, pictures, stage, unreadable, draw_neighbors, out)
    if out is not None:
        write_picture(draw_neighbors(result), out)
    return result


def _name(source: Source, place: int) -> str:
    """Of an item: its path, or its number in a dataset."""
    item = source.items[place] if isinstance(source.items, list) else None
    return item if isinstance(item, str) else f"item {place}"


def _nearest(
    names: Sequence[str], bank: Tensor, queries: Sequence[str], wanted: Tensor, k: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Of each query, the rows of its k nearest in the bank, and their cosines; no file twice, and never the query.

    Args:
        names: of the n images that were searched.
        bank: their features, `[n, C]`.
        queries: names of the m queries.
        wanted: their features, `[m, C]`.
        k: neighbours, at most.
    """
    bank, wanted = F.normalize(bank, dim=1), F.normalize(wanted, dim=1)
    rows: list[list[int]] = []
    similarities: list[list[float]] = []
    for query, features in zip(queries, wanted, strict=True):
        cosines = (bank @ features).clamp(-1, 1)  # [n]
        seen = {os.path.realpath(query)}
        nearest: list[int] = []
        for row in cosines.argsort(descending=True, stable=True).tolist():
            if len(nearest) == k:
                break
            file = os.path.realpath(names[row])
            if file not in seen:
                seen.add(file)
                nearest.append(row)
        rows.append(nearest)
        similarities.append(cosines[nearest].tolist())
    return rows, similarities


def _read_again(
    source: Source, places: Sequence[int], names: Sequence[str], preparation: Preparation, tones: Tones
) -> dict[str, Any]:
    """By name, the pictures of some items, as the network saw them: only features of a folder are kept in memory."""
    few = replace(source, items=[source.items[place] for place in places])
    pictures: dict[str, Any] = {}
    for batch in still_batches(few, preparation, 64, 0, torch.device("cpu"), "reading"):
        for _, name, reason in batch.unreadable:
            raise UserError(f"{name} was read a moment ago, and cannot be read any more: {reason}")
        if batch.images is not None:
            read = [names[place] for place in batch.places]
            pictures.update(zip(read, to_array(tones(batch.images)), strict=True))
    return pictures


# Drawing


def draw_neighbors(result: NeighborsResult) -> Figure:
    """A row per query, in a frame; its neighbours beside it, the nearest first, with cosines and names below."""
    size = wide, tall = tile_size(result.pictures[result.queries[0]], _SIDE, _NARROWEST)
    most = max(map(len, result.neighbors))
    columns = min(most, _PER_LINE)
    lines = [max(1, -(-len(found) // _PER_LINE)) for found in result.neighbors]
    start = _EDGE + wide + _BESIDE_QUERY
    line = tall + _CAPTION
    figure = new_figure(
        start + columns * (wide + _GAP) - _GAP + _EDGE, _TOP + sum(lines) * line + (len(lines) - 1) * _BELOW_QUERY
    )
    write_at(figure, _EDGE + wide / 2, 0.16, "query", ha="center", color=ACCENT)
    write_at(figure, start, 0.16, f"most alike at stage {result.stage}, with their cosine")
    in_folders = len({Path(path).parent for found in result.neighbors for path in found}) > 1
    top = _TOP
    for query, found, cosines, count in zip(result.queries, result.neighbors, result.similarities, lines, strict=True):
        axes = axes_at(figure, _EDGE, top, size)
        show_picture(axes, result.pictures[query])
        axes.spines[:].set(visible=True, color=ACCENT, linewidth=2.5)
        centre = _EDGE + wide / 2
        write_at(figure, centre, top + tall + 0.06, _caption(query, in_folders, wide), ha="center", **_SMALL)
        for place, (path, cosine) in enumerate(zip(found, cosines, strict=True)):
            below, beside = divmod(place, _PER_LINE)
            left, upper = start + beside * (wide + _GAP), top + below * line
            show_picture(axes_at(figure, left, upper, size), result.pictures[path])
            centre = left + wide / 2
            write_at(figure, centre, upper + tall + 0.05, f"{cosine:.3f}", ha="center", fontsize=8)
            write_at(figure, centre, upper + tall + 0.19, _caption(path, in_folders, wide), ha="center", **_SMALL)
        top += count * line + _BELOW_QUERY
    return figure


def _caption(path: str, in_folders: bool, wide: float) -> str:
    """The stem of a name, after its folder's if there are several, which often tells the class."""
    name = Path(path)
    said = f"{name.parent.name}/{name.stem}" if in_folders and name.parent.name else name.stem
    return shortened(said, int(wide * 16))
