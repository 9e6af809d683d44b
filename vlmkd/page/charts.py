"""Small charts as inline SVG: lines over steps, points over parameters, heat maps. No scripts, no outside loads.

Colours are CSS variables of the page (`--series-0` ...), so that a chart follows the page's light or dark theme.
Every mark carries a `<title>`, which browsers show while the pointer rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 18, 10, 40
NUM_COLORS = 6
# More than this many points of one line are indistinguishable at the chart's width; neighbours are averaged.
MAX_POINTS = 160


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one named point, of a chart."""

    name: str
    points: list[tuple[float, float]]
    """(x, y) pairs in the order of x."""
    color: int = 0
    """Index of a series colour; -1 is the neutral colour of teachers."""
    level: bool = False
    """Draw the last y as a dashed line across the chart (a teacher's score)."""


def color_of(index: int) -> str:
    """The CSS colour of series `index`; -1 is neutral."""
    return "var(--ink-2)" if index < 0 else f"var(--series-{index % NUM_COLORS})"


def number(value: float) -> str:
    """A short form of `value` for ticks and titles."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high], steps of 1, 2 or 5 times a power of ten."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 and 5 times powers of ten in the decades of [low, high], without needless outer ones."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    inside = [mark for mark in marks if low <= mark <= high]
    below = [mark for mark in marks if mark < low][-1:]
    above = [mark for mark in marks if mark > high][:1]
    return below + inside + above


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points: means of neighbouring ones. Non-finite points are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(finite) <= limit:
        return finite
    thinned = []
    for index in range(limit):
        part = finite[index * len(finite) // limit : (index + 1) * len(finite) // limit]
        thinned.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return thinned


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> str:
    """Lines over a common x axis, with dots to rest the pointer on."""
    drawn = [(item, thin(item.points)) for item in series]
    drawn = [(item, points) for item, points in drawn if points]
    steps = [x for item, points in drawn if not item.level for x, _ in points] or [0.0, 1.0]
    values = [y for _, points in drawn for _, y in points] or [0.0, 1.0]
    x_ticks = ticks(0.0, max(steps))
    y_ticks = _padded_ticks(values)
    x_of = _scale(x_ticks[0], max(steps) if max(steps) > x_ticks[0] else x_ticks[-1], LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    shown_x = [tick for tick in x_ticks if x_of(tick) <= WIDTH - RIGHT + 1]
    marks = [_axes(shown_x, y_ticks, x_of, y_of, x_label, y_label)]
    for item, points in drawn:
        marks.append(_level(item, points, y_of) if item.level else _line(item, points, x_of, y_of))
    return _svg(WIDTH, HEIGHT, marks, f"{y_label} over {x_label}")


def scatter_chart(series: Sequence[Series], *, x_label: str, y_label: str, unit: float = 1.0) -> str:
    """One named point a series over a logarithmic x axis, whose ticks are told in `unit`s (1e6: millions)."""
    points = [(item, item.points[-1]) for item in series if item.points]
    xs = [x / unit for _, (x, _) in points] or [1.0]
    ys = [y for _, (_, y) in points] or [0.0, 1.0]
    x_ticks = log_ticks(min(xs) / 1.1, max(xs) * 1.1)
    y_ticks = _padded_ticks(ys)
    log_of = _scale(math.log(x_ticks[0]), math.log(x_ticks[-1]), LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP + 6)

    def x_of(value: float) -> float:
        return log_of(math.log(value))

    marks = [_axes(x_ticks, y_ticks, x_of, y_of, x_label, y_label)]
    for (item, (x, y)), label_y in zip(points, _spread([y_of(y) for y in ys]), strict=True):
        px, py = x_of(x / unit), y_of(y)
        title = f"{item.name}: {number(x / unit)} {x_label}, {number(y)}"
        marks.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" fill="{color_of(item.color)}"><title>{escape(title)}</title></circle>'
        )
        side, anchor = (10, "start") if px < WIDTH * 0.62 else (-10, "end")
        marks.append(
            f'<text x="{px + side:.1f}" y="{label_y + 4:.1f}" text-anchor="{anchor}" class="mark">'
            f"{escape(shorten(item.name, 26))}</text>"
        )
    return _svg(WIDTH, HEIGHT, marks, f"{y_label} against {x_label}")


def heat_map(
    values: list[list[float]],
    rows: list[str],
    column_images: list[str],
    *,
    label: str,
    column_names: list[str] | None = None,
) -> str:
    """Squares whose opacity is the square root of a value in [0, 1]; the ring marks the strongest of a row.

    Args:
        values: one list a row, all of the same length.
        rows: names of the rows.
        column_images: ids of SVG images on the page, drawn above the columns; may be empty.
        label: what screen readers are told.
        column_names: what a square's title calls its column; None: `image 1`, `image 2`, ...
    """
    cell, left, top = 13, 118, 22 if column_images else 4
    columns = len(values[0]) if values else 0
    names = column_names or [f"image {column + 1}" for column in range(columns)]
    marks = []
    for column, image in enumerate(column_images):
        marks.append(
            f'<use href="#{image}" x="{left + column * cell}" y="4" width="{cell - 1}" height="{cell - 1}"/>'
        )
    for row, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = top + row * cell
        marks.append(
            f'<text x="{left - 5}" y="{y + 10}" text-anchor="end" class="row">{escape(shorten(name, 22))}</text>'
        )
        best = max(range(columns), key=line.__getitem__)
        for column, value in enumerate(line):
            opacity = math.sqrt(min(max(value, 0.0), 1.0))
            ring = ' class="best"' if column == best else ""
            marks.append(
                f'<rect x="{left + column * cell}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                f'fill-opacity="{opacity:.2f}"{ring}><title>{escape(name)} × {escape(names[column])}: {value:.3f}</title></rect>'
            )
    frame = (
        f'<rect x="{left}" y="{top}" width="{columns * cell}" height="{len(values) * cell}" class="ground"/>'
    )
    width, height = left + columns * cell + 2, top + len(values) * cell + 2
    return _svg(width, height, [frame, *marks], label, kind="heat")


def shorten(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _padded_ticks(values: list[float]) -> list[float]:
    """Ticks that leave room below and above, but start at zero rather than below it."""
    margin = 0.06 * (max(values) - min(values))
    low = min(values) - margin
    return ticks(max(low, 0.0) if min(values) >= 0 else low, max(values) + margin)


def _spread(positions: list[float], gap: float = 14.0) -> list[float]:
    """Label heights close to `positions` and at least `gap` apart, inside the chart."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    placed = list(positions)
    for before, after in zip(order, order[1:], strict=False):
        placed[after] = max(placed[after], placed[before] + gap)
    overflow = max([placed[index] for index in order[-1:]] + [0.0]) - (HEIGHT - BOTTOM - 4)
    if overflow > 0:
        placed = [max(TOP + 4.0, position - overflow) for position in placed]
    return placed


def _axes(
    x_ticks: list[float],
    y_ticks: list[float],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    x_label: str,
    y_label: str,
) -> str:
    """Grid lines, tick numbers and axis names."""
    marks = []
    for tick in y_ticks:
        y = y_of(tick)
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x = x_of(tick)
        marks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}" class="axis"/>'
        )
        marks.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(tick)}</text>'
        )
    bottom = HEIGHT - BOTTOM
    marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" class="axis"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    marks.append(
        f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle" class="name">{escape(x_label)}</text>'
    )
    return "".join(marks) + f"<title>{escape(y_label)}</title>"


def _line(
    item: Series,
    points: list[tuple[float, float]],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
) -> str:
    color = color_of(item.color)
    dash = ' stroke-dasharray="7 4"' if item.color >= NUM_COLORS else ""
    path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
    marks = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>']
    radius = 3 if len(points) <= 30 else 0
    for x, y in points:
        title = f"{item.name}, step {number(x)}: {number(y)}"
        if radius:
            marks.append(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="{radius}" fill="{color}"/>')
        marks.append(
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="6" class="hover"><title>{escape(title)}</title></circle>'
        )
    return "".join(marks)


def _level(item: Series, points: list[tuple[float, float]], y_of: Callable[[float], float]) -> str:
    value = points[-1][1]
    y = y_of(value)
    title = escape(f"{item.name}: {number(value)}")
    label_y = y - 5 if y > TOP + 20 else y + 14
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color_of(item.color)}" '
        f'stroke-width="2" stroke-dasharray="2 4"><title>{title}</title></line>'
        f'<text x="{WIDTH - RIGHT - 2}" y="{label_y:.1f}" text-anchor="end" class="mark">{escape(shorten(item.name, 30))}</text>'
    )


def _svg(width: float, height: float, marks: list[str], label: str, kind: str = "chart") -> str:
    body = "".join(marks)
    return f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
