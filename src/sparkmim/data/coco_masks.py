"""Segmentations of COCO's annotations: polygons and run-length encodings, checked before the COCO library sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

FAULTS = {
    "short": "with polygons of fewer than three points; those left out",
    "far": "with polygons that reach far beyond the image; clipped",
    "damaged": "with a run-length encoding that is damaged, or of another size than the image; left out",
    "strange": "with a segmentation that is neither polygons nor a run-length encoding; left out",
}
"""What may be wrong with a segmentation."""


def as_number(value: Any) -> Any:
    """Returns the number that a text stands for, or whatever else is given."""
    if isinstance(value, str):
        with suppress(ValueError):
            return int(found) if (found := float(value)).is_integer() else found
    return value


def read_segmentation(given: Any, height: int, width: int) -> tuple[Any, str]:
    """Returns a segmentation as pycocotools takes it, and what was wrong with it.

    Polygons are lists of numbers, x and y in turn, or of pairs of them; also a single one, without the list around it.
    Those of fewer than three points are left out, and those that reach beyond the image by more than its size are
    clipped, as the time and memory of pycocotools grow with the length of their sides. It may never return on run
    lengths that do not add up.

    Returns:
        Polygons, a run-length encoding, or None if there is no mask; and a key of `FAULTS`, or "".
    """
    if isinstance(given, Mapping):
        counts = run_lengths(given.get("counts"))
        size = given.get("size")
        fits = isinstance(size, list) and [as_number(side) for side in size] == [height, width]
        if not fits or counts is None or int(counts.sum()) != height * width:
            return None, "damaged"
        plain = given["counts"] if isinstance(given["counts"], str | bytes) else counts.tolist()
        return {"size": [height, width], "counts": plain}, ""
    if not given:
        return None, ""
    outlines = polygons(given)
    if outlines is None:
        return None, "strange"
    kept, fault = [], ""
    for outline in outlines:
        if len(outline) < 6:
            fault = fault or "short"
            continue
        reach = max(height, width)
        if min(outline) < -reach or max(outline) > 2 * reach:
            outline, fault = _clipped(outline, -reach, 2 * reach), "far"
        if outline:
            kept.append(outline)
    return kept or None, fault


def polygons(given: Any) -> list[list[float]] | None:
    """Returns polygons as lists of an even number of finite numbers; None if something else is given."""
    if not isinstance(given, list) or not given:
        return None
    single = not isinstance(given[0], list) or all(isinstance(point, list) and len(point) == 2 for point in given)
    found = []
    for outline in [given] if single else given:
        if not isinstance(outline, list):
            return None
        try:
            if not math.isfinite(sum(outline)):  # nearly always enough
                return None
        except (TypeError, OverflowError):  # pairs, or texts
            try:
                outline = np.array(outline, np.float64).ravel().tolist()
            except (TypeError, ValueError, OverflowError):
                return None
            if not np.isfinite(outline).all():
                return None
        found.append(outline if len(outline) % 2 == 0 else outline[:-1])
    return found


def run_lengths(counts: Any) -> npt.NDArray[np.int64] | None:
    """Returns the run lengths of a list, or of COCO's compressed text; None if they are damaged.

    The text holds groups of 5 bits, from the lowest on, each with a bit that says whether another follows and an offset
    of 48; from the fourth on, lengths are differences to the one before the last (`rleFrString` in pycocotools).
    """
    if isinstance(counts, list):
        try:
            found = np.array(counts, np.float64)
        except (TypeError, ValueError, OverflowError):
            return None
        whole = found.ndim == 1 and found.size and np.isfinite(found).all() and (found == np.rint(found)).all()
        lengths = found.astype(np.int64) if whole else None
    else:
        lengths = _decompressed(counts)
    return None if lengths is None or (lengths < 0).any() else lengths


def _decompressed(counts: Any) -> npt.NDArray[np.int64] | None:
    try:
        text = counts.encode("ascii") if isinstance(counts, str) else bytes(counts or b"")
    except (TypeError, UnicodeEncodeError):
        return None
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not groups.size or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    ends = np.flatnonzero(~groups & 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 10:  # 50 bits
        return None
    place = np.arange(groups.size) - np.repeat(starts, sizes)
    lengths: npt.NDArray[np.int64] = np.add.reduceat((groups & 31) << (5 * place), starts)
    lengths -= ((groups[ends] & 16) > 0) * (np.int64(1) << (5 * sizes))  # negative numbers
    for first in (1, 2):
        lengths[first::2] = np.cumsum(lengths[first::2])
    return lengths


def _clipped(outline: list[float], low: float, high: float) -> list[float]:
    """Clips a polygon to the square from `low` to `high` on both axes (Sutherland and Hodgman, 1974)."""
    points = list(zip(outline[::2], outline[1::2], strict=True))
    for axis, limit, sign in ((0, low, 1), (0, high, -1), (1, low, 1), (1, high, -1)):
        kept = []
        for start, end in zip([*points[-1:], *points[:-1]], points, strict=True):
            before, after = sign * (start[axis] - limit), sign * (end[axis] - limit)
            if (before < 0) != (after < 0):
                share = before / (before - after)
                crossing = [one + share * (other - one) for one, other in zip(start, end, strict=True)]
                crossing[axis] = limit
                kept.append((crossing[0], crossing[1]))
            if after >= 0:
                kept.append(end)
        points = kept
    return [value for point in points for value in point]
