from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from varlen_sft.train.loader_verdict import verdict
from varlen_sft.train.state import StepRecord

CONFIG = {
    "model.dtype": "bf16", "stream.max_tokens": 4096, "stream.threads": 1, "data.train": ["x"],
    "data.mock": True, "run.steps": 9, "dist.strategy": "fsdp", "optim.lr": 0.1,
}  # fmt: skip
HEADER = {"config": CONFIG, "ranks": 1, "device": "CPU"}


def record(step: int, seconds: float = 1.0, stall_s: float = 0.0, tokens: int = 1000) -> StepRecord:
    return StepRecord(step, 2.0, 1.0, 0.1, tokens, 10, 1.0, seconds, 9.0, stall_s=stall_s)


MOCK = [record(1, 50), record(2, 50), *(record(k) for k in range(3, 11))]
"""1,000 tokens/s after the first two steps."""


def told(
    folder: Path, steps: list[StepRecord], *, held: int = 10, mock: Any = MOCK, **changed: Any
) -> str:
    header = HEADER | {"config": CONFIG | {"data.mock": False, **changed.pop("config", {})}}
    write(folder, [("start", header | changed), *steps])
    return verdict(mock, HEADER, folder, held=held)


def write(folder: Path, events: list[Any]) -> None:
    lines = []
    for event in events:
        name, facts = ("step", vars(event)) if isinstance(event, StepRecord) else event
        lines.append(json.dumps({"event": name, **facts}))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def steps(seconds: float, stall_s: float = 0.0, count: int = 10) -> list[StepRecord]:
    """The first two take a hundred times as long, which must not count."""
    own = [record(k, seconds, stall_s) for k in range(1, count + 1)]
    return [replace(r, step_time_s=100 * seconds) if r.step < 3 else r for r in own]


@pytest.mark.parametrize(
    ("seconds", "stall_s", "expected"),
    [
        (1.0, 0.0, "1,000 (100%), of whose time the loader was waited for 0.0%: the loader is not"),
        (1.04, 0.03, "962 (96%), of whose time the loader was waited for 2.9%: the loader is not "),
        (1.25, 0.25, "800 (80%), of whose time the loader was waited for 20.0%: the loader is the"),
        (1.25, 0.126, "800 (80%), of whose time the loader was waited for 10.1%: the loader is "),
        (1.25, 0.05, "waited for 4.0%: the run is slower, but not by waiting for its loader"),
        (0.9, 0.0, "1,111 (111%), of whose time the loader was waited for 0.0%: no loader makes"),
    ],
)
def test_speeds_and_stall_decide(tmp_path, seconds, stall_s, expected):
    said = told(tmp_path, steps(seconds, stall_s))
    assert said.startswith("mock data 1,000 real tokens/s, the run's own data ")
    assert expected in said


def test_steps_that_both_have_are_compared_where_there_are_enough(tmp_path):
    far = [record(k, seconds=9.0) for k in range(11, 40)]
    assert "own data 1,000 (100%)" in told(tmp_path, steps(1.0) + far)
    assert "own data 1,000 (100%)" in told(tmp_path, steps(1.0) + far, held=7)
    # Four in common are too few: then all of the run's steps after its first two.
    said = told(tmp_path, steps(1.0, count=6) + [record(k, 2.0) for k in (7, 8)] + far, held=6)
    expected = (4 + 2 + 29) * 1000 / (4 * 1.0 + 2 * 2.0 + 29 * 9.0)
    assert f"own data {expected:,.0f} " in said


def test_a_mock_run_of_few_steps_is_taken_whole(tmp_path):
    assert "mock data 20 real tokens/s" in told(tmp_path, steps(1.0), mock=MOCK[:2])


def test_the_last_sitting_counts_if_it_has_warm_steps(tmp_path):
    start = ("start", HEADER)
    first, again = steps(1.0), [record(k, 50.0 if k < 13 else 2.0) for k in range(11, 21)]
    write(tmp_path, [start, *first, start, ("resume", {"step": 10}), *again])
    assert "own data 500 (50%)" in verdict(MOCK, HEADER, tmp_path, held=10)
    write(tmp_path, [start, *first, start, ("resume", {"step": 10}), *again[:2]])
    assert "own data 1,000 (100%)" in verdict(MOCK, HEADER, tmp_path, held=10)


def test_runs_of_other_work_are_not_compared(tmp_path):
    other = {"stream.max_tokens": 2048, "data.train": ["y"], "optim.lr": 9, "stream.threads": 4}
    said = told(tmp_path, steps(1.0), config=other, ranks=2)
    path = tmp_path / "log.jsonl"
    assert said == (
        f"mock data 1,000 real tokens/s; the run in {path} is not compared, since it had other "
        "stream.max_tokens, data.train and ranks"
    )
    assert "since it had other device" in told(tmp_path, steps(1.0), device="H100")
    assert "the loader is not" in told(tmp_path, steps(1.0), config={"stream.threads": 9})


def test_without_a_run_or_with_its_first_steps_alone_that_is_said(tmp_path):
    said = verdict(MOCK, HEADER, tmp_path, held=10)
    assert said.startswith("mock data 1,000 real tokens/s; ") and "has no run to compare" in said
    assert "has too few steps of the run" in told(tmp_path, steps(1.0, count=2))
