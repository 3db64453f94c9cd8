"""Pages in one file: escaped by default, no script, nothing loaded, light and dark; line charts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = ["Html", "Series", "details", "document", "line_chart", "section", "table", "tag"]

# Scripts and every request are refused by the browser itself, whatever a conversation may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --dim: #5a6472; --line: #d5dae0;
  --card: #f5f7f9; --a: #0b62c4; --b: #b0480a; --bad: #c2172b; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --fg: #e4e8ec; --dim: #9aa5b1;
  --line: #363d46; --card: #1d2228; --a: #6cb0ff; --b: #f0a35e; --bad: #ff7b83; --good: #56d364; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1360px; padding: 16px; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { margin: .5rem 0; max-width: 75ch; }
.dim, small, dt { color: var(--dim); }
.bad { color: var(--bad); } .good { color: var(--good); }
.warning { border-left: 4px solid var(--bad); padding: .4rem .8rem; background: var(--card); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th { font-weight: 600; }
td small { display: block; white-space: nowrap; }
.columns { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%,
  420px), 1fr)); }
figure { margin: 0; padding: 10px; max-width: 740px; background: var(--card); border-radius: 8px; }
figcaption { font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(5.5rem, max-content) 1fr; gap: .3rem 1rem; }
dd { margin: 0; white-space: pre-wrap; }
summary { cursor: pointer; }
svg.chart { display: block; width: 100%; max-width: 720px; height: auto; }
.chart text { font-size: 11px; fill: var(--fg); }
.chart .grid { stroke: var(--line); }
.chart polyline { fill: none; stroke-width: 2; }
.chart .a { stroke: var(--a); } .chart circle.a { fill: var(--a); }
.chart .b { stroke: var(--b); stroke-dasharray: 5 3; } .chart circle.b { fill: var(--card);
  stroke-dasharray: none; }
.chart .limit { stroke: var(--bad); stroke-dasharray: 2 3; } .chart circle.limit { opacity: 0; }
.chart circle.wrong { stroke: var(--bad); fill: none; stroke-width: 3; }
@media (max-width: 600px) { body { padding: 12px; } .chart text { font-size: 14px; }
  th, td { padding-right: .6rem; } }
"""
VOID = {"input", "meta"}


class Html(str):
    """Text that is markup already. Every other string is escaped when it is put into a tag."""


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """An element; attributes ``class_`` and ``data_value`` are written class and data-value.

    An attribute that is None is left out, content that is not Html is escaped.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(part if isinstance(part, Html) else escape(str(part)) for part in content)
    return Html(f"<{name}{written}>" + ("" if name in VOID else f"{inner}</{name}>"))


def document(title: str, body: Iterable[Html], style: str = "") -> str:
    """A whole page that needs no other file."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE + style)),
    )
    content = Html("\n".join(body))
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', content), lang='en')}\n"


def section(title: str, *content: object) -> Html:
    return tag("section", tag("h2", title), *content)


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table that scrolls in its own box. A cell that is a whole element is kept as it is."""

    def cell(value: object) -> Html:
        return (
            value if isinstance(value, Html) and value[:3] in ("<td", "<th") else tag("td", value)
        )

    heads = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head)))
    body = tag("tbody", *(tag("tr", *map(cell, row)) for row in rows))
    return tag("div", tag("table", heads, body), class_="scroll")


def details(title: str, values: Mapping[str, Any]) -> Html:
    """A closed list of names and values; mappings inside it are spelled out."""
    pairs: list[Html] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {text}" for key, text in value.items())
        pairs += tag("dt", name.replace("_", " ")), tag("dd", value)
    return tag("details", tag("summary", title), tag("dl", *pairs))


# -------------------------------------------------------------------- charts

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 466, 30, 234


@dataclass(frozen=True)
class Series:
    """One line: a value for each x. ``field`` names the values for whoever reads the page."""

    name: str
    field: str
    values: Sequence[float]
    look: str = "a"  # "a" solid, "b" dashed with hollow points, "limit" dotted without points
    x: Sequence[float] | None = None  # of its values, where they are not the chart's


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: list[tuple[float, str]]
    log: bool = False

    def at(self, value: float, start: float, end: float) -> float:
        """Where a value is drawn; what has no logarithm lies on the low end, nan on the high."""
        if self.log:
            value = math.log10(value) if value > 0 else (self.low if value == 0 else self.high)
        value = min(max(value, self.low), self.high) if math.isfinite(value) else self.high
        return start + (end - start) * (value - self.low) / (self.high - self.low)


def _linear(values: Sequence[float], from_zero: bool = False, whole: bool = False) -> _Axis:
    """An axis whose ticks are 1, 2 or 5 times a power of ten apart."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = (min(0.0, *finite, 0.0) if from_zero else min(finite)), max(finite)
    high = high if high > low else low + (1.0 if whole else abs(low) or 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Long numbers would not fit beside the chart.
    unit, letter = (1e6, "M") if high >= 1e6 else (1e3, "k") if high >= 1e5 else (1, "")
    ticks = [
        (k * step, f"{k * step / unit:,.10g}{letter * (k != 0)}") for k in range(first, last + 1)
    ]
    if whole:  # the ends are points of the line: no empty room beside them
        return _Axis(low, high, [tick for tick in ticks if low <= tick[0] <= high])
    return _Axis(first * step, last * step, ticks)


def _logarithmic(values: Sequence[float]) -> _Axis:
    """Decades; exact zeros get a tick of their own below the lowest of them."""
    positive = [math.log10(v) for v in values if v > 0 and math.isfinite(v)] or [0.0]
    low, high = math.floor(min(positive)), math.ceil(max(positive))
    high = max(high, low + 1)
    every = -(-(high - low) // 7)
    ticks = [(float(k), f"1e{k}") for k in range(low, high + 1, every)]
    if any(value == 0 for value in values):
        low -= 1
        ticks = [(float(low), "0"), *ticks]
    return _Axis(low, high, ticks, log=True)


def line_chart(
    caption: str,
    x: Sequence[float],
    series: Sequence[Series],
    *,
    x_label: str,
    log: bool = False,
    from_zero: bool = False,
    names: Sequence[str] | None = None,
) -> Html:
    """A figure with lines over whole-numbered x.

    Args:
        caption: what is drawn, with its unit.
        x: at least one, rising.
        series: lines; values that are not finite are marked at the upper end.
        x_label: what x counts.
        log: decades for the values.
        from_zero: the axis of the values begins at 0.
        names: of the points, for their hover text; ``x_label`` and x where None.
    """
    values = [value for line in series for value in line.values]
    places = [x if line.x is None else line.x for line in series]
    across = _linear([place for own in places for place in own], whole=True)
    up = _logarithmic(values) if log else _linear(values, from_zero)
    lines = []
    for line, own in zip(series, places, strict=True):
        told = names if names and own is x else [f"{x_label} {place:.9g}" for place in own]
        lines.append(_line(line, own, told, across, up))
    drawn = [*_grid(across, up, x_label), *lines, *_legend(series)]
    size = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "class_": "chart"}
    image = tag("svg", *drawn, **size, role="img", aria_label=caption)
    return tag("figure", tag("figcaption", caption), image)


def _grid(across: _Axis, up: _Axis, x_label: str) -> list[Html]:
    drawn = []
    for tick, text in up.ticks:
        y = BOTTOM + (TOP - BOTTOM) * (tick - up.low) / (up.high - up.low)
        drawn.append(tag("line", x1=LEFT, x2=RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        drawn.append(tag("text", text, x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    for tick, text in across.ticks:
        x = min(across.at(tick, LEFT, RIGHT), WIDTH - 4.0 * len(text))  # not over the edge
        drawn.append(tag("text", text, x=f"{x:.1f}", y=BOTTOM + 18, text_anchor="middle"))
    middle = (LEFT + RIGHT) / 2
    return [*drawn, tag("text", x_label, x=middle, y=HEIGHT - 6, text_anchor="middle")]


def _line(line: Series, x: Sequence[float], names: Sequence[str], across: _Axis, up: _Axis) -> Html:
    places = [
        (f"{across.at(a, LEFT, RIGHT):.1f}", f"{up.at(value, BOTTOM, TOP):.1f}")
        for a, value in zip(x, line.values, strict=True)
    ]
    points = []
    for (left, top), a, value, name in zip(places, x, line.values, names, strict=True):
        title = tag("title", f"{name}: {line.name} {value:.4g}")
        look = line.look if math.isfinite(value) else "wrong"
        data = {"data_field": line.field, "data_x": a, "data_value": value}
        points.append(tag("circle", title, cx=left, cy=top, r=2.5, class_=look, **data))
    path = " ".join(",".join(place) for place in places)
    return tag("g", tag("polyline", points=path, class_=line.look), *points)


def _legend(series: Sequence[Series]) -> list[Html]:
    drawn, left = [], LEFT
    for line in series:
        place = f"{left},12 {left + 22},12"
        drawn.append(tag("polyline", points=place, class_=line.look))
        drawn.append(tag("text", line.name, x=left + 28, y=16))
        left += 44 + 8 * len(line.name)  # wide enough for the larger letters of a narrow screen
    return drawn
