from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from varlen_sft.train.metrics import JsonLinesLog, LiveLine, describe, facts
from varlen_sft.train.state import StepRecord

RECORD = StepRecord(
    step=12, loss=1.23456, grad_norm=0.5, lr=1e-4, real_tokens=2000, supervised_tokens=800,
    fill=0.9765, step_time_s=2.0, seconds_left=83.4, stall_s=0.05,
)  # fmt: skip
FULL = replace(
    RECORD,
    role_loss={"user": 2.5, "assistant": 1.1},
    stop_loss=0.0123,
    tflops=312.46,
    naive_tflops=400.0,
    mfu=0.3951,
    peak_memory=78_130_000_000,
)


def test_what_a_person_reads():
    assert describe(RECORD) == (
        "step   12  1:23 left  loss  1.235   1,000 tok/s     400 supervised/s  fill 97.7%  "
        "stall 2.5%"
    )
    assert facts(FULL) == [
        "step   12", "1:23 left", "loss  1.235", "user  2.500", "assistant  1.100",
        "stop  0.012", " 1,000 tok/s", "   400 supervised/s", "fill 97.7%",
        "312.5 TFLOP/s (39.5% MFU)", "stall 2.5%", "78.1 GB",
    ]  # fmt: skip
    unknown = replace(FULL, mfu=None, tflops=0.03217, seconds_left=3 * 3600 + 62)
    assert "0.03217 TFLOP/s" in facts(unknown) and "3:01:02 left" in facts(unknown)


@pytest.mark.parametrize("width", [40, 60, 91, 200])
def test_lines_are_as_few_as_fit_and_break_between_facts(width):
    lines = describe(FULL, width).split("\n")
    assert all(len(line) <= width for line in lines)
    assert "  ".join(lines) == describe(FULL)
    for line, following in zip(lines, lines[1:], strict=False):
        first = next(fact for fact in facts(FULL) if following.startswith(fact))
        assert len(line) + 2 + len(first) > width


def test_a_line_that_just_fits_is_one_line():
    exact = len(describe(FULL))
    assert describe(FULL, exact) == describe(FULL)
    first, second = describe(FULL, exact - 1).split("\n")
    assert f"{first}  {second}" == describe(FULL) and second == "78.1 GB"


@pytest.mark.parametrize(("width", "lines"), [(100, 2), (64, 4)])
def test_a_terminal_shows_whole_facts_on_lines_beside_a_bar(width, lines):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    with LiveLine(console, lambda record: 0.5) as line:
        line.show(FULL)
    last_frame = screen.getvalue().split("\x1b[2K")[-1]
    plain = re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]", "", last_frame)
    *shown, end = plain.split("\n")
    assert len(shown) == lines and end == "" and all(len(text) <= width for text in shown)
    assert [text[:9] for text in shown] == ["━━━━" + " " * 5, *[" " * 9] * (lines - 1)]
    assert [text[9:].rstrip() for text in shown] == describe(FULL, width - 9).split("\n")


def test_a_pipe_gets_a_line_every_few_seconds():
    console = Console(record=True, force_terminal=False, width=60, file=io.StringIO())
    with LiveLine(console, lambda record: 0.5) as line:
        line.show(FULL)
        line.show(replace(FULL, step=13))  # within the same ten seconds: not told
    assert console.export_text().splitlines() == [describe(FULL)]  # on one line, however long
    with LiveLine(console, lambda record: 0.5, every_s=0) as line:
        line.show(FULL)
        line.show(replace(FULL, step=13))
    assert [text[:9] for text in console.export_text().splitlines()] == ["step   12", "step   13"]


def test_the_log_keeps_every_number_of_every_step(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonLinesLog(path, {"seed": 3}) as log:
        log.step(FULL)
        lines = [json.loads(line) for line in path.read_text().splitlines()]  # before it is closed
    assert lines[0] == {"event": "start", "seed": 3}
    assert lines[1].pop("event") == "step"
    assert StepRecord(**lines[1]) == FULL


def test_the_log_of_a_killed_run_goes_on_behind_its_torn_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "start"}\n{"event": "st')
    with JsonLinesLog(path, {"seed": 3}, append=True) as log:
        log.step(RECORD)
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"event": "start"}', '{"event": "st']
    assert json.loads(lines[2]) == {"event": "start", "seed": 3}
    assert json.loads(lines[3])["step"] == 12
