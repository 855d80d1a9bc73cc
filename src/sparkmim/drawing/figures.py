"""Pictures side by side on a figure: where each stands, in inches, and what is written beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkmim.errors import UserError
from sparkmim.files import new_file, replacing

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


FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
"""What the name of a picture may end in."""


ACCENT = "#1f6f8b"


CONTRAST = "#c8553d"
"""The two colours of curves: ours, and what it is held against."""


def sample_photograph() -> str:
    """A photograph that comes with matplotlib: Grace Hopper, by the United States Navy, in the public domain."""
    from matplotlib import get_data_path

    return str(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg")


def new_figure(width: float, height: float, **arguments: Any) -> Figure:
    """An empty figure, `width` by `height` inches, that no window is opened for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, **arguments)
    FigureCanvasAgg(figure)
    return figure


def check_picture(out: str | Path | None, overwrite: bool) -> Path | None:
    """Where a picture is to be written; asked before any work is done for it.

    Raises:
        ValueError: if its name does not end in a format's, or it is taken.
    """
    if out is None:
        return None
    if Path(out).suffix.lower() not in FORMATS:
        raise UserError(f"out is {out}; the name of a picture ends in {', '.join(FORMATS)}")
    return new_file(out, overwrite)


def write_picture(figure: Figure, path: Path | None) -> None:
    """Saves a figure in the format that `path` ends in, if there is one."""
    if path is not None:
        with replacing(path) as partial:
            figure.savefig(partial)


def show_picture(axes: Any, pixels: Any, title: str = "", note: str = "") -> None:
    """Draws `[H, W, 3]` without axes; a title above, a note below."""
    axes.imshow(np.clip(pixels, 0, 1), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(note, fontsize=8, labelpad=2)
