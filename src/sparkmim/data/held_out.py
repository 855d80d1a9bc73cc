"""Images that are set apart from training by their names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from sparkmim.files import are_paths

_SHARE, _FEWEST, _MOST = 0.02, 32, 2000


def names_of(items: Any, data: Any) -> list[str]:
    """Returns names of the items of a data set that stay the same when it moves: relative paths, or numbers.

    Args:
        items: paths, or a dataset.
        data: folder or text file that the paths come from, or several; names are relative to the first, so that they
            stay the same when others are added.
    """
    first = data[0] if are_paths(data) else data
    if isinstance(items, list) and isinstance(first, (str, Path)):
        root = Path(first).expanduser().absolute()
        root = root if root.is_dir() else root.parent
        inside = f"{root}{os.sep}"  # cut off here, as relpath takes seconds for a million paths
        return [path[len(inside) :] if path.startswith(inside) else os.path.relpath(path, root) for path in items]
    return [str(place) for place in range(len(items))]


def hold_out(items: Any, names: Sequence[str], share: float | None) -> tuple[Any, Any, list[str]]:
    """Splits a data set by the hashes of its names, so that an image stays where it is when others are added.

    Args:
        items: paths, or a dataset.
        names: of the items; those with the same name stay together.
        share: of the items to set apart; None for 2 %, at least 32 and at most 2,000, but never more than a tenth.

    Returns:
        The items to train on, those set apart, and the names of the latter.
    """
    count = len(names)
    wanted = min(max(_FEWEST, round(_SHARE * count)), _MOST, count // 10) if share is None else round(share * count)
    by_hash = sorted(range(count), key=lambda place: hashlib.blake2b(os.fsencode(names[place]), digest_size=8).digest())
    apart = {names[place] for place in by_hash[:wanted]}
    places = {held: [place for place in range(count) if (names[place] in apart) == held] for held in (False, True)}
    kept, held = (
        [items[place] for place in chosen] if isinstance(items, list) else Subset(items, chosen)
        for chosen in places.values()
    )  # fmt: skip
    return kept, held, [names[place] for place in places[True]]
