"""What the learning benchmark shows of its results, and what was promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

__all__ = ["AS_IT_IS", "SECTIONS", "goals", "shares_as_it_is", "spark", "tables"]

AS_IT_IS = "as it is"
SECTIONS = ["scratch", "broken", "spread", "order", "finetune"]
SHARE, SECONDS, PARAMETERS = 0.95, 15 * 60, 3_000_000  # promised of each run from scratch
WORSE = (
    "labels across samples", "mask one token late", "turns as samples", "stream.isolate: false",
)  # fmt: skip
"""What has to show beside the worst seed. RoPE sees only differences of positions: those that run
on change nothing while attention stays inside the sample."""
_BARS = "▁▂▃▄▅▆▇█"
_TITLES = {
    "scratch": "From random weights",
    "broken": "Broken on purpose, seed 0",
    "spread": "As it is, other seeds",
    "order": "Order of steps, seed 0",
}


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Of the sections that are there."""
    made = [_runs(results, section) for section in _TITLES if section in results]
    return made + ([_fine_tuned(results)] if "finetune" in results else [])


def goals(results: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """(met, what was promised) of the sections that are there."""
    found = []
    scratch = runs_of(results, "scratch")
    for name, run in scratch.items():
        share, seconds = run["score"]["share"], run["seconds"]
        met = share >= SHARE and seconds <= SECONDS and run["parameters"] <= PARAMETERS
        found.append((met, f"{name}: {share:.1%} of {run['score']['of_dialogues']} dialogues in "
                           f"{seconds / 60:.1f} min; at least {SHARE:.0%} in 15"))  # fmt: skip
    broken = runs_of(results, "broken")
    worst = min(shares_as_it_is(results), default=0.0)
    for name in WORSE:
        if name in broken:
            here = broken[name]["score"]["share"]
            found.append((here < worst, f"{name}: {here:.1%} of dialogues, worse than {worst:.1%}"))
    for name, run in runs_of(results, "finetune").items():
        before, after = run["before"]["answers"], run["after"]["answers"]
        text = f"{name}: {after} of {run['after']['of_answers']} answers, before {before}"
        found.append((after > before, text))
    return found


def runs_of(results: Mapping[str, Any], section: str) -> dict[str, Any]:
    """By name; none if the section has not run."""
    return results.get(section, {}).get("runs", {})


def shares_as_it_is(results: Mapping[str, Any]) -> list[float]:
    """Of dialogues, of the shorter runs with nothing broken, one for each seed."""
    first = [run for name, run in runs_of(results, "broken").items() if name == AS_IT_IS]
    runs = [*first, *runs_of(results, "spread").values()]
    return [run["score"]["share"] for run in runs]


def spark(values: Sequence[float]) -> str:
    """A curve in one line, on a scale from 0 to its largest value."""
    top = max(values, default=0) or 1
    return "".join(_BARS[min(int(v / top * len(_BARS)), len(_BARS) - 1)] for v in values)


def _runs(results: Mapping[str, Any], section: str) -> Table:
    table = Table("run", title=_TITLES[section], title_justify="left")
    for column in ("dialogues right", "answers", "loss, held out", "jumps", "min"):
        table.add_column(column, justify="right")
    table.add_column("training loss")
    shown = runs_of(results, section)
    others = runs_of(results, "broken") if section == "order" else {}
    whole = {name: run for name, run in others.items() if name == AS_IT_IS}
    for name, run in {**whole, **shown}.items():
        right = run["score"]
        table.add_row(
            name, f"{right['share']:.1%}", f"{right['answers'] / right['of_answers']:.1%}",
            f"{run['held_out_loss']:.4f}", f"{run['jumps']:.4f}", f"{run['seconds'] / 60:.1f}",
            spark(run["curve"][::2]),
        )  # fmt: skip
    return table


def _fine_tuned(results: Mapping[str, Any]) -> Table:
    table = Table("fine-tuned", "", title="From a trained model", title_justify="left")
    for column in ("dialogues right", "answers", "steps"):
        table.add_column(column, justify="right")
    for name, run in runs_of(results, "finetune").items():
        for when, steps in (("before", 0), ("after", run["steps"])):
            right = run[when]
            table.add_row(
                name, when, f"{right['dialogues']} of {right['of_dialogues']}",
                f"{right['answers']} of {right['of_answers']}", str(steps),
            )  # fmt: skip
    return table
