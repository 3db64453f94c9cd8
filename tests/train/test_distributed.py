"""Ranks that fail, hang or vanish are named on all others; what one rank sees all act on."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial

import pytest
import torch

from tests.train.ranks import on_ranks
from tests.train.runs import AskedOnRank1, NanOnRank1, die, fail, hang, many, on_rank
from varlen_sft.errors import InputError
from varlen_sft.train.distributed import RankLost, World, start_world, world


def acting(act, accumulate: int):
    """A run in which the second rank does something before its third step."""
    return [(("ddp", accumulate), {"act": partial(on_rank, 1, act), "act_before": 3})]


def summing(act) -> str:
    """Four sums over three ranks; the second rank does something before its third."""
    with world(timeout_s=30) as here:
        for number in range(1, 5):
            if number == 3:
                on_rank(1, act)
            here.sum(torch.ones(3))
    return "finished"


def test_a_rank_that_is_killed_is_named_by_all_others():
    began = time.monotonic()
    first, killed, last = on_ranks(3, summing, die)
    assert killed is None
    for rank, (kind, text) in ((0, first), (2, last)):
        assert kind == "RankLost"
        assert text.startswith(f"rank {rank} of 3 cannot go on: rank 1 gives no sign of life (")
    assert time.monotonic() - began < 60


def test_the_error_of_a_rank_is_told_by_the_others():
    first, failed = on_ranks(2, many, acting(fail, 2))
    assert failed == ("InputError", "chats.jsonl, row 7: no such row")
    assert first[0] == "RankLost"
    told = "rank 0 of 2 cannot go on: rank 1 ended with InputError: chats.jsonl, row 7: no such row"
    assert first[1].startswith(told)


def left_by_an_error() -> bool:
    with suppress(ZeroDivisionError, RankLost), world(timeout_s=30) as here:
        here.barrier()
        raise ZeroDivisionError
    return not torch.distributed.is_initialized()


def test_an_error_leaves_no_process_group():
    assert on_ranks(2, left_by_an_error) == [True, True]


def test_a_rank_that_hangs_is_named_after_the_timeout():
    first, hung = on_ranks(2, many, acting(hang, 2), 3.0)
    assert first[0] == "RankLost" and "rank 1 gives no sign of life" in first[1]
    assert "timeout" in first[1] or "imed out" in first[1]  # not that it ended, which it does later
    assert hung is None


@pytest.fixture(scope="module")
def two_ranks():
    """Runs in which only the second rank sees something: NaN, or a request to stop."""
    cases = [
        (("ddp", 2), {"score": NanOnRank1()}),
        (("fsdp", 2), {"score": NanOnRank1()}),
        (("ddp", 2), {"stop": AskedOnRank1(1)}),
        (("ddp", 2), {"stop": AskedOnRank1(3), "steps": 50}),
    ]
    return on_ranks(2, many, cases)


def test_a_loss_that_is_nan_on_one_rank_stops_all_before_any_weight_moves(two_ranks):
    for rank in two_ranks:
        *spoiled, two_steps, _ = rank
        for run in spoiled:
            kind, text = run["ended"]
            assert kind == "NotFinite" and text.startswith("step 3: the loss is nan")
            assert run["state"].step == 2 and [r.step for r in run["records"]] == [1, 2]
            assert (run["updates"] == 2).all()
        assert two_steps["ended"] == "asked" and two_steps["state"].step == 2
        for name, value in two_steps["weights"].items():
            assert torch.equal(value, spoiled[0]["weights"][name])


def test_all_ranks_stop_after_the_same_step_when_one_is_asked(two_ranks):
    for rank in two_ranks:
        assert rank[3]["ended"] == "asked"
        assert rank[3]["state"].step == 4
        assert rank[3]["position"]["epoch"] == 1 and rank[3]["position"]["step"] == 0


class Ready:
    """A device's event that comes after so many questions."""

    def __init__(self, after: float) -> None:
        self.asked, self.after = 0, after

    def query(self) -> bool:
        self.asked += 1
        return self.asked > self.after


def test_a_device_that_does_not_come_back_is_not_waited_for_longer_than_the_timeout():
    store = torch.distributed.HashStore()
    here = World(0, 3, store=store, timeout_s=0.1)
    ready = Ready(3)
    here.wait(ready)
    assert ready.asked == 4
    store.set("rank 1", "waiting")
    store.set("rank 2", "ended with RunError: no space left")
    told = "rank 0 of 3 cannot go on: rank 2 ended with RunError: no space left "
    with pytest.raises(RankLost, match=told + r"\(a step is not done after 0.1 s\)"):
        here.wait(Ready(float("inf")))
    assert store.get("rank 0") == b"waiting"


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("Application timeout caused pair closure", True),
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:60571", True),
        ("Timed out waiting 30000ms for send operation to complete", True),
        ("Read timeout [127.0.0.1]:60571", True),
        ("NCCL error in: ProcessGroupNCCL.cpp:94, remote process exited", True),
        ("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)", False),
    ],
)
def test_what_backends_say_when_a_peer_is_gone_is_told_from_other_errors(text, lost):
    store = torch.distributed.HashStore()
    store.set("rank 1", "ended with ValueError: no")
    here = World(0, 2, store=store)
    with pytest.raises(RuntimeError) as raised, here.naming_lost_ranks():
        raise RuntimeError(text)
    assert (type(raised.value) is RankLost) == lost
    assert ("rank 1 ended with ValueError: no" in str(raised.value)) == lost
    assert store.get("rank 0") == (
        b"waiting" if lost else f"ended with RuntimeError: {text}".encode()
    )


def test_alone_there_is_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with world() as here:
        assert (here.rank, here.size, here.is_first) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert here.sum(torch.tensor([2.0])).tolist() == [2.0]
        here.barrier()
    with pytest.raises(ZeroDivisionError), world():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE as torchrun sets it, a whole number, has 'two'"),
        ("RANK", None, "must have RANK as torchrun sets it, a whole number, has None"),
        ("MASTER_ADDR", None, "rank 1 of 2 could not join the others: .*MASTER_ADDR"),
    ],
)
def test_an_environment_that_torchrun_did_not_make(monkeypatch, name, value, message):
    made = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29555",
            "MASTER_ADDR": "127.0.0.1", name: value}  # fmt: skip
    for key, text in made.items():
        monkeypatch.delenv(key, raising=False) if text is None else monkeypatch.setenv(key, text)
    with pytest.raises(InputError, match=message):
        start_world(timeout_s=1)
