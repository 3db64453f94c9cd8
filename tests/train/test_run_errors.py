"""What goes wrong on one rank of a whole run is told by name on all, soon, and costs no work."""

from __future__ import annotations

import re
from functools import partial

import pytest

from tests.train import disturbed
from tests.train.disturbed import broken, kept, steps, train, weights
from tests.train.ranks import on_ranks
from tests.train.setups import small_run
from varlen_sft.train.checkpoint_folder import damage

MINUTE = 60.0
# Rank 0 holds the notes here, under torchrun the agent does: of rank 0 the others may know no more.
param = partial(pytest.param, marks=pytest.mark.e2e)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    small_run(folder)
    assert on_ranks(2, train, folder) == ["finished"] * 2
    return folder


@pytest.mark.parametrize(
    ("what", "rank", "own", "told"),
    [
        ("data_thread_dies", 1, "RunError: a thread that makes results ahead ended: MemoryError",
         "RankLost: rank 0 of 2 cannot go on: rank 1 ended with RunError: a thread that makes"),
        ("no_room_for_the_log", 0, "RunError: .*log.jsonl.*No space left on device",
         "RankLost: rank 1 of 2 cannot go on: "),
        param("data_cannot_be_read", 1, r"RunError: .*\.bin: Input/output error",
         r"RankLost: rank 0 of 2 cannot go on: rank 1 ended with RunError: .*\.bin: Input/output"),
        param("loss_is_nan", 1, "NotFinite: step 4: the loss is nan", "NotFinite: step 4: the los"),
        param("rank_dies", 0, None, "RankLost: rank 1 of 2 cannot go on: "),
        param("rank_dies", 1, None, "RankLost: rank 0 .*cannot go on: rank 1 gives no sign of lif"),
        param("no_room_for_checkpoints", 1, "RunError: .*step-00000004.tmp: .*rank 1: .*File too l",
         "RunError: .*step-00000004.tmp: the checkpoint cannot be written: rank 1: .*File too"),
    ],
)  # fmt: skip
def test_it_is_named_on_every_rank_and_the_run_goes_on_from_its_checkpoint(
    tmp_path, whole, what, rank, own, told
):
    small_run(tmp_path)  # writes the files
    threads = ("--threads", "1")
    work = partial(broken, getattr(disturbed, what))
    results = on_ranks(2, work, rank, tmp_path, *threads, wait_s=MINUTE)
    assert_told(results[rank], own)
    assert_told(results[1 - rank], told)
    assert 2 <= max(kept(tmp_path)) < 8
    for step in kept(tmp_path):
        assert damage(tmp_path / f"out/checkpoints/step-{step:08}") is None
    assert on_ranks(2, train, tmp_path, *threads) == ["finished"] * 2
    assert steps(tmp_path) == steps(whole) and len(steps(whole)) == 8
    assert weights(tmp_path) == weights(whole)


def test_a_process_that_prepares_and_dies_is_named_on_every_rank(tmp_path):
    small_run(tmp_path)
    work = partial(broken, disturbed.preparing_process_dies)
    first, second = on_ranks(2, work, 0, tmp_path, wait_s=MINUTE)
    assert_told(first, "RunError: a worker was killed by signal 9 .too little memory")
    assert_told(second, "RankLost: rank 0 ended with RunError: a worker was killed by signal 9")
    assert on_ranks(2, train, tmp_path, "--steps", "1") == ["finished"] * 2


def test_a_model_that_does_not_fit_the_disk_is_written_by_the_next_run(tmp_path, whole):
    small_run(tmp_path)
    work = partial(broken, disturbed.no_room_for_the_model)
    first, second = on_ranks(2, work, 0, tmp_path, wait_s=MINUTE)
    assert_told(first, "RunError: .*out: .*File too large")
    assert_told(second, "RankLost: rank 0 ended with RunError: .*File too large")
    assert kept(tmp_path) == [6, 8]
    assert not list((tmp_path / "out" / "model").glob("*"))
    assert on_ranks(2, train, tmp_path) == ["finished"] * 2
    assert weights(tmp_path) == weights(whole)


def assert_told(result, pattern: str | None) -> None:
    """What became of a rank: None if it was killed."""
    if pattern is None:
        assert result is None
        return
    assert isinstance(result, tuple), result
    said = ": ".join(result)
    assert re.search(pattern, said, re.DOTALL), said
