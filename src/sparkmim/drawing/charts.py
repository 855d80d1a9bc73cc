"""Curves as SVG, in the fonts of the reader's machine."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sparkmim.drawing.figures import ACCENT, new_figure

Form = Literal["number", "count", "share"]

MOST_POINTS = 1000
"""Points drawn of a curve; more than a chart is pixels wide."""

_WIDTH, _HEIGHT = 440, 220
"""Size in CSS pixels; matplotlib's 9 points are 12 of them."""

_GREY, _LINE = "#5f6c78", "#e1e6ea"
_FEW = 30
"""Up to this many points, each is marked."""

_STEPS = (1, 2, 2.5, 5, 10)
"""Distances between ticks, times a power of ten."""


@dataclass(frozen=True)
class Curve:
    """A scalar over the steps of a run, ascending, with the time of each in seconds since 1970."""

    steps: list[int]
    values: list[float]
    times: list[float]


@dataclass(frozen=True)
class Line:
    """A curve and its appearance; a faint one is the background of another line."""

    curve: Curve
    label: str = ""
    colour: str = ACCENT
    faint: bool = False


def running_mean(curve: Curve) -> Curve:
    """Averages each point with a fiftieth of all points on either side, fewer towards the ends."""
    values = np.asarray(curve.values)
    places = np.arange(len(values))
    half = np.minimum(np.minimum(places, places[::-1]), len(values) // 50)
    total = np.concatenate([[0.0], np.cumsum(values)])
    means = (total[places + half + 1] - total[places - half]) / (2 * half + 1)
    return Curve(curve.steps, means.tolist(), curve.times)


def thinned(curve: Curve, most: int = MOST_POINTS) -> tuple[Any, Any]:
    """Returns steps and values of at most `most` finite points: the lowest and highest of each stretch."""
    steps, values = np.asarray(curve.steps), np.asarray(curve.values)
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) <= most:
        return steps, values
    edges = np.linspace(0, len(values), (most - 2) // 2 + 1).astype(int)
    kept = {0, len(values) - 1}
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        kept |= {start + int(values[start:end].argmin()), start + int(values[start:end].argmax())}
    places = sorted(kept)
    return steps[places], values[places]


def draw_chart(lines: Sequence[Line], form: Form) -> str:
    """Draws lines, from back to front, as SVG text; the axis of a `count` starts at zero, a `share` is in percent."""
    from matplotlib import rc_context
    from matplotlib.ticker import EngFormatter, FixedFormatter, FixedLocator, MaxNLocator

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparkmim", "font.family": "DejaVu Sans"}):
        figure = new_figure(_WIDTH / 96, _HEIGHT / 96)
        axes = figure.add_axes((0.13, 0.2, 0.85, 0.73))
        for line in lines:
            steps, values = thinned(line.curve)
            axes.plot(
                steps, values, color=line.colour, alpha=0.3 if line.faint else 1,
                linewidth=0.8 if line.faint else 1.6, marker="o" if len(steps) <= _FEW else None, markersize=3,
            )  # fmt: skip
        axes.margins(x=0.02, y=0.08)
        if form == "count":
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_STEPS))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=form == "count", steps=_STEPS))
        low, high = axes.get_ylim()
        ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
        labels, power = _written(ticks, form)
        written = FixedFormatter(labels)
        written.set_offset_string(power)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_major_formatter(written)
        axes.set_xlabel("step", color=_GREY, fontsize=9)
        axes.tick_params(length=0, pad=5, labelcolor=_GREY, labelsize=9)
        axes.yaxis.get_offset_text().set(color=_GREY, size=9)
        axes.grid(axis="y", color=_LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set(color=_LINE)
        buffer = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue().decode()
    return svg[svg.index("<svg") :].replace("'DejaVu Sans'", "system-ui, sans-serif")


def _written(ticks: Sequence[float], form: Form) -> tuple[list[str], str]:
    """Returns tick labels with equally many decimals, and the power of ten to multiply them by, if any."""
    largest = max(map(abs, ticks), default=0.0)
    power = math.floor(math.log10(largest)) if largest else 0
    if form != "number" or -2 <= power < 5:
        power = 0
    factor = 100.0 if form == "share" else 10.0**-power
    values = [tick * factor for tick in ticks]
    decimals = max((len(f"{value:.6g}".partition(".")[2]) for value in values), default=0)
    unit = "%" if form == "share" else ""
    labels = [f"{value:,.{decimals}f}{unit}".replace("-", "\N{MINUS SIGN}") for value in values]
    return labels, f"×10{str(power).translate(_SUPERSCRIPT)}" if power else ""


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
