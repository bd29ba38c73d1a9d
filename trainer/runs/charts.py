"""Charts for pages: from numbers to the coordinates of an inline SVG, which a template draws. No
script, no font; colours come from the page, so that they follow its light or dark scheme.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 26  # margins around the plot, in the units of the view box
MOST_POINTS = 240  # of a line; more are drawn as the mean of as many bins, with their range
FEW_POINTS = 40  # up to here each has a visible dot

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: values over steps. low, high: an interval around each value, where one is known."""

    label: str
    points: Sequence[Point]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Dot:
    x: str
    y: str
    title: str  # on hover


@dataclass(frozen=True)
class Line:
    label: str
    last: str  # the last value, for the legend
    path: str
    band: str  # the path of the interval or range; empty without one
    dots: list[Dot]
    visible: bool  # the dots; else they only answer the pointer


@dataclass(frozen=True)
class Tick:
    at: str
    text: str


@dataclass(frozen=True)
class Chart:
    """Everything that the template draws."""

    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    rules: list[Tick]  # horizontal, with a word: "start"
    marks: list[Dot]  # vertical: events
    summary: str  # read aloud in place of the picture
    notes: list[str]


@dataclass(frozen=True)
class Level:
    """A value that a row is compared with. kind: its class in the style of the page."""

    kind: str
    value: float


@dataclass(frozen=True)
class LevelMark:
    kind: str
    at: str  # per cent of the width
    title: str  # on hover


@dataclass(frozen=True)
class IntervalRow:
    """One row of interval_rows: a mean with its interval on a scale from 0 to 1."""

    label: str
    text: str
    at: str  # all three in per cent of the width
    low: str
    width: str
    marks: list[LevelMark]


@dataclass(frozen=True)
class _Scale:
    """A range of values laid over a range of coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        fraction = (value - self.low) / (self.high - self.low)
        return self.start + fraction * (self.end - self.start)


def line_chart(
    series: Sequence[Series],
    *,
    last_step: int = 0,
    rules: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[int, str]] = (),
) -> Chart | None:
    """A chart of values over steps; None without a finite value. last_step: the axis goes at least
    so far. rules: (value, word) of horizontal lines. marks: (step, words) of events.
    """
    shown = [_thinned(s) for s in series]
    finite = [v for s in shown for v in _values(s) if math.isfinite(v)]
    if not finite:
        return None
    finite += [v for v, _ in rules]
    steps = [x for s in shown for x, _ in s.points]
    y_ticks = ticks(min(finite), max(finite))
    x_ticks = [t for t in ticks(min(steps), max(*steps, last_step), 5) if t == int(t)]
    x_range = min(*steps, x_ticks[0]), max(*steps, *x_ticks, last_step)
    x = _Scale(x_range[0], max(x_range[1], x_range[0] + 1), LEFT, WIDTH - RIGHT)
    y = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    return Chart(
        lines=[_line(s, x, y) for s in shown],
        x_ticks=[Tick(f"{x(t):.1f}", f"{int(t):,}") for t in x_ticks],
        y_ticks=[Tick(f"{y(t):.1f}", number(t)) for t in y_ticks],
        rules=[Tick(f"{y(value):.1f}", word) for value, word in rules],
        marks=[Dot(f"{x(step):.1f}", "", words) for step, words in marks if step >= x_range[0]],
        summary="; ".join(_in_words(s) for s in series),
        notes=_notes(series),
    )


def interval_rows(
    rows: Sequence[tuple[str, float, float, float]],
    levels: Mapping[str, Sequence[Level]] = MappingProxyType({}),
) -> list[IntervalRow]:
    """(label, mean, low, high) of fractions. levels: label -> what to draw beside its mean."""
    return [
        IntervalRow(
            label,
            f"{mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if math.isfinite(low + high) else ""),
            f"{100 * _clipped(mean):.2f}",
            f"{100 * _clipped(low):.2f}",
            f"{100 * (_clipped(high) - _clipped(low)):.2f}",
            [_mark(level) for level in levels.get(label, ())],
        )
        for label, mean, low, high in rows
    ]


def _mark(level: Level) -> LevelMark:
    at = f"{100 * _clipped(level.value):.2f}"
    return LevelMark(level.kind, at, f"{level.kind} {level.value:.3f}")


def _clipped(x: float) -> float:
    return min(max(x, 0.0), 1.0) if math.isfinite(x) else 0.0


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round values, 1, 2 or 5 times a power of ten apart, from at or below `low` to at or above
    `high`.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: room around it
        low, high = (0, 1) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    digits = 2 - math.floor(math.log10(distance))  # 0.30000000000000004 is 0.3
    return [round(i * distance, digits) for i in range(first, last + 1)]


def number(x: float) -> str:
    """Three digits: 0.0123, 1.5, 12,300, 1.2e-05."""
    if not math.isfinite(x):
        return {math.inf: "infinity", -math.inf: "-infinity"}.get(x, "NaN")
    if x and not 1e-3 <= abs(x) < 1e6:
        return f"{x:.3g}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _values(s: Series) -> list[float]:
    return [v for _, v in s.points] + list(s.low) + list(s.high)


def _thinned(s: Series) -> Series:
    """At most MOST_POINTS: means of bins, with the range of each bin as the band."""
    size = -(-len(s.points) // MOST_POINTS)
    if size <= 1:
        return s
    points, low, high = [], [], []
    for start in range(0, len(s.points), size):
        part = s.points[start : start + size]
        values = [v for _, v in part if math.isfinite(v)]
        points.append((part[-1][0], sum(values) / len(values) if values else math.nan))
        low.append(min(values, default=math.nan))
        high.append(max(values, default=math.nan))
    return Series(s.label, points, low, high)


def _line(s: Series, x: _Scale, y: _Scale) -> Line:
    runs: list[list[int]] = [[]]  # a value that is not finite leaves a gap
    for i, (_, value) in enumerate(s.points):
        if math.isfinite(value):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    found = [run for run in runs if run]
    last = s.points[found[-1][-1]][1] if found else math.nan
    return Line(
        label=s.label,
        last=number(last),
        path="".join(_path([(x(s.points[i][0]), y(s.points[i][1])) for i in r]) for r in found),
        band="".join(_band(s, run, x, y) for run in found) if s.low else "",
        dots=[_dot(s, i, x, y) for run in found for i in run],
        visible=len(s.points) <= FEW_POINTS,
    )


def _path(points: Sequence[Point]) -> str:
    """h0: a line of one point shows as a dot of the line's width."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "h0"


def _band(s: Series, run: Sequence[int], x: _Scale, y: _Scale) -> str:
    known = [i for i in run if math.isfinite(s.low[i]) and math.isfinite(s.high[i])]
    up = [(x(s.points[i][0]), y(s.high[i])) for i in known]
    down = [(x(s.points[i][0]), y(s.low[i])) for i in reversed(known)]
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in up + down) + "Z" if known else ""


def _dot(s: Series, i: int, x: _Scale, y: _Scale) -> Dot:
    step, value = s.points[i]
    between = ""
    if s.low and math.isfinite(s.low[i]) and math.isfinite(s.high[i]):
        between = f" [{number(s.low[i])}, {number(s.high[i])}]"
    title = f"step {step:,.0f}, {s.label}: {number(value)}{between}"
    return Dot(f"{x(step):.1f}", f"{y(value):.1f}", title)


def _in_words(s: Series) -> str:
    values = [v for _, v in s.points if math.isfinite(v)]
    if not values:
        return f"{s.label}: no finite value"
    ends = f"from {number(values[0])} to {number(values[-1])}"
    return f"{s.label} {ends}, between {number(min(values))} and {number(max(values))}"


def _notes(series: Sequence[Series]) -> list[str]:
    notes = []
    for s in series:
        bad = sum(not math.isfinite(v) for _, v in s.points)
        if bad:
            notes.append(f"{bad} of {len(s.points)} values of {s.label} are not finite: gaps")
        if len(s.points) > MOST_POINTS:
            size = -(-len(s.points) // MOST_POINTS)
            notes.append(f"{s.label}: means of {size} steps; the band is their range")
    return notes
