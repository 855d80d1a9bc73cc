"""Pictures side by side on a figure: where each stands, in inches, and what is written beside it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUIET = "#5f6368"
"""Colour of captions."""


def tile_size(pictures: Any, side: float, narrowest: float) -> tuple[float, float]:
    """Width and height in inches of pictures `[..., H, W, 3]`, as large as squares of `side`, whatever their shape.

    Args:
        pictures: some or one of them.
        side: of a square one, in inches.
        narrowest: what a caption needs, in inches.

    Example:
        >>> import numpy as np
        >>> tile_size(np.zeros((16, 64, 3)), side=2.0, narrowest=1.0)
        (4.0, 1.0)
    """
    height, width = pictures.shape[-3:-1]
    wide = max(narrowest, side * math.sqrt(width / height))
    return wide, wide * height / width


def axes_at(figure: Figure, left: float, top: float, size: tuple[float, float]) -> Any:
    """Axes of a width and height, at a distance from the figure's left and top; all in inches."""
    whole_width, whole_height = figure.get_size_inches()
    wide, tall = size
    return figure.add_axes(
        (left / whole_width, 1 - (top + tall) / whole_height, wide / whole_width, tall / whole_height)
    )


def write_at(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    """Text as it is, `$` included, whose top left corner, or what `style` aligns, stands there; in inches."""
    whole_width, whole_height = figure.get_size_inches()
    style = {"va": "top", "fontsize": 9, **style}
    figure.text(left / whole_width, 1 - top / whole_height, text, parse_math=False, **style)


def shortened(name: str, most: int) -> str:
    """A name of at most `most` characters; start and end stay, and what the font has no glyph for becomes `?`.

    Example:
        >>> shortened("n02093428_American_Staffordshire_terrier", 16)
        'n0209342…terrier'
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    name = "".join(letter if font.get_char_index(ord(letter)) else "?" for letter in name)
    if len(name) <= most:
        return name
    end = (most - 1) // 2
    return f"{name[: most - 1 - end]}…{name[-end:]}"
