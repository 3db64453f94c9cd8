"""The page of ``varlen-sft show``: the text with what is trained, the pack, and every token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from varlen_sft.tools import pack_picture
from varlen_sft.tools.page import Html, document, section, table, tag
from varlen_sft.tools.show import Run, Shown, readable
from varlen_sft.tools.show_facts import facts

__all__ = ["write_show_page"]

STYLE = """
.read { white-space: pre-wrap; max-width: 100ch; font: 14px/1.6 ui-monospace, monospace; }
.read span { background: color-mix(in srgb, var(--role) 20%, var(--bg)); border-radius: 3px; }
.read .s { font-weight: 700; border-bottom: 3px solid var(--fg); }
.ruler { display: flex; overflow-x: auto; margin: 10px 0; font-size: .8rem;
  font-variant-numeric: tabular-nums; }
.ruler span { flex-basis: 0; min-width: 2px; overflow: hidden; white-space: nowrap;
  padding: 2px 0 2px 3px; border-left: 2px solid var(--fg); background: var(--card); }
.ruler span:nth-child(even) { background: color-mix(in srgb, var(--a) 24%, var(--bg)); }
.ruler small { display: block; }
.ruler b { border-left: 2px solid var(--fg); padding: 2px 0 2px 3px; align-self: end;
  font-weight: 400; color: var(--dim); }
.who { width: fit-content; }
.seen { display: block; width: 420px; max-width: 100%; height: auto; margin: 6px 0 0;
  background: var(--bg); outline: 1px solid var(--line); }
.seen polygon { fill: var(--a); } .seen polygon:nth-child(even) { fill: var(--b); }
dd { font-variant-numeric: tabular-nums; }
"""


def write_show_page(path: str | os.PathLike[str], shown: Shown) -> None:
    """Write the page; of the folders of file and model it tells nothing.

    Raises:
        OSError: it cannot be written.
    """
    told = facts(shown)
    told |= {name: Path(told[name]).name or told[name] for name in ("file", "model")}
    title = f"{told['file']}, " + next(f"{n} {told[n]}" for n in ("row", "rows") if n in told)
    pairs: list[Html] = []
    for name, value in told.items():
        pairs += tag("dt", name), tag("dd", value, data_field=name)
    body = [
        tag("h1", title),
        tag("dl", *pairs),
        *([_pack(shown)] if shown.is_pack else []),
        section("What is trained", *_texts(shown)),
        section("Token by token", tag("p", _how_to_read()), _tokens(shown)),
    ]
    page = document(f"varlen_sft show: {title}", body, pack_picture.STYLE + STYLE)
    Path(path).write_text(page, encoding="utf-8", newline="\n")


def _how_to_read() -> str:
    return (
        "Each row reads its token and learns its target, the token after it; the last token of a "
        "sequence is only a target. \u21b5 is a newline, \u00b7 a space, \ufffd a part of a "
        "character. Hover for ids and weights."
    )


def _tokens(shown: Shown) -> Html:
    return pack_picture.draw(shown.picture, shown.options.roles)


# ---------------------------------------------------------------------- text


def _texts(shown: Shown) -> list[Html]:
    drawn = [tag("p", "Bold and underlined: what the model learns to write.")]
    for number, (piece, runs) in enumerate(zip(shown.pieces, shown.runs, strict=True), 1):
        if shown.is_pack:
            drawn.append(tag("h3", f"sequence {number} ({piece.name})"))
        drawn.append(tag("div", *map(_run, runs), class_="pack read"))
    return drawn


def _run(run: Run) -> Html:
    return tag(
        "span",
        readable(run.text),
        class_=run.role + " s" * (run.weight > 0),
        title=f"{run.role}, weight {run.weight:g}",
        data_text=run.text,
        data_weight=run.weight,
    )


# ---------------------------------------------------------------------- pack


def _pack(shown: Shown) -> Html:
    edges = shown.picture.edges
    return section("The pack", _ruler(shown), _seen(edges), _sequences(shown))


def _ruler(shown: Shown) -> Html:
    """The sequences to scale; where each begins stands below its number."""
    edges = shown.picture.edges
    drawn = [
        tag(
            "span",
            number,
            tag("small", start),
            style=f"flex-grow:{end - start}",
            title=f"sequence {number} ({piece.name}): rows {start} to {end - 1}",
            data_start=start,
        )
        for number, (piece, (start, end)) in enumerate(
            zip(shown.pieces, pairwise(edges), strict=True), 1
        )
    ]
    return tag("div", *drawn, tag("b", edges[-1]), class_="ruler", aria_label="cu_seqlens")


def _seen(edges: Sequence[int]) -> Html:
    """Block-causal attention: a triangle of (key, query) for each sequence, drawn exactly."""
    total = edges[-1]
    triangles = [
        tag(
            "polygon",
            tag("title", f"sequence {number}: {(b - a) * (b - a + 1) // 2:,} pairs"),
            points=f"{a},{a} {a},{b} {b},{b}",
        )
        for number, (a, b) in enumerate(pairwise(edges), 1)
    ]
    image = tag("svg", *triangles, viewBox=f"0 0 {total} {total}", class_="seen", role="img",
                aria_label="block-causal attention")  # fmt: skip
    caption = "Who sees whom: queries from top to bottom, keys from left to right"
    return tag("figure", tag("figcaption", caption), image, class_="who")


def _sequences(shown: Shown) -> Html:
    labels = shown.picture.labels
    rows = [
        [number, piece.name, start, end, end - start, sum(x >= 0 for x in labels[start:end])]
        for number, (piece, (start, end)) in enumerate(
            zip(shown.pieces, pairwise(shown.picture.edges), strict=True), 1
        )
    ]
    head = ["sequence", "from", "start", "end", "tokens", "supervised"]
    return tag("details", tag("summary", "The same in numbers"), table(head, rows))
