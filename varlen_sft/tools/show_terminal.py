"""The screen of ``varlen-sft show``. Colours help; brackets and columns say the same without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from varlen_sft.data.sample import ROLES
from varlen_sft.tools.pack_picture import visible
from varlen_sft.tools.show import Run, Shown, readable
from varlen_sft.tools.show_facts import facts

__all__ = ["attention_grid", "header", "ruler", "screen"]

STYLES = {
    "none": "dim",
    "system": "magenta",
    "user": "blue",
    "assistant": "green",
    "tool": "yellow",
}
OPEN, CLOSE = "\u27e6", "\u27e7"
LEFT_OUT = "\u2026"
PART = "\ufffd"
AT_ONCE = 500  # lines of the table: printing them one by one is slow
WIDEST = 40  # cells of a token in the table
CELLS = 32  # rows and columns of the picture of a pack
MARKS = {"all": "\u2588\u2588", "some": "\u2592\u2592", "none": "\u00b7\u00b7"}
HEAD = ("sequence", "position", "token", "id", "role", "weight", "label", "learns")
RIGHT = {"sequence", "position", "id", "weight", "label"}  # numbers end where their column ends


def screen(console: Console, shown: Shown) -> None:
    """Everything: what it comes to, the pack if it is one, the text, and every token."""
    header(console, shown)
    if shown.is_pack:
        _pack(console, shown.picture.edges)
    _text(console, shown)
    _table(console, shown)


def header(console: Console, shown: Shown) -> None:
    """A line per fact."""
    told = facts(shown)
    width = max(map(len, told)) + 2
    for name, value in told.items():
        _print(console, Text.assemble((name.ljust(width), "bold"), value))


def _print(console: Console, *lines: Text) -> None:
    # Unbroken: what is copied from the screen is what was shown.
    console.print(*lines, sep="\n", soft_wrap=True)


# ---------------------------------------------------------------------- text


def _text(console: Console, shown: Shown) -> None:
    roles = shown.options.roles
    legend = Text.assemble("\n", (f"{OPEN} {CLOSE}", "bold"), " is trained; ")
    legend.append(Text(", ").join(Text(role, STYLES[role]) for role in roles or ROLES))
    if roles:
        legend.append(f"; {LEFT_OUT} is left out")
    _print(console, legend)
    for number, (piece, runs) in enumerate(zip(shown.pieces, shown.runs, strict=True), 1):
        if shown.is_pack:
            _print(console, Text(f"sequence {number} ({piece.name})", "bold"))
        _print(console, _reading(runs, roles))


def _reading(runs: Sequence[Run], roles: Sequence[str]) -> Text:
    """The text of a sample, what is trained in brackets, with its weight where that is not 1."""
    text, before = Text(), 0.0
    for run in runs:
        left_out = bool(roles) and run.role not in roles
        weight = 0.0 if left_out else run.weight
        if weight != before:
            text.append(_bracket(before, weight), "bold")
        if not left_out:
            text.append(readable(run.text), STYLES[run.role] + " bold underline" * (weight > 0))
        elif not text.plain.endswith(LEFT_OUT + "\n"):
            text.append(LEFT_OUT + "\n")
        before = weight
    text.append(_bracket(before, 0.0), "bold")
    text.rstrip()
    return text


def _bracket(before: float, weight: float) -> str:
    """What stands between tokens of two weights."""
    named = f"{weight:g}: " if weight not in (0, 1) else ""
    return CLOSE * (before > 0) + (OPEN + named) * (weight > 0)


# --------------------------------------------------------------------- table


@dataclass(frozen=True)
class _Line:
    cells: tuple[str, ...]  # one for each of HEAD
    role: str
    trained: bool


def _table(console: Console, shown: Shown) -> None:
    """A line per row of the batch, and one for each last token, which is no row."""
    lines = list(_lines(shown))
    cells = [HEAD, *(line.cells for line in lines)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    what = "\nEach row reads `token` and learns the label, the token after it."
    if any(PART in line.cells[HEAD.index("token")] for line in lines):
        what += f" {PART} is a part of a character."
    _print(console, Text(what), Text(_padded(HEAD, widths), "bold"))
    for start in range(0, len(lines), AT_ONCE):
        block = [_styled(line, widths) for line in lines[start : start + AT_ONCE]]
        _print(console, *block)


def _styled(line: _Line, widths: Sequence[int]) -> Text:
    style = STYLES[line.role] + " bold" * line.trained
    return Text(_padded(line.cells, widths), style)


def _lines(shown: Shown) -> Iterator[_Line]:
    """With roles: the rows whose token has one of them, and those that learn such a token."""
    pack, wanted = shown.picture, set(shown.options.roles or ROLES)
    for number, (start, end) in enumerate(pairwise(pack.edges), 1):
        piece = shown.pieces[number - 1]
        roles = [ROLES[role] for role in piece.sample.roles]
        for row in range(start, end):
            at = row - start
            trained = pack.labels[row] >= 0
            if roles[at] in wanted or (trained and roles[at + 1] in wanted):
                yield _Line(_cells(shown, number, row, roles[at]), roles[at], trained)
        if roles[-1] in wanted:
            token = int(piece.sample.input_ids[-1])
            text = _clipped(shown.last_texts[number - 1])
            cells = (str(number), "", text, str(token), roles[-1], "", "", "(the end: not read)")
            yield _Line(cells, roles[-1], False)


def _cells(shown: Shown, number: int, row: int, role: str) -> tuple[str, ...]:
    pack = shown.picture
    label = pack.labels[row]
    return (
        str(number),
        str(pack.positions[row]),
        _clipped(pack.texts[row]),
        str(pack.ids[row]),
        role,
        f"{pack.weights[row]:g}",
        str(label),
        f"\u2192 {_clipped(pack.label_texts[row])}" if label >= 0 else "",
    )


def _clipped(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= WIDEST else shown[: WIDEST - 1] + LEFT_OUT


def _padded(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = []
    for name, cell, width in zip(HEAD, cells, widths, strict=True):
        space = " " * (width - cell_len(cell))  # of a terminal, where some characters take two
        padded.append(space + cell if name in RIGHT else cell + space)
    return "  ".join(padded).rstrip()


# ---------------------------------------------------------------------- pack


def _pack(console: Console, edges: Sequence[int]) -> None:
    _print(console, Text("\n" + "\n".join(ruler(edges, min(console.width, 100)))))
    grid = attention_grid(edges, CELLS)
    each = -(-edges[-1] // len(grid))
    what = "\nWho sees whom: a line per query, a column per key"
    _print(console, Text(what + f", up to {each} tokens to a cell" * (each > 1)))
    _print(console, Text("\n".join(grid)))
    _print(console, Text(f"{MARKS['all']} all, {MARKS['some']} some, {MARKS['none']} none"))


def ruler(edges: Sequence[int], width: int) -> list[str]:
    """Three lines: ``cu_seqlens`` where there is room, the sequences to scale, their numbers.

    Args:
        edges: (B + 1,) from 0 to T.
        width: cells to draw in, at least 12; edges nearer than a cell fall together.
    """
    places = [round(edge * (width - 1) / edges[-1]) for edge in edges]
    bar = ["\u2500"] * width
    for place in places:
        bar[place] = "\u253c"
    bar[0], bar[-1] = "\u251c", "\u2524"
    above, below = [" "] * width, [" "] * width
    last = str(edges[-1])
    above[width - len(last) :] = last
    for edge, place in zip(edges[:-1], places, strict=False):
        _write(above, str(edge), place)
    for number, (a, b) in enumerate(pairwise(places), 1):
        text = str(number)
        if b - a > len(text):
            _write(below, text, (a + b + 1 - len(text)) // 2)
    return ["".join(above).rstrip(), "".join(bar), "".join(below).rstrip()]


def _write(line: list[str], text: str, place: int) -> None:
    """Where it fits with a space on either side."""
    around = line[max(0, place - 1) : place + len(text) + 1]
    if place + len(text) <= len(line) and set(around) == {" "}:
        line[place : place + len(text)] = text


def attention_grid(edges: Sequence[int], cells: int) -> list[str]:
    """Block-causal attention as text: which share of its pairs each cell computes.

    Args:
        edges: (B + 1,) from 0 to T; a query sees the keys of its sequence up to itself.
        cells: the most lines and columns; each stands for T / cells tokens in a row.

    Returns:
        min(T, cells) lines, each with as many MARKS.
    """
    total = edges[-1]
    bounds = np.arange(min(total, cells) + 1) * total // min(total, cells)
    first = np.repeat(edges[:-1], np.diff(edges))  # the first key that each query sees
    last = np.arange(1, total + 1)  # the first that it does not
    low, high = bounds[:-1, None], bounds[1:, None]  # of keys, for each column
    seen = np.clip(np.minimum(last, high) - np.maximum(first, low), 0, None)
    pairs = np.add.reduceat(seen, bounds[:-1], axis=1).T
    sizes = np.diff(bounds)
    return [
        "".join(
            MARKS["all" if seen == size * width else "some" if seen else "none"]
            for seen, width in zip(line, sizes, strict=True)
        )
        for line, size in zip(pairs.tolist(), sizes.tolist(), strict=True)
    ]
