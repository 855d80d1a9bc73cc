"""Nearest neighbours of images in a folder, for `sparkmim.neighbors`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmim.data.decoding import name_of
from sparkmim.data.inference import Preparation, still_batches
from sparkmim.data.problems import counted
from sparkmim.data.source import Source, images_source
from sparkmim.drawing.figures import (
    ACCENT,
    QUIET,
    new_figure,
    picture_at,
    shortened,
    tile_size,
    write_at,
    write_picture,
)
from sparkmim.drawing.pixels import Tones, to_array
from sparkmim.errors import UserError
from sparkmim.evaluation.features import check_stage, features_of, stage_features
from sparkmim.results import NeighborsResult
from sparkmim.visualize.inputs import check_finite, open_encoder, read_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PER_LINE = 10
"""Neighbours side by side; more continue below."""

_SIDE, _NARROWEST, _GAP, _CAPTION = 1.3, 1.15, 0.1, 0.42  # inches
_BESIDE_QUERY, _BELOW_QUERY = 0.4, 0.12
_TOP, _EDGE = 0.4, 0.12


def run_neighbors(
    *,
    weights: str | Path,
    query: Any,
    data: Any,
    out: str | Path | None,
    k: int,
    stage: int | None,
    model: Any,
    image_size: int | Sequence[int] | None,
    crop: float | None,
    limit: int,
    batch_size: int,
    workers: int | None,
    accelerator: str,
) -> NeighborsResult:
    """Runs `sparkmim.neighbors`.

    Compares features as the k-NN protocol of `sparkmim evaluate` does: averaged over positions, by cosine similarity.
    A query is excluded from its own neighbours by its resolved path; copies of it are found.
    """
    encoder = open_encoder(weights, model, image_size, crop, accelerator)
    preparation, path, device = encoder.preparation, encoder.weights.path, encoder.device
    stage = check_stage(stage, encoder.hierarchy, str(path))
    source = images_source(data, preparation.channels, preparation.rank)
    if images_source(query, preparation.channels, preparation.rank).arrays != source.arrays:
        raise UserError("one of query and data holds image files and the other arrays; give one kind")
    preparation = preparation.settled(source)  # by the folder, for the queries too

    asked = read_images(query, preparation, limit, device)
    batches = still_batches(source, preparation, batch_size, workers, device, counted(len(source.items), "image"))
    found = features_of([(encoder.hierarchy, [stage])], batches)[0]
    bank = found.stages[stage]
    parts = torch.split(asked.images, batch_size)
    wanted = torch.cat([stage_features(encoder.hierarchy, part, [stage])[0].cpu() for part in parts])
    check_finite(torch.cat([bank, wanted]), stage, path)

    listed = isinstance(source.items, list)  # not a dataset, whose items would be read again
    names = [name_of(source.items[place] if listed else None, place) for place in found.places.tolist()]
    queries = asked.names
    if query is not data:  # items of two datasets may have the same number
        queries = [f"query {name.removeprefix('item ')}" if name.startswith("item ") else name for name in queries]
    rows, similarities = _nearest(names, bank, queries, wanted, k)
    if not any(rows):
        raise UserError("data holds no other image than the query; name a folder with more")
    chosen = list(dict.fromkeys(row for of_query in rows for row in of_query))
    places = [int(found.places[row]) for row in chosen]
    pictures = _read_again(source, places, [names[row] for row in chosen], preparation, asked.tones)
    result = NeighborsResult(
        queries=queries,
        neighbors=[[names[row] for row in of_query] for of_query in rows],
        similarities=similarities,
        pictures={**pictures, **dict(zip(queries, asked.pixels, strict=True))},
        stage=stage,
        draw=draw_neighbors,
        unreadable=list(dict.fromkeys([*asked.unreadable, *found.unreadable])),
        out=None if out is None else Path(out),
    )
    write_picture(result)
    return result


def _nearest(
    names: Sequence[str], bank: Tensor, queries: Sequence[str], wanted: Tensor, k: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Finds up to k rows of the bank `[n, C]` nearest to each of the wanted features `[m, C]`, and cosine similarities.

    No file is found twice, nor the query itself.
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
    """Reads some items again, as the network saw them, by name: only the features of a folder are kept in memory."""
    few = replace(source, items=[source.items[place] for place in places])
    pictures: dict[str, Any] = {}
    for batch in still_batches(few, preparation, 64, 0, torch.device("cpu"), "reading"):
        for _, name, reason in batch.unreadable:
            raise UserError(f"{name} was read a moment ago, but cannot be read any more: {reason}")
        if batch.images is not None:
            read = [names[place] for place in batch.places]
            pictures.update(zip(read, to_array(tones(batch.images)), strict=True))
    return pictures


# Drawing


def draw_neighbors(result: NeighborsResult) -> Figure:
    """Draws a row per query: the query in a frame, and its neighbours with their cosine similarity and name."""
    size = wide, tall = tile_size(result.pictures[result.queries[0]], _SIDE, _NARROWEST)
    columns = min(max(map(len, result.neighbors)), _PER_LINE)
    lines = [max(1, -(-len(found) // _PER_LINE)) for found in result.neighbors]
    start, line = _EDGE + wide + _BESIDE_QUERY, tall + _CAPTION
    height = _TOP + sum(lines) * line + (len(lines) - 1) * _BELOW_QUERY
    figure = new_figure(start + columns * (wide + _GAP) - _GAP + _EDGE, height)
    in_folders = len({Path(path).parent for found in result.neighbors for path in found}) > 1

    def captioned(path: str, left: float, top: float, below: float) -> Any:
        """Draws a picture above the stem of its path, with the folder if there are several: often the class."""
        axes = picture_at(figure, left, top, size, result.pictures[path])
        name = Path(path)
        said = f"{name.parent.name}/{name.stem}" if in_folders and name.parent.name else name.stem
        said = shortened(said, int(wide * 16))
        write_at(figure, left + wide / 2, top + tall + below, said, ha="center", fontsize=6.5, color=QUIET)
        return axes

    write_at(figure, _EDGE + wide / 2, 0.16, "query", ha="center", color=ACCENT)
    write_at(figure, start, 0.16, f"nearest at stage {result.stage}, with cosine similarity")
    top = _TOP
    for query, found, cosines, count in zip(result.queries, result.neighbors, result.similarities, lines, strict=True):
        captioned(query, _EDGE, top, 0.06).spines[:].set(visible=True, color=ACCENT, linewidth=2.5)
        for place, (path, cosine) in enumerate(zip(found, cosines, strict=True)):
            below, beside = divmod(place, _PER_LINE)
            left, upper = start + beside * (wide + _GAP), top + below * line
            captioned(path, left, upper, 0.19)
            write_at(figure, left + wide / 2, upper + tall + 0.05, f"{cosine:.3f}", ha="center", fontsize=8)
        top += count * line + _BELOW_QUERY
    return figure
