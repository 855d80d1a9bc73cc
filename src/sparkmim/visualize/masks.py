"""Masks of patches from text, pictures and arrays."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sparkmim.data.decoding import UnreadableImage, open_picture
from sparkmim.data.discovery import SUFFIXES
from sparkmim.data.problems import counted
from sparkmim.errors import UserError

_VISIBLE, _HIDDEN = "xX1#", ".0-_"


def mask_given(mask: Any, grid: Sequence[int]) -> Tensor:
    """Reads a mask of patches, bool `[*grid]`, true where visible; refuses one that hides all or nothing.

    Args:
        mask: path of a picture, bright where visible; path of a text file, or the text itself: a row per line, or
            rows separated by `/`, with `x`, `X`, `1` or `#` for visible and `.`, `0`, `-` or `_` for hidden patches;
            for volumes, the rows of all slices in order. Or a boolean array of the grid's shape.
        grid: patches per axis.

    Example:
        >>> mask_given("x. / .x", (2, 2))
        tensor([[ True, False],
                [False,  True]])
    """
    if isinstance(mask, (str, Path)):
        path = Path(mask)
        if path.suffix.lower() not in (*SUFFIXES, ".txt"):
            return mask_of_text(str(mask), grid)
        if path.exists() and not path.is_file():
            raise UserError(f"the mask {path} is not a file")
        if path.suffix.lower() in SUFFIXES:
            return _checked(_of_picture(path, grid))
        try:
            return mask_of_text(path.read_text(encoding="utf-8-sig"), grid, str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the mask {path} cannot be read: {error}") from error
    found = torch.as_tensor(mask).bool().cpu()
    if list(found.shape) != list(grid):
        raise UserError(f"the mask is of shape {list(found.shape)}, but there are {times(grid)} patches")
    return _checked(found)


def patches_given(visible: Any, grid: Sequence[int]) -> Tensor:
    """Returns a mask, bool `[*grid]`, that shows some patches and hides all others.

    Args:
        visible: the patches to show, as text `"row,col row,col ..."` or tuples; one number per axis of the grid,
            counted from 0 at the top left.
        grid: patches per axis.

    Example:
        >>> patches_given("0,0 1,1", (2, 2))
        tensor([[ True, False],
                [False,  True]])
    """
    if isinstance(visible, str):
        words = visible.replace(";", " ").split()
        if not all(re.fullmatch(r"\d+(,\d+)*", word) for word in words):
            raise UserError(f"visible is {visible!r}; write the patches to show by row and column, such as '0,0 2,1'")
        visible = [[int(number) for number in word.split(",")] for word in words]
    found = torch.zeros(tuple(grid), dtype=torch.bool)
    for place in visible:
        if len(place) != len(grid) or any(not 0 <= at < cells for at, cells in zip(place, grid, strict=True)):
            first, last = ",".join("0" * len(grid)), ",".join(str(cells - 1) for cells in grid)
            raise UserError(f"there is no patch {','.join(map(str, place))}; they run from {first} to {last}")
        found[tuple(place)] = True
    return _checked(found)


def mask_text(visible: Tensor) -> str:
    """Writes a mask `[*grid]` as text: a row per line, `x` where visible and `.` where hidden."""
    rows = visible.flatten(0, -2) if visible.ndim > 1 else visible[None]
    return "\n".join("".join("x" if cell else "." for cell in row) for row in rows.tolist())


def mask_of_text(text: str, grid: Sequence[int], name: str = "the mask") -> Tensor:
    """Reads a mask from text, as `mask_given` does, but never opens a file; `name` is its name in errors."""
    rows = [row for row in re.split(r"[\n/]", text.replace(" ", "").replace("\r", "")) if row]
    wanted = int(torch.Size(grid[:-1]).numel())
    strange = sorted(set("".join(rows)) - set(_VISIBLE + _HIDDEN))
    if strange or not rows:
        wrong = f"holds {strange[0]!r}" if strange else "is empty"
        raise UserError(f"{name} {wrong}; write x for visible patches and . for hidden ones, a row per line")
    if len(rows) != wanted or any(len(row) != grid[-1] for row in rows):
        *others, widest = sorted({len(row) for row in rows})
        widths = " or ".join([*map(str, others), counted(widest, "patch", "patches")])
        raise UserError(f"{name} has {counted(len(rows), 'row')} of {widths}, but there are {times(grid)} patches")
    return _checked(torch.tensor([[sign in _VISIBLE for sign in row] for row in rows]).view(tuple(grid)))


def _of_picture(path: Path, grid: Sequence[int]) -> Tensor:
    """Reads a mask from a picture: a patch is visible if its part of the picture is bright on average."""
    if len(grid) != 2:
        raise UserError(f"{path} is a picture, but there are {times(grid)} patches; write the mask as text")
    if not path.exists():
        raise UserError(f"there is no mask {path}")
    try:
        with open_picture(path) as picture:
            grey = picture.convert("L").resize((grid[1], grid[0]), Image.Resampling.BOX)
    except UnreadableImage as error:
        raise UserError(f"the mask {path} cannot be read as a picture: {error.reason}") from error
    return torch.tensor(list(grey.tobytes())).view(tuple(grid)) > 127


def _checked(visible: Tensor) -> Tensor:
    count, patches = int(visible.sum()), visible.numel()
    if count in (0, patches):
        what = "hides every patch" if count == 0 else "hides nothing"
        raise UserError(f"the mask {what}; show between 1 and {patches - 1} of the {patches} patches")
    return visible


def times(sizes: Sequence[int]) -> str:
    """Joins sizes to text such as `4×6`."""
    return "×".join(map(str, sizes))
