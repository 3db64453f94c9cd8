from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from varlen_sft.errors import InputError, RunError
from varlen_sft.train.distributed import RankLost, World
from varlen_sft.train.first import from_first, naming_disk_errors


def on_threads(size: int, make) -> list:
    """What ``from_first`` gives on each rank, or the error; and what is left in the store."""
    store = torch.distributed.HashStore()
    found: list = [None] * size

    def work(rank: int) -> None:
        try:
            found[rank] = from_first(World(rank, size, store=store), "sets", make)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [*found, store.num_keys()]


def test_what_rank_0_makes_all_ranks_get_and_the_store_forgets():
    made = []
    assert on_threads(3, lambda: made.append(1) or {"a": [1, "b"]}) == [{"a": [1, "b"]}] * 3 + [0]
    assert made == [1]
    assert from_first(World(), "sets", lambda: 7) == 7


def test_what_goes_wrong_on_rank_0_all_ranks_hear():
    def fail() -> None:
        raise InputError("no such row", file="chats.jsonl", row=7)

    first, second, left = on_threads(2, fail)
    assert type(first) is InputError and left == 0
    assert type(second) is RankLost
    assert str(second) == "rank 0 ended with InputError: chats.jsonl, row 7: no such row"


def test_a_rank_0_that_ends_before_it_makes_anything_is_not_waited_for():
    store = torch.distributed.HashStore()
    store.set("rank 0", "ended with RunError: full")
    with pytest.raises(RankLost, match="^rank 0 ended with RunError: full$"):
        from_first(World(1, 2, store=store), "sets", dict)


class SafetensorError(Exception):
    """As that of safetensors, which is no OSError."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "a/b"), "^a/b: No space left on device$"),
        (OSError(28, "No space left on device"), "^out: No space left on device$"),
        (SafetensorError("I/O error: File too large"), "^out: I/O error: File too large$"),
    ],
)
def test_errors_of_a_disk_are_told_in_a_line(error, told):
    with pytest.raises(RunError, match=told) as raised, naming_disk_errors(Path("out")):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [InputError("no"), KeyError("k"), RunError("r")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, naming_disk_errors(Path("out")):
        raise error
    assert raised.value is error
