"""Matplotlib figures: creating, placing pictures and captions in inches, saving."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkmim.files import replacing
from sparkmim.results import PictureResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ACCENT = "#1f6f8b"
"""Colour of the curve or picture in focus."""

CONTRAST = "#c8553d"
"""Colour of what it is compared with."""

THIRD = "#8a6fb0"
"""Colour of a third."""

QUIET = "#5f6368"
"""Colour of captions, and of what curves are compared with."""


# Files


def write_picture(result: PictureResult, **arguments: Any) -> None:
    """Saves the figure of a result in the format of its path's suffix, if it has a path."""
    if result.out is not None:
        with replacing(result.out) as partial:
            result.figure(**arguments).savefig(partial)


# Figures


def new_figure(width: float, height: float, **arguments: Any) -> Figure:
    """Creates a figure of a size in inches, without opening a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, **arguments)
    FigureCanvasAgg(figure)
    return figure


def show_picture(axes: Any, pixels: Any, title: str = "", note: str = "", **style: Any) -> Any:
    """Draws pixels `[H, W, 3]` in 0…1, or values `[H, W]`, without ticks; a title above, a note below."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(note, fontsize=8, labelpad=2)
    return axes.imshow(np.clip(pixels, 0, 1) if pixels.ndim == 3 else pixels, interpolation="nearest", **style)


# Layout in inches


def tile_size(pictures: Any, side: float, narrowest: float) -> tuple[float, float]:
    """Returns the width and height of pictures `[..., H, W, 3]`, with a square's area unless too narrow for captions.

    Example:
        >>> import numpy as np
        >>> tile_size(np.zeros((16, 64, 3)), side=2.0, narrowest=1.0)
        (4.0, 1.0)
    """
    height, width = pictures.shape[-3:-1]
    wide = max(narrowest, side * math.sqrt(width / height))
    return wide, wide * height / width


def picture_at(figure: Figure, left: float, top: float, size: tuple[float, float], pixels: Any) -> Any:
    """Draws a picture of a width and height, at a distance from the figure's left and top edges; returns its axes."""
    width, height = figure.get_size_inches()
    wide, tall = size
    axes = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))
    show_picture(axes, pixels)
    return axes


def write_at(figure: Figure, left: float, top: float, text: str, **style: Any) -> None:
    """Writes text, with `$` as a letter, at a distance from the figure's left and top edges; style as `Figure.text`."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, parse_math=False, **{"va": "top", "fontsize": 9, **style})


def shortened(name: str, most: int) -> str:
    """Shortens a name to at most `most` characters, in its middle; letters missing from the font become `?`.

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
