"""Parts of an annotated data set, which consist of two paths each: named one by one, or found in one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sparkmim.data.labelled import PURPOSE, Part
from sparkmim.errors import UserError

F = TypeVar("F", bound=NamedTuple)


def find_part(
    part: Part, data: str | Path | None, named: Mapping[str, str | Path | None], kind: Callable[..., F],
    find: Callable[[Any, Part], F],
) -> F:  # fmt: skip
    """Returns the paths of a part of a data set.

    Args:
        part: which part.
        data: folder of all parts; used if the part is not named.
        named: the two paths by their arguments, such as `val_annotations` and `val_images`.
        kind: makes the result from the two paths.
        find: finds the part in `data`.
    """
    first, second = named
    paths = [Path(path) for path in named.values() if path]
    if len(paths) == 1:
        raise UserError(f"{first} and {second} go together; give both, or neither")
    if paths:
        return kind(*paths)
    if data is not None:
        return find(data, part)
    first, second = (name.replace("_", "-") for name in (first, second))
    raise UserError(
        f"there are no images to {PURPOSE[part]}; name them as --{first} and --{second}, or the folder of both parts "
        "as --data"
    )
