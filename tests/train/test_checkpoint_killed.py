"""Runs that are killed, told to stop, or run out of disk, and go on as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.ranks import on_ranks
from tests.train.resumable import (
    STEPS,
    killed_after,
    killed_at,
    on_full_disk,
    run,
    signalled,
    stopped_writing,
    updates_of_one_row,
)

POINTS = ("half written", "before the move", "after the move")


def folder(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir() if path.name != "lock")


def losses(out: Path, rank: int = 0) -> dict[int, list[float]]:
    """By step; whatever a run that was killed did again has to come out the same."""
    found: dict[int, list[float]] = {}
    for line in (out / f"loss-{rank}.jsonl").read_text().splitlines():
        step, *numbers = json.loads(line)
        assert found.setdefault(step, numbers) == numbers, step
    return found


def assert_same(here, there) -> None:
    """Bit for bit."""
    for name in ("state", "position", "ids"):
        assert here[name] == there[name], name
    flat = [
        {"drawn": of["drawn"], **of["weights"]}
        | {f"{kind} {name}": value for kind in of["optimizer"] for name, value in
           of["optimizer"][kind].items()}
        for of in (here, there)
    ]  # fmt: skip
    assert flat[0].keys() == flat[1].keys() and len(flat[0]) > 40
    for name, value in flat[0].items():
        assert torch.equal(value, flat[1][name]), name


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def undisturbed(tmp_path: Path, ranks: int = 1, *args, **options):
    (tmp_path / "whole").mkdir()
    results = on_ranks(ranks, run, tmp_path / "whole", *args)
    return results, [losses(tmp_path / "whole", rank) for rank in range(ranks)]


def test_killed_around_the_move_it_goes_on_bit_for_bit(tmp_path, out):
    (whole,), (expected,) = undisturbed(tmp_path)
    assert list(expected) == list(range(1, STEPS + 1)) and whole["ended"] == "finished"
    assert whole["state"].epoch == 1  # the end of an epoch is behind
    left = {
        "half written": ["step-00000002.tmp"],
        "before the move": ["step-00000002.tmp"],
        "after the move": ["step-00000002"],
    }
    for point in POINTS:
        assert on_ranks(1, killed_at, point, out) == [None]
        assert folder(out) == left[point], point
    assert on_ranks(1, killed_at, "before the move", out) == [None]
    assert folder(out) == ["step-00000002", "step-00000004.tmp"]
    assert on_ranks(1, killed_at, "while old ones are removed", out) == [None]
    assert folder(out) == ["step-00000002.old.tmp", "step-00000004", "step-00000006"]
    (again,) = on_ranks(1, run, out)
    assert (again["started"], again["ended"]) == (6, "finished")
    assert folder(out) == ["step-00000006", "step-00000008"]
    assert losses(out) == expected
    assert_same(again, whole)
    assert again["ids"] == {"wandb": "first"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_of_which_one_is_killed_go_on_bit_for_bit(tmp_path, out, strategy):
    whole, expected = undisturbed(tmp_path, 2, strategy, 2)
    if strategy == "fsdp":
        first, second = on_ranks(2, partial(killed_at, rank=1), "half written", out, strategy, 2)
        assert second is None and first[0] == "RankLost"
        assert folder(out) in ([], ["step-00000002.tmp"])
    first, second = on_ranks(2, killed_at, "after the move", out, strategy, 2)
    assert first is None and second[0] == "RankLost"
    assert folder(out) == ["step-00000002"]
    again = on_ranks(2, run, out, strategy, 2)
    for rank in range(2):
        assert again[rank]["started"] == 2
        assert losses(out, rank) == expected[rank]
        assert_same(again[rank], whole[rank])
    if strategy == "fsdp":  # 53 rows are 27 and 26
        part = load_file(out / "checkpoints/step-00000008/rank-00001.safetensors")
        rows = part["model.embed_tokens.weight[27:53,0:32]"]
        assert torch.equal(rows, again[0]["weights"]["embed_tokens.weight"][27:])
    assert not torch.equal(again[0]["drawn"], again[1]["drawn"])  # each drew its own
    written = sorted(path.name for path in (out / "checkpoints/step-00000008").iterdir())
    assert written[2:] == ["ids.json", "rank-00000.safetensors", "rank-00001.safetensors",
                           "run.json", "stream.json"]  # fmt: skip


def test_other_ranks_go_on_with_the_same_batches(tmp_path, out):
    options = {"dtype": torch.float32, "noise": False, "steps": 10}
    (tmp_path / "whole").mkdir()
    exact, told = partial(run, **options), partial(signalled, **options)
    (whole,) = on_ranks(1, exact, tmp_path / "whole")
    (first,) = on_ranks(1, told, signal.SIGTERM, 2, 0, out)
    assert (first["ended"], first["state"].step) == ("asked", 4)
    second = on_ranks(2, told, signal.SIGINT, 5, 1, out, "fsdp", 2)
    for rank in second:  # the one that nobody told ends after the same step
        assert (rank["started"], rank["ended"], rank["state"].step) == (4, "asked", 8)
    (last,) = on_ranks(1, exact, out)
    assert last["started"] == 8
    assert last["state"] == whole["state"] and last["position"] == whole["position"]
    wanted = losses(tmp_path / "whole")
    for step, numbers in losses(out).items():
        assert numbers == pytest.approx(wanted[step], rel=1e-5), step
    for name, value in last["weights"].items():
        error = (value - whole["weights"][name]).norm() / value.norm()
        assert error < 1e-5, name


def test_a_full_disk_is_named_on_every_rank_and_costs_nothing(tmp_path, out):
    whole, expected = undisturbed(tmp_path, 2, "fsdp", 2)
    for name, told in on_ranks(2, on_full_disk, 1, out, "fsdp", 2):
        assert name == "RunError"
        assert "step-00000004.tmp: the checkpoint cannot be written: rank 1: [Errno 28] No" in told
    assert folder(out) == ["step-00000002"]
    again = on_ranks(2, run, out, "fsdp", 2)
    for rank in range(2):
        assert again[rank]["started"] == 2 and losses(out, rank) == expected[rank]
        assert_same(again[rank], whole[rank])


def test_a_rank_without_rows_of_a_matrix_counts_its_updates(tmp_path):
    """Whichever rank writes the counts, which are the same on all, another may need them."""
    assert on_ranks(2, updates_of_one_row) == [[2.0] * 4] * 2


def test_a_rank_that_does_not_answer_while_it_writes_is_an_error(out):
    (name, told), other = on_ranks(2, stopped_writing, out)
    assert name == "RankLost" and "rank 1 gives no sign of life (" in told
    assert "imed out" in told and other is None
    assert folder(out) in ([], ["step-00000001.tmp"])


def test_a_step_that_a_rank_leaves_is_an_error_before_the_write_ends(out):
    began = time.monotonic()
    (name, told), other = on_ranks(2, stopped_writing, out, False)
    assert name == "RankLost" and "rank 1 gives no sign of life (" in told and other is None
    assert time.monotonic() - began < 25


@pytest.mark.e2e
@pytest.mark.parametrize(("ranks", "strategy"), [(1, "ddp"), (2, "fsdp")])
def test_killed_at_twenty_instants_it_goes_on_bit_for_bit(tmp_path, out, ranks, strategy):
    """It saves after every step, so that most instants are within a save."""
    (tmp_path / "whole").mkdir()
    options = {"steps": 120, "every": 1}
    began = time.monotonic()
    args = strategy, 4 // ranks
    whole = on_ranks(ranks, partial(run, **options), tmp_path / "whole", *args, wait_s=900)
    took = time.monotonic() - began
    assert [of["ended"] for of in whole] == ["finished"] * ranks
    expected = [losses(tmp_path / "whole", rank) for rank in range(ranks)]
    draw, killed, last = random.Random(0), 0, 0
    while killed < 20:
        instant = draw.uniform(0.05, 0.3) * took
        results = on_ranks(ranks, partial(killed_after, **options), instant, out, *args, wait_s=900)
        killed += results == [None] * ranks
        steps = [int(name[5:13]) for name in folder(out) if name[13:] == ""]
        assert max(steps, default=0) >= last and len(steps) <= 3, "a checkpoint was lost"
        last = max(steps, default=0)
        if last == 120:  # it came through: from the start again
            assert [losses(out, rank) for rank in range(ranks)] == expected
            out, last = tmp_path / f"run {killed}", 0
            out.mkdir()
    again = on_ranks(ranks, partial(run, **options), out, *args, wait_s=900)
    for rank in range(ranks):
        assert losses(out, rank) == expected[rank]
        assert_same(again[rank], whole[rank])
