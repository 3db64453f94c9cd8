"""Whole runs, from chats to the exported model, killed at any instant and started again."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path

import pytest

from tests.train.disturbed import kept, killed_after, steps, train, weights
from tests.train.ranks import on_ranks
from tests.train.setups import small_run
from varlen_sft.train.checkpoint_folder import damage

KILLS, STEPS = 20, 60
ARGUMENTS = ("--steps", str(STEPS), "--checkpoint.every", "1", "--timeout_s", "15")


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, ("--threads", "1")), (2, ("--strategy", "fsdp")), (1, ("--lora_rank", "2"))],
    ids=["alone", "two ranks", "lora"],
)
def test_killed_at_twenty_instants_it_ends_with_the_same_losses_and_bytes(tmp_path, ranks, options):
    """Instants are anywhere from the first import to the last file: while it prepares, loads,
    trains, saves and exports; of all ranks or of one, which the other has to tell."""
    arguments, whole = (*ARGUMENTS, *options), new(tmp_path / "whole")
    began = time.monotonic()
    assert on_ranks(ranks, train, whole, *arguments) == ["finished"] * ranks
    took = time.monotonic() - began
    expected = steps(whole), exported(whole)
    assert list(expected[0]) == list(range(1, STEPS + 1))
    draw, out, killed, finished, seen = random.Random(1), new(tmp_path / "0"), 0, 0, set()
    while killed < KILLS or not finished:
        who = draw.choice([tuple(range(ranks)), *((rank,) for rank in range(ranks))])
        instant = draw.uniform(0.0, 1.0) * took if killed < KILLS else 10 * took + 60
        results = on_ranks(ranks, partial(killed_after, instant, who), out, *arguments)
        assert all(_ended_well(result) for result in results), results
        killed += any(result is None for result in results)
        for step in kept(out):
            path = out / "out" / "checkpoints" / f"step-{step:08}"
            assert damage(path) is None, path
        seen.add(max(kept(out), default=0))
        if results == ["finished"] * ranks:
            assert (steps(out), exported(out)) == expected
            finished += 1
            out = new(tmp_path / str(finished))
    assert len(seen) > 3, "no kill was in the middle of a run"


def _ended_well(result: object) -> bool:
    """Finished, killed, or told that the other rank is gone, at the start or later."""
    if isinstance(result, tuple):
        kind, text = result
        return kind == "RankLost" or (kind == "InputError" and "could not join" in text)
    return result in ("finished", None)


def new(folder: Path) -> Path:
    folder.mkdir()
    small_run(folder)  # writes the files
    return folder


def exported(folder: Path) -> bytes:
    adapter = folder / "out" / "model" / "adapter_model.safetensors"
    return adapter.read_bytes() if adapter.exists() else weights(folder)
