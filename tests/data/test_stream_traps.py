"""Mistakes that other stacks made with packs, ranks and resumes, each as a test of its own."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from tests.data.streams import Made, lengths, names, stream
from varlen_sft.data.sample import Sample
from varlen_sft.errors import InputError
from varlen_sft.types import IGNORE_INDEX


def epoch_of(found) -> list:
    return list(islice(found, found.steps_per_epoch))


def rows_of(found, step):
    """Each sample of a step's batches: its ids, labels and positions there, and the sample."""
    for batch, ids in zip(step.batches, step.samples, strict=True):
        edges = batch.cu_seqlens.tolist()
        for k, i in enumerate(ids.tolist()):
            a, b = edges[k], edges[k + 1]
            rows = (batch.input_ids[a:b], batch.labels[a:b], batch.position_ids[a:b])
            yield (*(of.tolist() for of in rows), found.sources.sample(i))


def trained(steps) -> Counter:
    """How often each sample was in a batch."""
    return Counter(int(i) for step in steps for ids in step.samples for i in ids)


# -- edges, positions, labels


def test_no_row_learns_the_first_token_of_the_next_sample():
    """Shifting a whole pack instead of each sample trains one boundary label per document, or
    masks the first label of each."""
    found = stream(Made(lengths(90)), accumulate=1)
    for step in epoch_of(found):
        for ids, labels, _, sample in rows_of(found, step):
            assert ids == sample.input_ids[:-1].tolist()
            assert labels == sample.input_ids[1:].tolist()


def test_edges_are_those_of_samples_whatever_the_tokens_say():
    """Edges by EOS cut a conversation at each of its turns; here every token is one."""
    source = Made(lengths(90))

    def sample(i: int) -> Sample:
        length = int(source.lengths[i])
        one = np.ones(length, np.float32)
        return Sample(np.full(length, 2, np.int32), one, np.zeros(length, np.uint8))

    source.sample = sample
    found = stream(source, accumulate=1, pad_id=2, pad_multiple=64)
    for step in islice(found, 10):
        for batch, ids in zip(step.batches, step.samples, strict=True):
            rows = (source.lengths[ids] - 1).tolist()
            assert np.diff(batch.cu_seqlens.numpy()).tolist()[: len(ids)] == rows


def test_positions_start_anew_at_each_sample_and_nowhere_else():
    """Neither modulo a chunk, nor on through the pack, nor at 0 for every pad."""
    found = stream(Made(lengths(90)), accumulate=1, pad_to=160)
    for step in epoch_of(found)[:-1]:
        for _, _, positions, sample in rows_of(found, step):
            assert positions == list(range(len(sample) - 1))
        for batch in step.batches:
            edges = batch.cu_seqlens.tolist()
            want = [p for a, b in zip(edges, edges[1:], strict=False) for p in range(b - a)]
            assert batch.position_ids.tolist() == want


def test_pads_are_a_few_sequences_no_longer_than_the_longest_sample():
    """As sequences of one token they change cu_seqlens' shape with every pack; as one sequence, or
    as a part of the last sample, they set max_seqlen."""
    found = stream(Made(lengths(90)), pad_to=100)
    for step in epoch_of(found)[:-1]:
        for batch, ids in zip(step.batches, step.samples, strict=True):
            rows = found.sources.lengths[ids]
            assert batch.max_seqlen == rows.max()
            pads = np.diff(batch.cu_seqlens.numpy())[len(ids) :]
            assert len(pads) == -(-(100 - rows.sum()) // rows.max())


def test_an_idle_rank_s_pads_are_no_sequences_of_one_token():
    for options, edges in (({"pad_to": 300}, [0, 128, 256, 300]), ({"pad_multiple": 64}, [0, 64])):
        parts = [epoch_of(stream(Made([33] * 9), ranks=4, rank=r, **options)) for r in range(4)]
        tail = [part[-1].batches[0] for part in parts if not len(part[-1].samples[0])]
        assert len(tail) == 3
        for batch in tail:
            assert batch.cu_seqlens.tolist() == edges
            assert float(batch.weight_sum) == 0 and (batch.labels == IGNORE_INDEX).all()


def test_every_token_is_inside_cu_seqlens_and_no_batch_is_empty():
    """What lies past the last edge is not computed, and a batch of nothing is no batch."""
    for options in ({}, {"accumulate": 1}, {"pad_multiple": 48}, {"pad_to": 64}):
        parts = [epoch_of(stream(Made(lengths(90)), ranks=4, rank=r, **options)) for r in range(4)]
        for step in sum(parts, []):
            for batch in step.batches:
                assert int(batch.cu_seqlens[-1]) == len(batch.input_ids) > 0
                assert int(np.diff(batch.cu_seqlens.numpy()).min()) > 0


def test_several_packs_of_a_micro_batch_keep_their_edges():
    """Rows of a batch would need edges of their own; there is one row, with all of them."""
    source = Made(lengths(90))
    whole = next(iter(stream(source, accumulate=1)))
    (batch,) = whole.batches
    assert batch.input_ids.ndim == batch.labels.ndim == batch.position_ids.ndim == 1
    assert len(batch.cu_seqlens) == 1 + sum(map(len, whole.packs))
    apart = next(iter(stream(source)))
    assert sorted(np.diff(batch.cu_seqlens.numpy())) == sorted(
        n for one in apart.batches for n in np.diff(one.cu_seqlens.numpy())
    )


# -- lengths


def test_a_sample_takes_one_row_less_than_it_has_tokens():
    """A check of stored lengths would refuse the first, or let the second overflow."""
    found = stream(Made([33] * 8))
    assert {len(batch.input_ids) for step in epoch_of(found) for batch in step.batches} == {32}
    for length in (34, 65, 66, 1000):
        with pytest.raises(InputError, match=f"row 3: the sample takes {length - 1} rows of a pa"):
            stream(Made([5, 6, length, 7]))


@pytest.mark.parametrize("method", ["planned", "streaming", "next-fit", "none"])
@pytest.mark.parametrize("count", [1, 2, 3, 31, 64, 65])
def test_no_sample_is_lost_at_the_end_of_an_epoch(method, count):
    """The last buffer was never given out, the last pack dropped, packs of odd counts cut."""
    for ranks in (1, 2):
        parts = []
        for rank in range(ranks if count > 2 else 1):
            found = stream(
                Made(lengths(count)), {"method": method}, ranks=ranks if count > 2 else 1, rank=rank
            )
            parts += epoch_of(found)
        assert trained(parts) == Counter(range(count))


# -- ranks


@pytest.mark.parametrize("method", ["planned", "streaming"])
def test_ranks_run_as_many_micro_batches_in_every_step(method):
    """One rank more or less waits for the others' collectives for ever."""
    counts = set()
    for rank in range(4):
        found = stream(
            Made(lengths(97)), {"method": method, "packs_per_step": 8}, ranks=4, rank=rank
        )
        counts.add(tuple(len(step.batches) for step in epoch_of(found) + epoch_of(found)))
    assert len(counts) == 1 and set(counts.pop()) == {2}


def test_denominators_are_sums_over_all_ranks_and_micro_batches():
    """A mean of means weighs a token by how few others share its micro-batch."""
    supervised = [1, 5, 3, 2, 9, 4, 6, 7, 1] * 10
    source = Made([10] * 90, supervised=supervised)
    parts = [epoch_of(stream(source, ranks=2, rank=rank)) for rank in range(2)]
    for step, other in zip(*parts, strict=True):
        want = sum(supervised[i] for pack in step.packs for i in pack)
        batches = [*step.batches, *other.batches]
        assert sum(float(batch.weight_sum) for batch in batches) == want
        assert sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches) == want


# -- resumes


def resumed(source, order: dict, state: dict, **options):
    found = stream(source, order, **options)
    assert found.load_state_dict(json.loads(json.dumps(state))) == []
    return found


@pytest.mark.parametrize("method", ["planned", "streaming"])
def test_a_state_at_the_end_of_an_epoch_begins_the_next_one(method):
    """Not the same epoch again, nor the one after the next, nor an iterator that is at its end."""
    source, order = Made(lengths(90)), {"method": method}
    found = stream(source, order)
    for epoch in range(3):
        epoch_of(found)
        again = resumed(source, order, found.state_dict(), workers=1)
        step = next(iter(again))
        assert (step.epoch, step.step) == (epoch + 1, 0)
        want = stream(source, order).order.step(epoch + 1, 0)
        assert names(step) == [pack.tolist() for pack in want.packs]


def test_what_a_shuffle_window_holds_is_neither_lost_nor_trained_twice():
    """A buffer that starts empty after a resume loses what it held, or gives it out again."""
    source, order = Made(lengths(120)), {"method": "streaming", "window": 8}
    steps = stream(source, order).steps_per_epoch
    for stop in range(1, steps):
        found = stream(source, order)
        before = list(islice(found, stop))
        after = list(islice(resumed(source, order, found.state_dict()), steps - stop))
        assert trained(before + after) == Counter(range(120))


def test_a_late_epoch_goes_on_in_its_own_order_with_other_workers():
    """Not in that of epoch 0, and whatever number of workers it was saved with."""
    for method in ("planned", "streaming"):
        source, order = Made(lengths(90)), {"method": method}
        found = stream(source, order, workers=2)
        list(islice(found, 2 * found.steps_per_epoch + 5))
        here = found.state_dict()
        assert here["epoch"] >= 1
        expected = [names(step) for step in islice(found, 4)]
        for workers in (0, 1, 3):
            again = resumed(source, order, here, workers=workers)
            assert [names(step) for step in islice(again, 4)] == expected


def test_an_epoch_is_shuffled_anew_and_packs_do_not_stay_together():
    """Order and buffers that are the same in each epoch train the same neighbours again."""
    found = stream(Made(lengths(120)))
    packs = [{tuple(sorted(p)) for s in epoch_of(found) for p in names(s)} for _ in range(3)]
    assert not packs[0] == packs[1] and len(packs[0] & packs[1] & packs[2]) < len(packs[0]) / 4


def test_a_resume_reads_nothing_of_what_was_before():
    """Fast-forwarding reads everything again."""
    source = Made(lengths(120))
    read = []
    plain = source.sample
    source.sample = lambda i: read.append(i) or plain(i)
    found = stream(source)
    list(islice(found, 9))
    state = found.state_dict()
    read.clear()
    again = stream(source)
    again.load_state_dict(state)
    step = next(iter(again))
    assert sorted(read) == sorted(i for pack in names(step) for i in pack)
