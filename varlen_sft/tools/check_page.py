"""The page of ``varlen-sft check``: the verdict, and where in the model the errors are."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varlen_sft.tools.check_page_routes import routes_section
from varlen_sft.tools.page import Html, Series, details, document, line_chart, section, table, tag

__all__ = ["write_check_page"]

SIGNS = {"pass": "\u2713 pass", "fail": "\u2717 fail", "note": "\u2022 note"}
CELLS = 256  # of the longest conversation: narrower cells could not be seen
SHADES = 8  # half decades of error / bound below 1
STYLE = """
:root { --c0: #e6effa; --c1: #cfe0f5; --c2: #b3cdee; --c3: #91b6e4; --c4: #6c9cd8; --c5: #4880c7;
  --c6: #2a63ad; --c7: #12468c; --zero: #fff; --over: #e0142f; --wrong: #000; }
@media (prefers-color-scheme: dark) { :root { --c0: #1d2b3d; --c1: #22374f; --c2: #284564;
  --c3: #30567d; --c4: #3c6d9c; --c5: #5089bf; --c6: #72a9de; --c7: #a3ccf7; --zero: #14171b;
  --over: #ff5a6a; --wrong: #fff; } }
.strips { display: grid; grid-template-columns: max-content 1fr max-content; gap: 3px 10px;
  align-items: center; font-size: .8rem; }
.strip { height: 14px; display: block; outline: 1px solid var(--line); }
.key { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: .8rem; margin: 8px 0 12px; }
.key svg { width: 16px; height: 12px; outline: 1px solid var(--line); vertical-align: middle; }
thead th { white-space: nowrap; }
.detail { min-width: 15rem; }
.verdict { font-size: 1.3rem; font-weight: 700; }
""" + "".join(
    f".{name} {{ fill: var(--{name}); }}\n"
    for name in (*(f"c{k}" for k in range(SHADES)), "zero", "over", "wrong")
)


def write_check_page(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        result: ``model`` (a folder, of which the last part is shown), ``dtype``,
            ``environment``, ``conversations``, ``tokens``; ``findings``: property, worst, bound
            (floats or None), verdict ("pass", "fail" or "note"), detail; ``routes``: name, figures
            (error and bound by name), norms; ``layers``: name, ours, hf, bound; ``positions``:
            conversation, errors (a list, one per position), bound.

    Raises:
        KeyError: an unknown verdict, or something is left out.
    """
    name = Path(result["model"]).name or result["model"]
    title = f"varlen_sft check: {name}, {result['dtype']}"
    body = [
        tag("h1", title),
        _verdict(result["findings"]),
        _extent(result),
        section("Findings", _findings(result["findings"])),
        section("Ways to compute", *routes_section(result["routes"])),
        section("Error per layer", *_layers(result["layers"])),
        section("Error per position", *_positions(result["positions"])),
        section("How it was measured", details("Machine and versions", result["environment"])),
    ]
    Path(path).write_text(document(title, body, STYLE), encoding="utf-8", newline="\n")


def _verdict(findings: Sequence[Mapping[str, Any]]) -> Html:
    count = {verdict: sum(f["verdict"] == verdict for f in findings) for verdict in SIGNS}
    judged = count["pass"] + count["fail"]
    if count["fail"]:
        verdict, text = "fail", f"\u2717 {count['fail']} of {judged} properties do not hold"
    elif judged:
        verdict, text = "pass", f"\u2713 All {judged} properties hold"
    else:
        verdict, text = "note", "\u2022 No property was judged"
    look = {"fail": "verdict bad", "pass": "verdict good", "note": "verdict"}[verdict]
    return tag("p", text, class_=look, data_field="verdict", data_value=verdict)


def _extent(result: Mapping[str, Any]) -> Html:
    text = f"{result['conversations']:,} conversations, {result['tokens']:,} tokens"
    data = {"data_conversations": result["conversations"], "data_tokens": result["tokens"]}
    date = result["environment"].get("date")
    return tag("p", text, f" \u00b7 {date}" if date else "", class_="dim", **data)


def _findings(findings: Sequence[Mapping[str, Any]]) -> Html:
    rows = []
    for finding in findings:
        worst, bound, verdict = finding["worst"], finding["bound"], finding["verdict"]
        share = "" if worst is None or bound is None else f"{_share(worst, bound):.2g}"
        look = {"fail": "bad", "pass": "good", "note": None}[verdict]
        name = {"data_property": finding["property"]}
        rows.append(
            [
                tag("th", finding["property"], scope="row"),
                tag("td", SIGNS[verdict], class_=look, data_verdict=verdict, **name),
                _number(worst, data_field="worst", **name),
                _number(bound, data_field="bound", **name),
                share,
                tag("td", finding["detail"], class_="detail"),
            ]
        )
    return table(["property", "verdict", "worst", "bound", "worst / bound", "detail"], rows)


def _number(value: float | None, **data: str) -> Html:
    return tag("td", "" if value is None else f"{value:.2e}", data_value=value, **data)


# -------------------------------------------------------------------- layers


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[Html]:
    if not layers:
        return [tag("p", "Not measured.")]
    lines = [
        Series("ours", "layer_ours", [layer["ours"] for layer in layers], "a"),
        Series("Hugging Face", "layer_hf", [layer["hf"] for layer in layers], "b"),
        Series("bound", "layer_bound", [layer["bound"] for layer in layers], "limit"),
    ]
    names = [layer["name"] for layer in layers]
    x = range(len(layers))
    chart = line_chart(
        "Relative L2 error after each layer", x, lines, x_label="layer", log=True, names=names
    )
    rows = [
        [number, layer["name"], *(f"{layer[key]:.2e}" for key in ("ours", "hf", "bound"))]
        for number, layer in enumerate(layers)
    ]
    head = ["layer", "name", "ours", "Hugging Face", "bound"]
    return [chart, tag("details", tag("summary", "The same in numbers"), table(head, rows))]


# ----------------------------------------------------------------- positions


def _positions(positions: Sequence[Mapping[str, Any]]) -> list[Html]:
    longest = max((len(row["errors"]) for row in positions), default=0)
    if not longest:
        return [tag("p", "Not measured.")]
    width = -(-longest // CELLS)
    drawn: list[Html] = []
    for row in positions:
        drawn += _strip(row, width, longest)
    text = (
        "One row per conversation, position 0 on the left; on the right its worst error as a share "
        "of the bound, and the position of one that does not keep it."
    )
    if width > 1:
        text += f" A cell is the worst of {width} positions."
    what = tag("p", text, " Hover for values.", class_="dim")
    return [what, _key(), tag("div", *drawn, class_="strips")]


def _strip(row: Mapping[str, Any], width: int, longest: int) -> list[Html]:
    """Name, strip and worst share of one conversation."""
    errors, bound = row["errors"], row["bound"]
    starts = range(0, len(errors), width)
    cells = [
        _cell(column, start, errors[start : start + width], bound)
        for column, start in enumerate(starts)
    ]
    value = _worst(errors) if errors else 0.0
    share = _share(value, bound)
    holds = share <= 1
    size = {
        "viewBox": f"0 0 {max(1, len(cells))} 1",
        "preserveAspectRatio": "none",
        "style": f"width:{len(cells) / -(-longest // width):.2%}",
    }
    data = {"data_conversation": row["conversation"], "data_share": share}
    strip = tag("svg", *cells, class_="strip", **size, **data)
    text = f"{share:.2g} of bound" if holds else f"\u2717 {share:.2g} at {errors.index(value)}"
    worst = tag("span", text, class_=None if holds else "bad")
    return [tag("span", row["conversation"]), strip, worst]


def _cell(column: int, start: int, errors: Sequence[float], bound: float) -> Html:
    value = _worst(errors)
    share = _share(value, bound)
    last = start + len(errors) - 1
    where = f"position {start}" if last == start else f"worst of positions {start} to {last}"
    title = tag("title", f"{where}: {value:.3g}, {share:.2g} of bound")
    # A little wider than its place: no seam shows between neighbours.
    box = {"x": column, "y": 0, "width": 1.04, "height": 1}
    return tag("rect", title, **box, class_=_shade(share), data_pos=start, data_value=value)


def _worst(errors: Sequence[float]) -> float:
    """The largest; nan if there is one, which max would pass over."""
    return next((error for error in errors if math.isnan(error)), max(errors))


def _share(value: float, bound: float) -> float:
    """Of the bound; a bound of 0 is kept by 0 alone."""
    return value / bound if bound else math.inf * value if value else 0.0


def _shade(share: float) -> str:
    if math.isnan(share):
        return "wrong"
    if share > 1:
        return "over"
    if share <= 0:
        return "zero"
    return f"c{max(0, min(SHADES - 1, SHADES + math.ceil(2 * math.log10(share)) - 1))}"


def _key() -> Html:
    """What each colour means, in shares of the bound."""
    texts = {"zero": "exactly 0", "c0": f"up to {10 ** (-(SHADES - 1) / 2):.1g}"}
    for number in range(1, SHADES):
        texts[f"c{number}"] = f"to {10 ** (-(SHADES - 1 - number) / 2):.2g}"
    texts |= {"over": "over the bound", "wrong": "not a number"}
    swatches = []
    for name, text in texts.items():
        box = tag("rect", width=16, height=12, class_=name)
        swatches.append(tag("span", tag("svg", box, viewBox="0 0 16 12"), f" {text}"))
    return tag("div", tag("span", "error / bound:"), *swatches, class_="key")
