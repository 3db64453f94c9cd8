from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from varlen_sft.errors import InputError
from varlen_sft.train.run_log import read_run_log


def start(**header) -> dict:
    return {"event": "start", **header}


def step(number: int, loss: float = 0.0) -> dict:
    return {"event": "step", "step": number, "loss": loss}


def resume(number: int) -> dict:
    return {"event": "resume", "step": number}


def valid(number: int, loss: float) -> dict:
    return {"event": "validation", "step": number, "loss": loss}


def said(number: int, text: str) -> dict:
    return {"event": "samples", "step": number, "samples": [text]}


def written(path: Path, *events: dict | str) -> Path:
    lines = [event if isinstance(event, str) else json.dumps(event) + "\n" for event in events]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_of_each_step_what_was_made_of_it_last(tmp_path):
    log = read_run_log(written(
        tmp_path / "log.jsonl",
        start(ranks=1), step(1, 5.0), step(2, 4.0), valid(2, 4.5), said(2, "a"), step(3, 3.0),
        valid(3, 3.5), said(3, "undone"),
        start(ranks=2), resume(2), step(3, 3.25), step(4, 2.0), valid(4, 2.5), said(4, "b"),
        start(ranks=4), resume(4), valid(4, 2.75), said(4, "c"),
    ))  # fmt: skip
    assert log.header == {"ranks": 4}
    assert [(s["step"], s["loss"]) for s in log.steps] == [(1, 5.0), (2, 4.0), (3, 3.25), (4, 2.0)]
    assert [(v["step"], v["loss"]) for v in log.validations] == [(2, 4.5), (4, 2.75)]
    assert [(s["step"], *s["samples"]) for s in log.samples] == [(2, "a"), (4, "c")]
    assert log.went_on == [2, 4] and log.unreadable == 0
    assert "event" not in log.steps[0]


def test_a_run_that_began_anew_has_only_what_came_then(tmp_path):
    log = read_run_log(written(
        tmp_path / "log.jsonl", start(), resume(9), step(10, 9.0), valid(10, 9.0), start(),
        step(1, 5.0),
    ))  # fmt: skip
    assert [s["step"] for s in log.steps] == [1] and not log.validations and not log.went_on
    # One that has begun and logged nothing yet undoes nothing: it may go on.
    log = read_run_log(written(tmp_path / "log.jsonl", start(), step(1), start()))
    assert [s["step"] for s in log.steps] == [1]


def test_lines_that_are_torn_or_foreign_are_counted_and_one_being_written_is_not(tmp_path):
    log = read_run_log(written(
        tmp_path / "log.jsonl", start(), step(1), '{"event": "st\n', "[1]\n",
        '{"event": "step", "step": "2"}\n', '{"event": "step"}\n', {"event": "other"}, step(2),
        '{"event": "step", "step": 3',
    ))  # fmt: skip
    assert [s["step"] for s in log.steps] == [1, 2] and log.unreadable == 4


@pytest.mark.parametrize("text", ["", "{}\n", "no log\n", json.dumps(step(1)) + "\n"])
def test_what_is_no_log_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"log\.jsonl: is no log of a run: it has no start"):
        read_run_log(written(tmp_path / "log.jsonl", text))
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read: No such file"):
        read_run_log(tmp_path / "none.jsonl")


def test_a_log_is_read_without_torch():
    code = "import sys, varlen_sft.tools.run_report; assert not {'torch', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
