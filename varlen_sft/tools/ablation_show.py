"""How ``varlen-sft bench --ablation`` looks: a table with curves, and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varlen_sft.tools.page import Html, Series, details, document, line_chart, section, tag
from varlen_sft.tools.page import table as html_table
from varlen_sft.train.metrics import LiveLine
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.state import StepRecord
from varlen_sft.words import count

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["heading", "live", "page", "sparkline", "table", "written"]

BLOCKS = "▁▂▃▄▅▆▇█"
CELLS = 16  # of a curve in the terminal
PATHS = ("model.name", "data.train", "data.valid", "data.cache", "data.template", "run.out",
         "stages")  # fmt: skip
"""Keys that say where things lie on somebody's disk: a page may be passed on."""
_MEASURES = (
    ("trained on", lambda arm: "answers" if arm["completions_only"] else "every token"),
    ("attention", lambda arm: "isolated" if arm["isolate"] else "whole pack"),
    ("loss", lambda arm: f"{arm['loss_first']:.3f} to {arm['loss_last']:.3f}"),
    ("held out", lambda arm: _held_out(arm)),
    ("tokens/s", lambda arm: f"{arm['real_tokens_per_s']:,.0f}"),
    ("supervised", lambda arm: f"{arm['supervised_tokens_per_s']:,.0f}"),
    ("TFLOP/s", lambda arm: _significant(arm["tflops"])),
    ("naive", lambda arm: _significant(arm["naive_tflops"])),
)


def heading(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(f"\n[bold]{text}[/bold]", highlight=False)


@contextmanager
def live(console: Console | None, options: TrainOptions) -> Iterator[Callable[[StepRecord], None]]:
    """Gives what shows a step, on a line that renews itself; on ranks without a console nothing."""
    if console is None:
        yield lambda record: None
        return
    with LiveLine(console, lambda record: options.progress(record.step, 0.0)) as line:
        yield line.show


def written(console: Console, path: Path) -> None:
    console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def table(console: Console, found: Mapping[str, Any]) -> None:
    """One row per run, its training loss as a curve on a scale that all four share."""
    from rich.table import Table

    heading(console, f"{found['steps']} steps each, of the same samples from the same weights")
    curves = [[step["loss"] for step in arm["steps"]] for arm in found["arms"]]
    low, high = min(map(min, curves)), max(map(max, curves))
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for at, (name, _) in enumerate(_MEASURES):
        shown.add_column(name, justify="left" if at < 2 else "right", no_wrap=True)
        if name == "loss":
            shown.add_column("curve", no_wrap=True)
    for arm, curve in zip(found["arms"], curves, strict=True):
        cells = [text(arm) for _, text in _MEASURES]
        shown.add_row(*cells[:3], sparkline(curve, low, high), *cells[3:])
    console.print(shown)
    for line in notes(found):
        console.print(line, highlight=False, markup=False)


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the columns mean, and what must not be read out of them."""
    held_out = (
        f"held out: the loss of answers of {found['held_out']}, which no run trained, each sample "
        "for itself, whatever a run was trained on: the column that compares the four."
        if found["held_out"]
        else "held out: nothing, since no step of the epoch is left: give data.valid, or fewer "
        "steps."
    )
    return [
        "loss: per trained token, means of the first and last tenth of the steps; other tokens "
        "have other losses, so only rows trained on the same can be compared.",
        held_out,
        "TFLOP/s: what had to be computed, with the sum of squared lengths. naive: every pack a "
        "full one, its whole square, every row scored; it rises with tokens/s, whatever was spared."
        if found["arms"][0]["tflops"] is not None
        else "TFLOP/s: not known for this family of models.",
        "Speeds are medians over steps, one run after the other: other work disturbs them.",
    ]


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """Means of neighbours in at most ``CELLS`` cells, between low and high."""
    cells = min(CELLS, len(values))
    edges = [len(values) * k // cells for k in range(cells + 1)]
    parts = [values[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    span = (high - low) or 1.0
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((sum(p) / len(p) - low) / span * top)] for p in parts)


def _held_out(arm: Mapping[str, Any]) -> str:
    return f"{arm['validation'][-1]['loss']:.3f}" if arm["validation"] else "-"


def _significant(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ----------------------------------------------------------------------- page


def page(found: Mapping[str, Any]) -> str:
    """A page that needs nothing else."""
    device = found["environment"]["cpu"] if found["device"] == "CPU" else found["device"]
    made = f"{found['environment']['date']} · {device} · {count(found['ranks'], 'rank')}"
    config = [[key, value] for key, value in found["config"].items() if key not in PATHS]
    title = "varlen_sft: answers alone and isolation, each on and off"
    what = f"{count(found['steps'], 'step')} each, of the same samples from the same weights"
    body = [
        tag("h1", title),
        tag("p", f"{what}. {made}", class_="dim"),
        html_table([name for name, _ in _MEASURES], _rows(found)),
        *(tag("p", line, class_="dim") for line in notes(found)),
        section("Curves", tag("div", *_charts(found), class_="columns")),
        section(
            "How it was measured",
            details("Machine and versions", found["environment"]),
            tag("details", tag("summary", "Configuration"), html_table(["key", "value"], config)),
        ),
    ]
    return document(title, body)


def _rows(found: Mapping[str, Any]) -> list[list[Html]]:
    def cell(arm: Mapping[str, Any], name: str, text: Any) -> Html:
        return tag("td", text(arm), data_arm=arm["name"], data_field=name)

    return [[cell(arm, name, text) for name, text in _MEASURES] for arm in found["arms"]]


def _charts(found: Mapping[str, Any]) -> list[Html]:
    """Loss by step, then of what is held out; a chart for each kind of tokens, a line per run."""
    charts = []
    for source, what in (("steps", "Training loss"), ("validation", "Loss of held-out answers")):
        for kind in (True, False):
            arms = [arm for arm in found["arms"] if arm["completions_only"] is kind]
            if not arms[0][source]:
                continue
            lines = [
                Series(_attention(arm), source, [point["loss"] for point in arm[source]], look)
                for arm, look in zip(arms, "ab", strict=True)
            ]
            x = [point["step"] for point in arms[0][source]]
            trained = "answers alone" if kind else "every token"
            charts.append(line_chart(f"{what}, trained on {trained}", x, lines, x_label="step"))
    return charts


def _attention(arm: Mapping[str, Any]) -> str:
    return "isolated" if arm["isolate"] else "whole pack"
