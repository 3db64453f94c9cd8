from __future__ import annotations

import json
import pickle
from itertools import islice

import pytest
import torch

from tests.data.streams import Made, lengths, stream
from tests.helpers import random_samples
from varlen_sft.data.batch import collate
from varlen_sft.data.stream import OrderOptions, Step, StreamOptions
from varlen_sft.errors import InputError
from varlen_sft.train.stages import JoinedStream, StagedStream, as_one_document

FIRST, SECOND = Made(lengths(60)), Made(lengths(60, seed=1), first=100)


def staged(*starts: int, **options) -> StagedStream:
    sources = (FIRST, SECOND, FIRST)[: len(starts)]
    return StagedStream([stream(source, **options) for source in sources], list(starts))


def tokens(steps: list[Step]) -> list[list[list[int]]]:
    return [[batch.input_ids.tolist() for batch in step.batches] for step in steps]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_stage_begins_at_its_step_and_the_last_goes_on(workers):
    found = tokens(list(islice(staged(1, 4, 6, workers=workers), 9)))
    first = tokens(list(islice(stream(FIRST), 4)))
    second = tokens(list(islice(stream(SECOND), 2)))
    assert found == first[:3] + second + first


def test_a_run_goes_on_from_any_step_bit_for_bit():
    whole = staged(1, 4, 6)
    every, states = [], [json.dumps(whole.state_dict())]
    for step in islice(whole, 8):
        every.append(step)
        states.append(json.dumps(whole.state_dict()))
    assert [json.loads(s)["given"] for s in states] == list(range(9))
    for done, state in enumerate(states):
        again = staged(1, 4, 6)
        again.load_state_dict(json.loads(state))
        assert tokens(list(islice(again, 8 - done))) == tokens(every[done:]), done


def test_a_stage_that_has_not_begun_may_be_moved_and_one_that_has_may_not():
    run = staged(1, 4)
    list(islice(run, 2))
    state = run.state_dict()
    moved = staged(1, 6)
    moved.load_state_dict(state)
    rest = tokens(list(islice(moved, 4)))
    assert rest[:3] == tokens(list(islice(stream(FIRST), 5)))[2:]
    assert rest[3:] == tokens(list(islice(stream(SECOND), 1)))
    with pytest.raises(InputError, match=r"after step 2 the stages began at \[1\], now \[1, 2\]"):
        staged(1, 2).load_state_dict(state)
    with pytest.raises(InputError, match="must be what state_dict"):
        staged(1, 4).load_state_dict({"version": 1})
    with pytest.raises(InputError, match="of another run: fingerprint"):
        StagedStream([stream(SECOND), stream(FIRST)], [1, 4]).load_state_dict(state)


@pytest.mark.parametrize("starts", [[], [2], [1, 1], [1, 3, 2], [1]])
def test_starts_that_cannot_be(starts):
    streams = [stream(FIRST)] * (2 if starts == [1] else len(starts))
    with pytest.raises(ValueError, match="starts must rise from 1"):
        StagedStream(streams, starts)


def joined(**options) -> JoinedStream:
    order = OrderOptions(max_tokens=32, packs_per_step=4, balance_steps=3)
    return JoinedStream([FIRST], order, StreamOptions(workers=0, **options))


def test_without_isolation_a_pack_is_one_document_with_the_same_labels():
    for apart, together in zip(islice(stream(FIRST), 3), islice(joined(), 3), strict=True):
        for one, other in zip(apart.batches, together.batches, strict=True):
            total = one.input_ids.shape[0]
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.labels, other.labels) and torch.equal(one.rows, other.rows)
            assert other.cu_seqlens.tolist() == [0, total] and other.max_seqlen == total
            assert other.position_ids.tolist() == list(range(total))
            assert int(other.num_sequences) == 1
        for one, other in zip(apart.counts, together.counts, strict=True):
            assert other.squares == one.tokens**2 >= one.squares
            assert (other.sequences, other.supervised) == (one.sequences, one.supervised)


def test_a_pad_tail_stays_a_sequence_of_its_own():
    batch = as_one_document(collate(random_samples([5, 9]), pad_to=20))
    assert batch.cu_seqlens.tolist() == [0, 12, 20]
    assert batch.position_ids.tolist() == [*range(12), *range(8)]


def test_a_stream_without_isolation_stays_one_in_another_process():
    begun = joined()
    next(iter(begun))
    other = pickle.loads(pickle.dumps(begun))
    assert type(other) is JoinedStream
    assert tokens([next(iter(other))]) == tokens([begun.step(1)])
