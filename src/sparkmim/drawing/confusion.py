"""Confusion matrices as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparkmim.drawing.figures import new_figure
from sparkmim.terminal import printable

_MOST_NUMBERS = 20
"""Up to this many classes, cells are large enough for numbers."""

_MOST_NAMES = 60
"""Labels along an axis; of more classes, every second one, every third one, and so on, is named."""


def draw_confusion(confusion: Sequence[Sequence[int]], classes: Sequence[str], path: Path, title: str = "") -> None:
    """Draws counts `[classes][classes]`, true classes in rows, as shares of their row, and saves the picture."""
    counts = np.asarray(confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(classes)
    side = min(14.0, 2.2 + 0.34 * n)
    figure = new_figure(side + 0.8, side, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if n <= _MOST_NUMBERS:
        for row in range(n):
            for column in range(n):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "#333333"
                    share = f"{100 * shares[row, column]:.0f}"
                    axes.text(column, row, share, ha="center", va="center", color=colour, fontsize=8)
    step = -(-n // _MOST_NAMES)
    places = range(0, n, step)
    names = [printable(classes[place]) for place in places]
    axes.set_xticks(places, names, rotation=90, parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    axes.tick_params(length=0, labelsize=8)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, label="share of the true class, %")
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    bar.outline.set_visible(False)
    figure.savefig(path, bbox_inches="tight")
