"""The page's plots, by matplotlib, as inline SVG: lines over steps, points over parameters.

`svg` turns marks into the page's CSS variables, so that a plot follows the light or dark theme. matplotlib is imported
where something is drawn: it takes half a second of every start.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]
NUM_COLORS = 6
NEUTRAL = -1  # of teachers
_MARK = "#a1b2c"
"""Followed by a digit: a series colour; by one of these letters: a colour of the page."""
_VARIABLES = {"b": "line", "c": "ink", "d": "ink-2"} | {str(n): f"series-{n}" for n in range(NUM_COLORS)}
_LINE, _INK, _SOFT = (_MARK + letter for letter in "bcd")


def color_of(number: int) -> str:
    return "var(--ink-2)" if number < 0 else f"var(--series-{number % NUM_COLORS})"


def line_plot(
    lines: Sequence[tuple[str, Sequence[Point]]], levels: Sequence[tuple[str, float]] = (), *, y_label: str
) -> Figure:
    """Names and points over the steps; `levels` are names and heights of dashed lines: a teacher's score."""
    figure, axes = _axes("step", y_label)
    for name, y in levels:
        axes.axhline(y, color=_SOFT, linestyle=(0, (2, 3)), label=name)
        across = axes.get_yaxis_transform()
        axes.text(1, y, _cut(name), transform=across, ha="right", va="bottom", color=_INK)
    for number, (name, points) in enumerate(lines):
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        if finite:
            style = ("o" if len(finite) <= 30 else "") + ("-" if number < NUM_COLORS else "--")
            axes.plot(*zip(*finite, strict=True), style, color=_mark(number), markersize=3.5, label=name)
    axes.set_xlim(left=0)
    return figure


def scatter_plot(points: Sequence[tuple[str, int, Point]], *, y_label: str) -> Figure:
    """Names, colour numbers and points over millions of parameters, by their logarithm."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, axes = _axes("million parameters", y_label)
    axes.set_xscale("log")
    xs = [x for _, _, (x, _) in points]
    for name, color, (x, y) in points:
        axes.plot([x], [y], "o", color=_mark(color), markersize=8, label=name)
        right = x > math.sqrt(min(xs) * max(xs))
        axes.annotate(
            _cut(name), (x, y), (-8 if right else 8, 0), textcoords="offset points", va="center",
            ha="right" if right else "left", color=_INK,
        )  # fmt: skip
    axes.set_xlim(min(xs) / 1.6, max(xs) * 1.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.15)
    ys = [y for _, _, (_, y) in points]
    middle, least = (min(ys) + max(ys)) / 2, 0.05 * max(map(abs, ys))
    if max(ys) - min(ys) < least:  # else equal models look far apart
        axes.set_ylim(middle - least, middle + least)
    return figure


def svg(figure: Figure, label: str) -> str:
    """An element in the page's colours, with `label` for screen readers; the same for equal figures."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = "<svg" + buffer.getvalue().partition("<svg")[2]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    text = re.sub(_MARK + "([0-9bcd])", lambda found: f"var(--{_VARIABLES[found[1]]})", text)
    head = f'<svg class="chart" \\1 role="img" aria-label="{escape(label)}">'
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', head, text, count=1).strip()


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.set_xlabel(x_label, color=_SOFT)
    axes.set_ylabel(y_label, color=_SOFT)
    axes.grid(color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    return figure, axes


def _mark(color: int) -> str:
    return _SOFT if color < 0 else f"{_MARK}{color % NUM_COLORS}"


def _cut(text: str) -> str:
    return text if len(text) <= 28 else text[:27].rstrip() + "…"
