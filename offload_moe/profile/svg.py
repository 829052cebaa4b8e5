"""Small plots as SVG text for embedding in a page. Colours and fonts come from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 56, 150, 16, 46
TITLE = 26  # height of the line above every plot
LABEL_STEP = 14.0
HEAT_STEPS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)  # times the mean, between one colour and the next


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """style: a class of the style sheet. A None among the values leaves a gap."""

    name: str
    style: str
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    label: str
    low: float
    high: float
    ticks: Sequence[float]
    form: str = "g"
    unit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A vertical line with a text beside it, and a dot at a measured value."""

    x: float
    text: str
    dot: float | None = None


def line_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis, marks: Sequence[Mark] = ()) -> str:
    """Lines with their names at their right ends."""
    frame = _Frame(x, y)
    parts = [frame.grid(), *(frame.mark(mark) for mark in marks)]
    parts += [frame.line(line) for line in lines]
    parts.append(frame.names(lines))
    return _svg(title, WIDTH, HEIGHT, parts)


def even_axis(label: str, values: Sequence[float], *, unit: str = "") -> Axis:
    """An axis from zero to a round number at or above the largest value."""
    top = max(values, default=0.0) or 1.0
    step = next(
        size for power in range(-9, 12) for size in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if size * 5 >= top
    )
    num_steps = next(count for count in range(1, 7) if count * step >= top * 0.999)
    return Axis(label=label, low=0, high=num_steps * step, ticks=[n * step for n in range(num_steps + 1)], unit=unit)


def layer_axis(num_layers: int) -> Axis:
    step = max(1, -(-num_layers // 12))
    return Axis(label="MoE layer", low=0, high=max(1, num_layers - 1), ticks=range(0, num_layers, step))


def percent_axis(label: str) -> Axis:
    return Axis(label=label, low=0, high=100, ticks=range(0, 101, 20), unit="%")


def stacked_bar(title: str, parts: Sequence[tuple[str, str, float]], unit: str) -> str:
    """parts: (name, style, value). One bar of proportional pieces, with names and values below."""
    total = sum(value for _, _, value in parts) or 1.0
    drawn, left = [], 0.0
    for row, (name, style, value) in enumerate(parts):
        width, top = value / total * WIDTH, 64 + 20 * row
        drawn.append(f'<rect class="{style}" x="{left:.1f}" y="8" width="{max(width, 0):.1f}" height="34"/>')
        drawn.append(f'<rect class="{style}" x="0" y="{top - 10}" width="12" height="12"/>')
        drawn.append(f'<text x="20" y="{top}">{escape(name)}</text>')
        share = f"{value:.2f} {unit}, {value / total:.1%}"
        drawn.append(f'<text x="{WIDTH - 4}" y="{top}" class="end">{escape(share)}</text>')
        left += width
    return _svg(title, WIDTH, 60 + 20 * len(parts), drawn)


def heatmap(title: str, rows: Sequence[Sequence[float]], x_label: str, y_label: str) -> str:
    """rows: values in units of their mean; exactly zero has a colour of its own. The first row is on top."""
    num_columns = max(map(len, rows))
    cell = min(24.0, (WIDTH - LEFT - 20) / num_columns)
    high = min(max(cell, 6.0), 18.0)  # with many experts cells become narrow, not flat
    places: dict[str, list[str]] = {}
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            x, y = LEFT + column * cell, 8 + row * high
            square = f"M{x:.1f} {y:.1f}h{cell - 0.4:.1f}v{high - 0.4:.1f}h-{cell - 0.4:.1f}z"
            places.setdefault(heat_style(value), []).append(square)
    bottom = 8 + len(rows) * high
    parts = [f'<path class="{style}" d="{"".join(squares)}"/>' for style, squares in sorted(places.items())]
    parts += _heat_ticks(len(rows), num_columns, cell, high, bottom)
    middle = LEFT + num_columns * cell / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 34:.1f}" class="middle axis">{escape(x_label)}</text>')
    parts.append(_turned(14, 8 + len(rows) * high / 2, y_label))
    parts.append(_heat_legend(bottom + 52))
    return _svg(title, WIDTH, round(bottom + 78), parts)


def heat_style(value: float) -> str:
    """The class of a value in units of the mean."""
    return "heat-none" if value == 0 else f"heat-{sum(value >= step for step in HEAT_STEPS)}"


def _heat_ticks(num_rows: int, num_columns: int, cell: float, high: float, bottom: float) -> list[str]:
    column_step = max(1, -(-num_columns // 16))
    row_step = math.ceil(12 / high)
    ticks = [
        f'<text x="{LEFT + (column + 0.5) * cell:.1f}" y="{bottom + 16:.1f}" class="middle tick">{column}</text>'
        for column in range(0, num_columns, column_step)
    ]
    ticks += [
        f'<text x="{LEFT - 6}" y="{8 + (row + 0.5) * high + 4:.1f}" class="end tick">{row}</text>'
        for row in range(0, num_rows, row_step)
    ]
    return ticks


def _heat_legend(y: float) -> str:
    names = ["never", *(f"below {step:g}" for step in HEAT_STEPS[:1])]
    names += [f"{low:g} to {high:g}" for low, high in pairwise(HEAT_STEPS)]
    names.append(f"{HEAT_STEPS[-1]:g} and more")
    styles = ["heat-none", *(f"heat-{level}" for level in range(len(HEAT_STEPS) + 1))]
    step = (WIDTH - LEFT) / len(names)
    return "".join(
        f'<rect class="{style}" x="{LEFT + n * step:.1f}" y="{y:.1f}" width="12" height="12"/>'
        f'<text class="tick" x="{LEFT + n * step + 17:.1f}" y="{y + 10:.1f}">{escape(name)}</text>'
        for n, (name, style) in enumerate(zip(names, styles, strict=True))
    )


class _Frame:
    """The plane of one line chart."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self._x, self._y = x, y

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self._x.low) / (self._x.high - self._x.low)
        up = (y - self._y.low) / (self._y.high - self._y.low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        parts, (right, bottom) = [], (WIDTH - RIGHT, HEIGHT - BOTTOM)
        for tick in self._y.ticks:
            _, y = self.place(self._x.low, tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
            text = f"{tick:{self._y.form}}{self._y.unit}"
            parts.append(f'<text class="end tick" x="{LEFT - 6}" y="{y + 4:.1f}">{escape(text)}</text>')
        for tick in self._x.ticks:
            x, _ = self.place(tick, self._y.low)
            text = f"{tick:{self._x.form}}{self._x.unit}"
            parts.append(f'<text class="middle tick" x="{x:.1f}" y="{bottom + 18}">{escape(text)}</text>')
        middle = (LEFT + right) / 2
        parts.append(f'<text class="middle axis" x="{middle}" y="{HEIGHT - 8}">{escape(self._x.label)}</text>')
        parts.append(_turned(14, (TOP + bottom) / 2, self._y.label))
        return "".join(parts)

    def line(self, line: Line) -> str:
        """Pieces between gaps; a point alone between gaps is a dot."""
        pieces: list[list[tuple[float, float]]] = [[]]
        for x, y in zip(line.x, line.y, strict=True):
            if y is None:
                pieces.append([])
            else:
                pieces[-1].append(self.place(x, y))
        drawn = []
        for piece in pieces:
            if len(piece) > 1:
                path = "L".join(f"{x:.1f} {y:.1f}" for x, y in piece)
                drawn.append(f'<path class="line {line.style}" d="M{path}"/>')
            elif piece:
                drawn.append(f'<circle class="{line.style}" cx="{piece[0][0]:.1f}" cy="{piece[0][1]:.1f}" r="3"/>')
        return "".join(drawn)

    def names(self, lines: Sequence[Line]) -> str:
        """The names at the heights of their lines' ends, moved apart where they would overlap."""
        ends = []
        for line in lines:
            known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
            if known:
                ends.append((self.place(*known[-1]), line))
        ends.sort(key=lambda end: end[0][1])
        heights = _apart([place[1] for place, _ in ends], TOP, HEIGHT - BOTTOM)
        return "".join(
            f'<path class="leader" d="M{x + 2:.1f} {y:.1f}L{WIDTH - RIGHT + 8} {height:.1f}"/>'
            f'<text class="name {line.style}" x="{WIDTH - RIGHT + 12}" y="{height + 4:.1f}">{escape(line.name)}</text>'
            for ((x, y), line), height in zip(ends, heights, strict=True)
        )

    def mark(self, mark: Mark) -> str:
        x, bottom = self.place(mark.x, self._y.low)
        on_left = x > LEFT + (WIDTH - LEFT - RIGHT) * 0.6
        anchor, text_x = ("end", x - 5) if on_left else ("start", x + 5)
        parts = [
            f'<path class="mark" d="M{x:.1f} {TOP}V{bottom:.1f}"/>',
            f'<text class="{anchor} tick" x="{text_x:.1f}" y="{TOP + 4}">{escape(mark.text)}</text>',
        ]
        if mark.dot is not None:
            _, y = self.place(mark.x, mark.dot)
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
        return "".join(parts)


def _apart(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Ascending heights moved so that no two are closer than a line of text, within the plane."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + LABEL_STEP if placed else top))
    limit = bottom
    for number in range(len(placed) - 1, -1, -1):
        placed[number] = min(placed[number], limit)
        limit = placed[number] - LABEL_STEP
    return placed


def _turned(x: float, y: float, text: str) -> str:
    return f'<text class="middle axis" transform="translate({x:.1f} {y:.1f}) rotate(-90)">{escape(text)}</text>'


def _svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    total = height + TITLE
    return (
        f'<svg viewBox="0 0 {width} {total}" width="{width}" height="{total}" role="img">'
        f'<text class="title" x="0" y="15">{escape(title)}</text>'
        f'<g transform="translate(0 {TITLE})">{"".join(parts)}</g></svg>'
    )
