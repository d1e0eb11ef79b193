"""Curves as inline SVG.

A plot is drawn in percent of its size, so that it fits every width while its texts keep theirs. The lines are in an
inner SVG that is stretched, with strokes that are not. `page.js` adds a cursor that shows the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np

from ldm.files.documents import json_text
from ldm.training.report.markup import Markup, joined, raw, tag

MOST_POINTS = 600  # of a line, about two for a pixel on a phone
MOST_ROWS = 25  # of the table below a chart
COLORS = 8  # that page.css has
SIZE = 1000.0  # width and height that the inner SVG counts in
MARGIN = 0.05  # of the range above and below the curves
OUTLIERS = 0.5  # percent of the values of a faint line that may be above the plot


class Series(NamedTuple):
    """A curve."""

    name: str
    x: np.ndarray  # (N,) steps
    y: np.ndarray  # (N,)
    color: int = 0
    faint: bool = False  # single values behind their mean: they may reach beyond the plot
    dashed: bool = False


class Mark(NamedTuple):
    """A vertical line at a step."""

    step: int
    text: str


class Chart(NamedTuple):
    """Curves over the steps, with the same axes."""

    title: str
    summary: str  # what the curves show, in one or two sentences
    series: Sequence[Series]
    log: bool = False
    marks: Sequence[Mark] = ()
    small: bool = False  # one of several beside each other
    end: Optional[int] = None  # the last step of the axis; None: of the curves


class _Axes(NamedTuple):
    """The ranges of a plot."""

    first: float
    last: float
    low: float
    high: float
    log: bool

    def across(self, step: float) -> float:
        """Return where a step is, from 0 to 1."""
        return (step - self.first) / (self.last - self.first)

    def down(self, values: np.ndarray) -> np.ndarray:
        """Return where values are, from 0 at the top to 1 at the bottom."""
        low, high = self.low, self.high
        if self.log:
            low, high, values = math.log10(low), math.log10(high), np.log10(np.maximum(values, self.low * 1e-3))
        return (high - values) / (high - low)


def draw(chart: Chart, identifier: str) -> Markup:
    """Return a chart as a figure: title, summary, legend, plot, and a table of some of its values.

    Args:
        chart: What is drawn. Values that are not finite leave gaps.
        identifier: Of the figure, which no other has.
    """
    shown = [series for series in chart.series if np.isfinite(series.y).any()]
    if not shown:
        return joined()
    axes = _axes(chart, shown)
    thinned = [_thin(series) for series in shown]
    title = f"{identifier}-title"
    heading = "h4" if chart.small else "h3"
    return tag(
        "figure",
        tag("figcaption", tag(heading, chart.title, id=title), tag("p", chart.summary) if chart.summary else None),
        _legend(shown),
        tag(
            "div",
            tag(
                "div", _plot(axes, thinned, chart.marks), class_="plot", role="img",
                aria_label=f"{chart.title}: {chart.summary}", data_label=chart.title,
            ),
            class_="frame",
        ),
        _data(axes, thinned),
        _table(chart, shown),
        id=identifier,
        class_="chart small" if chart.small else "chart",
        aria_labelledby=title,
    )  # fmt: skip


def _axes(chart: Chart, shown: Sequence[Series]) -> _Axes:
    first = float(min(series.x[0] for series in shown))
    last = float(max(series.x[-1] for series in shown))
    last = max(last, float(chart.end or 0), first + 1)
    values = np.concatenate([_bounds(series, chart.log) for series in shown])
    values = values[np.isfinite(values) & ((values > 0) | (not chart.log))]
    low, high = (float(values.min()), float(values.max())) if len(values) else (1.0, 2.0)
    if chart.log:
        if high / low < 1.5:
            low, high = low / 2, high * 2
        widen = (high / low) ** MARGIN
        return _Axes(first, last, low / widen, high * widen, True)
    if high - low <= 1e-9 * abs(high):  # a level line stands in the middle, above zero
        low, high = (0.0, 2 * high) if high > 0 else (2 * high, 0.0) if high < 0 else (-1.0, 1.0)
        return _Axes(first, last, low, high, False)
    margin = MARGIN * (high - low)
    # Zero is shown where it is not far below the curves.
    low = 0.0 if 0 <= low <= 0.35 * high else low - margin
    return _Axes(first, last, low, high + margin, False)


def _bounds(series: Series, log: bool) -> np.ndarray:
    """Return the least and the largest value of a curve that must be on the plot."""
    finite = series.y[np.isfinite(series.y)]
    if log:
        finite = finite[finite > 0]
    if not len(finite):
        return np.zeros(0)
    if series.faint and len(finite) >= 100:
        return np.percentile(finite, [OUTLIERS, 100 - OUTLIERS])
    return np.array([finite.min(), finite.max()])


def _thin(series: Series) -> Series:
    """Return at most MOST_POINTS points of a curve.

    Of single values, the least and the largest of each stretch are kept, so that no peak is lost. Of a mean, the last
    value of each stretch is.
    """
    count = len(series.x)
    if count <= MOST_POINTS:
        return series
    edges = np.linspace(0, count, MOST_POINTS + 1).astype(int) if not series.faint else None
    if edges is not None:
        places = np.unique(np.append(0, edges[1:] - 1))
    else:
        ends = np.linspace(0, count, MOST_POINTS // 2 + 1).astype(int)
        values = np.where(np.isfinite(series.y), series.y, -np.inf)
        least = np.where(np.isfinite(series.y), series.y, np.inf)
        places = np.array(
            sorted(
                {
                    start + int(part(array[start:end]))
                    for start, end in zip(ends, ends[1:])
                    for part, array in ((np.argmax, values), (np.argmin, least))
                }
                | {0, count - 1}
            )
        )
    return series._replace(x=series.x[places], y=series.y[places])


# ---- the plot --------------------------------------------------------------------------------------------------------


def _plot(axes: _Axes, shown: Sequence[Series], marks: Sequence[Mark]) -> Markup:
    pieces = [_grid(axes)]
    lines = [tag("path", d=_path(axes, series), class_=_line_class(series)) for series in shown if len(series.x) > 1]
    inner = f"0 0 {SIZE:g} {SIZE:g}"
    pieces.append(tag("svg", lines, viewBox=inner, preserveAspectRatio="none", width="100%", height="100%"))
    for series in shown:
        if len(series.x) <= 40 and not series.faint:
            pieces += _dots(axes, series)
    for mark in marks:
        if axes.first <= mark.step <= axes.last:
            at = _percent(axes.across(mark.step))
            anchor = "end" if axes.across(mark.step) > 0.5 else "start"
            pieces.append(tag("line", x1=at, x2=at, y1="0", y2="100%", class_="mark"))
            if mark.text:
                shift = -5 if anchor == "end" else 5
                pieces.append(
                    tag("text", mark.text, x=at, y="0", dx=shift, dy="1em", text_anchor=anchor, class_="mark")
                )
    return tag("svg", pieces, width="100%", height="100%", aria_hidden="true", focusable="false")


def _grid(axes: _Axes) -> Markup:
    pieces = []
    for value, text in value_ticks(axes.low, axes.high, axes.log):
        at = _percent(float(axes.down(np.array([value]))[0]))
        pieces.append(tag("line", x1="0", x2="100%", y1=at, y2=at, class_="grid"))
        pieces.append(tag("text", text, x="0", y=at, dx="-7", dy=".32em", text_anchor="end"))
    for step in step_ticks(axes.first, axes.last):
        at = _percent(axes.across(step))
        pieces.append(tag("line", x1=at, x2=at, y1="100%", y2="100%", class_="tick"))
        pieces.append(tag("text", f"{step:,}", x=at, y="100%", dy="1.5em", text_anchor="middle"))
    pieces.append(tag("line", x1="0", x2="100%", y1="100%", y2="100%", class_="axis"))
    return joined(pieces)


def _path(axes: _Axes, series: Series) -> Markup:
    across = (series.x - axes.first) / (axes.last - axes.first) * SIZE
    down = axes.down(series.y) * SIZE
    pieces, pen_is_up = [], True
    for x, y in zip(across.tolist(), down.tolist()):
        if not math.isfinite(y):
            pen_is_up = True
            continue
        # A curve that leaves the plot is cut off by the inner SVG. Numbers far outside would be drawn wrongly.
        pieces.append(f"{'M' if pen_is_up else 'L'}{x:.1f} {min(max(y, -SIZE), 2 * SIZE):.1f}")
        pen_is_up = False
    return raw("".join(pieces))


def _dots(axes: _Axes, series: Series) -> list[Markup]:
    down = axes.down(series.y).tolist()
    return [
        tag("circle", cx=_percent(axes.across(x)), cy=_percent(y), r="3", class_=f"dot c{series.color % COLORS}")
        for x, y in zip(series.x.tolist(), down)
        if math.isfinite(y) and -0.01 <= y <= 1.01
    ]  # fmt: skip


def _line_class(series: Series) -> str:
    return f"curve c{series.color % COLORS}{' faint' * series.faint}{' dashed' * series.dashed}"


def _percent(part: float) -> str:
    return f"{100 * part:.2f}%"


def value_ticks(low: float, high: float, log: bool = False) -> list[tuple[float, str]]:
    """Return three to six round values between two, with their texts."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
            if len(values) <= 6:
                break
        values = values[:: math.ceil(len(values) / 6)] if values else []
        if len(values) >= 2:
            return [(value, number(value)) for value in values]
    unit = _round_unit((high - low) / 4)
    first, count = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
    values = [unit * place for place in range(first, count + 1)]
    decimals = max(0, -math.floor(math.log10(unit) + 1e-9))
    if max(abs(low), abs(high)) >= 0.001 and decimals <= 5 and max(abs(low), abs(high)) < 1e5:
        return [(value, f"{value:.{decimals}f}") for value in values]
    return [(value, number(value)) for value in values]


def step_ticks(first: float, last: float) -> list[int]:
    """Return three to six round steps between two."""
    unit = max(1, round(_round_unit((last - first) / 6)))
    return [step for step in range(math.ceil(first / unit) * unit, math.floor(last) + 1, unit)]


def _round_unit(least: float) -> float:
    """Return 1, 2 or 5 times a power of ten, the smallest that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def number(value: float) -> str:
    """Return a number with four significant digits, as short as it gets."""
    if not math.isfinite(value):
        return "not finite"
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, _, power = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    text = f"{value:.4g}"
    return f"{value:,.0f}" if "e" in text or abs(value) >= 1000 else text


# ---- values ----------------------------------------------------------------------------------------------------------


def _legend(shown: Sequence[Series]) -> Markup:
    items = [
        tag(
            "li",
            tag(
                "svg", tag("line", x1="0", x2="22", y1="6", y2="6", class_=_line_class(series)), width="22",
                height="12", aria_hidden="true",
            ),
            " ", series.name, " ", tag("span", "", class_="value"),
        )
        for series in shown
    ]  # fmt: skip
    return tag("ul", tag("li", tag("span", "", class_="step")), items, class_="legend")


def _data(axes: _Axes, shown: Sequence[Series]) -> Markup:
    """Return the values for the cursor, as JSON in which no text can end the element."""
    content = {
        "first": axes.first,
        "last": axes.last,
        "low": axes.low,
        "high": axes.high,
        "log": axes.log,
        "series": [
            {
                "name": series.name,
                "x": series.x.astype(int).tolist(),
                "y": [_short(value) for value in series.y.tolist()],
            }
            for series in shown
        ],
    }
    return tag("script", embedded_json(content), type="application/json")


def embedded_json(content: object) -> Markup:
    """Return JSON for a script element."""
    text = json_text(content)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return raw(text)


def _short(value: float) -> Optional[float]:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _table(chart: Chart, shown: Sequence[Series]) -> Markup:
    """Return some of the values as a table: of the first step, the last one, and evenly between them."""
    steps = np.unique(np.concatenate([series.x for series in shown]))
    if len(steps) > MOST_ROWS:
        steps = steps[np.unique(np.linspace(0, len(steps) - 1, MOST_ROWS).round().astype(int))]
    rows = []
    for step in steps.astype(int).tolist():
        cells = []
        for series in shown:
            place = int(np.searchsorted(series.x, step))
            known = place < len(series.x) and series.x[place] == step
            cells.append(tag("td", f"{series.y[place]:.6g}" if known and np.isfinite(series.y[place]) else "–"))
        rows.append(tag("tr", tag("th", f"{step}", scope="row"), cells))
    names = [tag("th", series.name, scope="col") for series in shown]
    table = tag(
        "table",
        tag("caption", f"{chart.title}, at {len(rows)} steps", class_="hidden"),
        tag("thead", tag("tr", tag("th", "step", scope="col"), names)),
        tag("tbody", rows),
    )
    box = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=f"Table: {chart.title}")
    return tag("details", tag("summary", "Values", tag("span", f" of {chart.title}", class_="hidden")), box)
