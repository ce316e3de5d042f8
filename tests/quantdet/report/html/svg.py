"""Inline SVG by small functions: heat maps, forest plots, divergence grids. Colours are classes of the page's style sheet."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

STEPS = 8  # classes c1 to c8
_EXACT = 20  # formats up to which each cell says its figure
Value = Callable[[str, str], float | None]


@dataclass(frozen=True)
class Scale:
    """A logarithmic scale in `STEPS` classes, the same for all maps of a page. `low`, `high`: powers of ten."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Scale":
        logs = [math.log10(value) for value in values if value is not None and 0 < value < math.inf]
        low, high = (min(logs), max(logs)) if logs else (-4.0, 0.0)
        return cls(low, max(high, low + 0.5))

    def word(self, value: float | None) -> str:
        """The class of a value: `no` there is none, `zero`, `inf`, or c1 to c8."""
        if value is None or math.isnan(value):
            return "no"
        if value <= 0 or math.isinf(value):
            return "zero" if value <= 0 else "inf"
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return f"c{min(STEPS, max(1, 1 + int(share * STEPS)))}"

    def bounds(self) -> list[tuple[str, str]]:
        """`(class, from where on)` of every step."""
        width = (self.high - self.low) / STEPS
        return [(f"c{n + 1}", f"{10 ** (self.low + n * width):.1e}") for n in range(STEPS)]


def heat_map(
    name: str, title: str, formats: Sequence[str], value: Value, scale: Scale, classes: Sequence[Sequence[str]] = ()
) -> Markup:
    """Rows to columns; `classes` of formats that stand side by side are outlined."""
    n = len(formats)
    side = 24 if n <= 10 else 18 if n <= 20 else 12
    left, top = _margin(formats), _margin(formats)
    width, height = left + n * side + 4, top + n * side + 4
    cells: dict[str, list[str]] = {}
    titled: list[str] = []
    for y, a in enumerate(formats):
        for x, b in enumerate(formats):
            if a == b:
                continue
            found = value(a, b)
            word = scale.word(found)
            if n <= _EXACT:
                text = "no figure" if found is None else f"{found:.3g} nats"
                titled.append(
                    f'<rect class="{word}" x="{left + x * side}" y="{top + y * side}" width="{side - 1}" height="{side - 1}">'
                    f"<title>{escape(a)} to {escape(b)}: {text}</title></rect>"
                )
            else:
                cells.setdefault(word, []).append(f"M{left + x * side} {top + y * side}h{side - 1}v{side - 1}h-{side - 1}z")
    parts = [f'<path class="{word}" d="{"".join(cells[word])}"/>' for word in sorted(cells)] + titled
    at = 0
    for group in classes:
        if len(group) > 1:
            place = f'x="{left + at * side - 1}" y="{top + at * side - 1}"'
            size = f'width="{len(group) * side + 1}" height="{len(group) * side + 1}"'
            inner = f"<title>same logits: {escape(' = '.join(group))}</title>"
            parts.append(f'<rect class="outline" {place} {size} rx="2">{inner}</rect>')
        at += len(group)
    for index, format_ in enumerate(formats):
        middle = index * side + side / 2
        parts.append(f'<text class="end" x="{left - 5}" y="{top + middle + 3:g}">{escape(format_)}</text>')
        parts.append(f'<text transform="translate({left + middle + 3:g} {top - 5}) rotate(-90)">{escape(format_)}</text>')
    text = "Rows and columns are formats; the colour is their distance. The figures stand in the table below."
    return _svg(name, title, text, width, height, parts, "heat")


@dataclass(frozen=True)
class Estimate:
    """A row of a forest plot."""

    label: str
    value: float
    low: float
    high: float
    word: str = ""


def forest(name: str, title: str, rows: Sequence[Estimate], unit: str) -> Markup:
    """Estimates with intervals: a logarithmic axis if all bounds are above 0, else a linear one with a line at 0."""
    bounds = [bound for row in rows for bound in (row.low, row.high, row.value) if math.isfinite(bound)]
    logarithmic = bool(bounds) and min(bounds) > 0
    low, high = (min(bounds), max(bounds)) if bounds else (0.0, 1.0)
    ticks = _log_ticks(low, high) if logarithmic else _linear_ticks(min(low, 0.0), max(high, 0.0))
    first, last = ticks[0], ticks[-1] if ticks[-1] > ticks[0] else ticks[0] + 1
    left, room, line, top = _margin([row.label for row in rows]), 460, 20, 8

    def x(value: float) -> float:
        value = min(max(value, first), last)
        if logarithmic:
            return left + room * math.log10(value / first) / math.log10(last / first)
        return left + room * (value - first) / (last - first)

    parts, bottom = [], top + line * len(rows)
    for tick in ticks:
        parts.append(f'<path class="{"zero-line" if tick == 0 else "rule"}" d="M{x(tick):.1f} {top}V{bottom}"/>')
        parts.append(f'<text class="mid" x="{x(tick):.1f}" y="{bottom + 14}">{tick:g}</text>')
    for index, row in enumerate(rows):
        y = top + line * index + line / 2
        text = f"{row.label}: {row.value:.3g} {unit}, 95 % interval {row.low:.3g} to {row.high:.3g}"
        parts.append(
            f'<g class="{escape(row.word or "mark")}"><title>{escape(text)}</title>'
            f'<path d="M{x(row.low):.1f} {y:g}H{x(row.high):.1f}"/><circle cx="{x(row.value):.1f}" cy="{y:g}" r="3.5"/></g>'
            f'<text class="end" x="{left - 8}" y="{y + 4:g}">{escape(row.label)}</text>'
        )
    parts.append(f'<text class="mid" x="{left + room / 2:g}" y="{bottom + 30}">{escape(unit)}</text>')
    axis = "logarithmic" if logarithmic else "linear"
    return _svg(name, title, f"{len(rows)} estimates on a {axis} axis.", left + room + 24, bottom + 36, parts, "forest")


def grid(name: str, title: str, rows: Sequence[tuple[str, str]], positions: int, span: int) -> Markup:
    """A row per run, a column per position (or per `span` of them): what differs from the run it is compared with."""
    columns = max((len(text) for _, text in rows), default=1)
    side = 14 if columns <= 40 else 8 if columns <= 100 else 4
    tall, left, top = 14, _margin([label for label, _ in rows]), 18
    classes = {".": "same", "x": "differs", "#": "token"}
    parts = []
    for y, (label, text) in enumerate(rows):
        begin = 0
        while begin < len(text):  # neighbours of one kind are one rectangle
            end = begin
            while end < len(text) and text[end] == text[begin]:
                end += 1
            word = classes.get(text[begin], "no")
            parts.append(
                f'<rect class="{word}" x="{left + begin * side}" y="{top + y * tall}" '
                f'width="{(end - begin) * side}" height="{tall - 2}"/>'
            )
            begin = end
        parts.append(f'<text class="end" x="{left - 6}" y="{top + y * tall + 10}">{escape(label)}</text>')
    every = max(1, round(columns / 8))
    for column in range(0, columns, every):
        parts.append(f'<text class="mid" x="{left + column * side + side / 2:g}" y="12">{column * span}</text>')
    text = f"Rows are runs, columns are {positions} positions; marked are those that differ."
    return _svg(name, title, text, left + columns * side + 10, top + len(rows) * tall + 4, parts, "grid")


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around the bounds; 1, 2, 5 where there are few of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    if len(powers) > 3:
        return [10.0**n for n in powers]
    every = [float(f"{m}e{n}") for n in powers for m in (1, 2, 5)]
    below = [tick for tick in every if tick <= low][-1:]
    above = [tick for tick in every if tick >= high][:1]
    return sorted({*below, *above, *(tick for tick in every if low <= tick <= high)})


def _linear_ticks(low: float, high: float) -> list[float]:
    span = high - low or 1.0
    step = 10.0 ** math.floor(math.log10(span))
    step = next(s for s in (step / 5, step / 2, step) if span / s <= 6 or s == step)
    return [round(n * step, 12) for n in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _margin(labels: Sequence[str]) -> int:
    return 14 + round(6.3 * max((len(label) for label in labels), default=4))


def _svg(name: str, title: str, text: str, width: float, height: float, parts: Sequence[str], kind: str) -> Markup:
    head = (
        f'<svg class="{kind}" role="img" aria-labelledby="{escape(name)}-t {escape(name)}-d" width="{width:g}" '
        f'height="{height:g}" viewBox="0 0 {width:g} {height:g}" xmlns="http://www.w3.org/2000/svg">'
        f'<title id="{escape(name)}-t">{escape(title)}</title><desc id="{escape(name)}-d">{escape(text)}</desc>'
    )
    return Markup(head + "".join(parts) + "</svg>")
