"""Candidates of one op timed side by side: interleaved rounds, ratios, goals, a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from varlen_sft.tools import step_bench
from varlen_sft.tools.step_table import WIDE_SPREAD


class Goal(NamedTuple):
    """What a figure ought to be. Reported, never asserted: no test goes by the clock."""

    text: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def words(self) -> str:
        bound = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        return f"{'met' if self.met else 'NOT MET'}: {self.text}: {self.value:.2f}, {bound}"


@dataclass
class Group:
    """One op on one load.

    ``facts`` are columns besides time, by candidate: errors against fp64, peak memory.
    ``unit`` is the candidate whose time others are multiples of.
    """

    name: str
    unit: str
    steps: dict[str, Callable[[], Any]]
    missing: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    note: str = ""

    def measure(self, rounds: int, warmup: int = 1) -> None:
        """Time all candidates, round by round, each once per round after an untimed run."""
        candidates = {name: _Step(run) for name, run in self.steps.items()}
        self.seconds = step_bench.interleaved(candidates, rounds, warmup, settle=1)

    def median(self, candidate: str) -> float:
        return statistics.median(self.seconds[candidate])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long one candidate takes as another."""
        return self.median(slow) / self.median(fast)

    def row(self, candidate: str) -> dict[str, Any]:
        """Figures of a candidate, for JSON."""
        times = self.seconds[candidate]
        return {
            "seconds_median": self.median(candidate),
            "seconds_min": min(times),
            "seconds_max": max(times),
            f"times {self.unit}": self.ratio(candidate, self.unit),
            **self.facts.get(candidate, {}),
        }

    def disturbed(self) -> list[str]:
        """Candidates whose slowest round took over 1.5 times their fastest."""
        return [name for name, s in self.seconds.items() if max(s) > WIDE_SPREAD * min(s)]


class _Step:
    tokens = 0

    def __init__(self, run: Callable[[], Any]) -> None:
        self.step = run


def as_json(group: Group) -> dict[str, Any]:
    """The group in numbers."""
    return {
        "group": group.name,
        "note": group.note,
        "rows": {name: group.row(name) for name in group.seconds},
        "missing": group.missing,
        "goals": [goal._asdict() | {"met": goal.met} for goal in group.goals],
        "disturbed": group.disturbed(),
        "seconds": group.seconds,
    }


def render(group: Group) -> Table:
    """A row per candidate; goals in plain words under it."""
    table = Table(title=group.name, caption=_caption(group), caption_justify="left")
    columns = list(dict.fromkeys(key for facts in group.facts.values() for key in facts))
    table.add_column("candidate", no_wrap=True)
    for column in ("time [min - max]", f"x {group.unit}", *columns):
        table.add_column(escape(column), justify="right")
    for name in group.seconds:
        row, facts = group.row(name), group.facts.get(name, {})
        times = [duration(row[f"seconds_{key}"]) for key in ("median", "min", "max")]
        cells = [escape("{} [{} - {}]".format(*times)), f"{row[f'times {group.unit}']:.2f}"]
        table.add_row(name, *cells, *(figure(facts.get(column)) for column in columns))
    for name, reason in group.missing.items():
        table.add_row(name, escape(reason))
    return table


def _caption(group: Group) -> str:
    lines = [group.note] if group.note else []
    for goal in group.goals:
        lines.append(f"[{'green' if goal.met else 'red'}]{escape(goal.words())}[/]")
    if wide := group.disturbed():
        names = ", ".join(wide)
        lines.append(f"[red]Disturbed: max > {WIDE_SPREAD} min of {names}. Quote no ratio[/red]")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Three digits in the unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def figure(value: Any) -> str:
    """A cell: counts as they are, small figures in powers of ten."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if abs(value) < 0.01 else f"{value:.2f}"
    return str(value)


def installed(candidates: Mapping[str, Callable[[], Callable[[], Any]]]) -> tuple[dict, dict]:
    """Make every candidate; those whose package is not there are told apart with the reason."""
    steps, missing = {}, {}
    for name, make in candidates.items():
        try:
            steps[name] = make()
        except ModuleNotFoundError as error:
            missing[name] = f"not installed: {error.name}"
    return steps, missing


def no_worse(errors: Mapping[str, Mapping[str, float]], peers: Iterable[str]) -> float:
    """The largest of our errors as a multiple of the best peer's, which counts at least 2^-24.

    Below one fp32 rounding a peer's error is luck.
    """
    peers = list(peers)
    return max(
        error / max(2**-24, min(errors[peer][key] for peer in peers))
        for key, error in errors["ours"].items()
    )
