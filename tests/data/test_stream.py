"""The stream: the same global batches on any number of ranks, and from any point on."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.streams import Made, lengths, names, sequences, stream
from varlen_sft.data.balance import deal
from varlen_sft.data.store import Store
from varlen_sft.data.store_write import write_store
from varlen_sft.data.stream_state import read_options
from varlen_sft.errors import InputError
from varlen_sft.types import IGNORE_INDEX

METHODS = ("planned", "streaming", "next-fit", "none")


def tokens_of(found, step) -> list[tuple[int, ...]]:
    """The sequences that a step must have, from its packs."""
    ids = [int(i) for pack in step.packs for i in pack]
    return sorted(tuple(found.sources.sample(i).input_ids[:-1].tolist()) for i in ids)


def part_of(sources, order: dict, steps: int, state=None, **options) -> list:
    """Steps of one rank, from the first one or from a state."""
    found = stream(sources, order, **options)
    if state is not None:
        assert found.load_state_dict(state) == []
    return list(islice(found, steps))


def drawn_sources(data, seed: int) -> tuple[list[Made], dict]:
    """One to three sources, and weights for them or none."""
    counts = data.draw(st.lists(st.integers(4, 60), min_size=1, max_size=3))
    made, first = [], 1
    for k, count in enumerate(counts):
        of = lengths(count, seed + k, most=20)
        made.append(Made(of, first, supervised=[1 + i % (n - 1) for i, n in enumerate(of)]))
        first += count
    if data.draw(st.booleans()):
        return made, {}
    weights = tuple(data.draw(st.floats(0.1, 10)) for _ in made)
    unit = data.draw(st.sampled_from(["samples", "tokens", "supervised"]))
    return made, {"weights": weights, "weights_count": unit}


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 3),
    balance=st.sampled_from(["window", "step", "none"]),
)
def test_ranks_accumulation_workers_and_stops_change_no_global_batch(data, method, seed, balance):
    source, weights = drawn_sources(data, seed)
    order = {"packs_per_step": 12, "seed": seed, "method": method, "balance": balance, "window": 5}
    order |= weights
    alone = stream(source, order)
    total = 2 * alone.steps_per_epoch + 2
    expected = list(islice(stream(source, order), total))
    state, done = None, 0
    while done < total:
        ranks = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
        accumulate = data.draw(
            st.sampled_from([None, *(a for a in (1, 2, 3, 4, 6) if 12 % (ranks * a) == 0)])
        )
        here = data.draw(st.integers(1, total - done))
        workers = data.draw(st.sampled_from([0, 0, 2]))
        if stream(source, order).order.epoch(0).packs() < ranks:
            ranks = accumulate = 1
        parts, states = [], []
        for rank in range(ranks):
            options = {"rank": rank, "ranks": ranks, "accumulate": accumulate, "workers": workers}
            found = stream(source, order, **options)
            if state is not None:
                assert found.load_state_dict(json.loads(json.dumps(state))) == []
            steps = iter(found)
            parts.append(list(islice(steps, here)))
            steps.close()
            states.append(found.state_dict())
        assert all(other == states[0] for other in states)
        for k, want in enumerate(expected[done : done + here]):
            mine = [part[k] for part in parts]
            for step in mine:
                assert (step.epoch, step.step, step.last) == (want.epoch, want.step, want.last)
                assert names(step) == names(want)
                assert len(step.batches) == (accumulate or 12 // ranks)
            assert sequences(mine) == tokens_of(alone, want)
        state, done = states[0], done + here


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_trains_every_sample_once(method):
    source = Made(lengths(90))
    found = stream(source, {"method": method})
    for epoch in range(2):
        steps = list(islice(found, found.steps_per_epoch))
        assert {step.epoch for step in steps} == {epoch}
        assert steps[-1].last
        every = sorted(tuple(source.sample(i).input_ids[:-1].tolist()) for i in range(90))
        assert sequences(steps) == every
    assert found.state_dict()["epoch"] == 2 and found.state_dict()["step"] == 0


def test_idle_ranks_run_one_token_that_weighs_nothing():
    # Nine packs of one sample each: the third step has one for four ranks.
    source = Made([33] * 9)
    for accumulate in (1, 2):
        order = {"packs_per_step": 4 * accumulate}
        parts = [
            part_of(source, order, 3 if accumulate == 1 else 2, rank=rank, ranks=4,
                    accumulate=accumulate, pad_id=77)
            for rank in range(4)
        ]  # fmt: skip
        tail = [part[-1] for part in parts]
        assert [len(step.batches) for step in tail] == [accumulate] * 4
        assert sum(len(step.packs) for step in tail) == 4
        batches = [batch for step in tail for batch in step.batches]
        idle = [batch for batch in batches if float(batch.weight_sum) == 0]
        assert len(idle) == 4 * accumulate - 1
        for batch in idle:
            assert batch.input_ids.tolist() == [77]
            assert batch.labels.tolist() == [IGNORE_INDEX]
            assert batch.cu_seqlens.tolist() == [0, 1] and batch.max_seqlen == 1
        assert [len(s) for s in sequences(tail)] == [32]
        assert sum(len(ids) for step in tail for ids in step.samples) == 1


def test_a_micro_batch_holds_all_packs_of_its_cell():
    source = Made([17] * 16)  # two of them fill a pack
    (step,) = part_of(source, {"packs_per_step": 8}, 1, ranks=2, accumulate=2, rank=1)
    assert [batch.cu_seqlens.tolist() for batch in step.batches] == [[0, 16, 32, 48, 64]] * 2


@pytest.mark.parametrize("balance", ["window", "none"])
def test_packs_are_dealt_by_their_costs(balance):
    source = Made(lengths(90))
    order = {"packs_per_step": 8, "balance": balance, "cost_a": 5}
    parts = [part_of(source, order, 3, rank=r, ranks=2, accumulate=2) for r in range(2)]
    for k in range(3):
        packs = parts[0][k].packs
        rows = [source.lengths[pack].astype(int) - 1 for pack in packs]
        costs = np.array([5 * of.sum() + of @ of for of in rows])
        cells = deal(costs, 2, 2, balance=balance)
        for rank in range(2):
            for micro in range(2):
                ids = np.concatenate([packs[place] for place in cells[micro, rank]])
                assert parts[rank][k].samples[micro].tolist() == ids.tolist()
                want = np.concatenate([source.sample(i).input_ids[:-1] for i in ids])
                assert parts[rank][k].batches[micro].input_ids.tolist() == want.tolist()


def test_a_batch_is_padded_as_asked():
    source = Made([20] * 8)
    (step,) = part_of(source, {"packs_per_step": 2}, 1, accumulate=2, pad_to=48, pad_id=5)
    for batch in step.batches:
        assert batch.input_ids.shape == (48,)
        assert batch.input_ids[19:].tolist() == [5] * 29
        assert batch.cu_seqlens.tolist() == [0, 19, 38, 48]


def test_loss_denominators_of_ranks_add_up():
    supervised = [1, 5, 3, 2, 9, 4, 6, 7] * 5
    source = Made([10] * 40, supervised=supervised)
    order = {"packs_per_step": 4}
    whole = part_of(source, order, 3)
    halves = [part_of(source, order, 3, rank=r, ranks=2, accumulate=2) for r in range(2)]
    for k, step in enumerate(whole):
        want = sum(supervised[i] for pack in step.packs for i in pack)
        assert sum(float(b.weight_sum) for b in step.batches) == want
        assert sum(float(b.weight_sum) for half in halves for b in half[k].batches) == want


def test_the_position_is_behind_what_was_given_out_not_what_was_made():
    found = stream(Made(lengths(90)), workers=2, depth=5)
    steps = iter(found)
    assert found.state_dict()["step"] == 0
    for k in range(4):
        next(steps)
        assert (found.state_dict()["epoch"], found.state_dict()["step"]) == (0, k + 1)
    steps.close()
    assert found.stall.results == 4


def test_an_iteration_goes_on_where_the_last_one_stopped():
    expected = part_of(Made(lengths(90)), {}, 9)
    found = stream(Made(lengths(90)))
    got = [step for _ in range(3) for step in islice(found, 3)]
    assert [names(step) for step in got] == [names(step) for step in expected]


def test_an_iteration_ends_when_the_stream_is_moved():
    found = stream(Made(lengths(90)))
    state = found.state_dict()
    old = iter(found)
    next(old)
    found.load_state_dict(state)
    with pytest.raises(RuntimeError, match="the stream was moved"):
        next(old)
    old = iter(found)
    next(old)
    next(iter(found))
    with pytest.raises(RuntimeError, match="the stream was moved"):
        next(old)


def test_any_step_is_read_alone():
    found = stream(Made(lengths(90)), rank=1, ranks=2)
    walked = list(islice(stream(Made(lengths(90)), rank=1, ranks=2), 40))
    for k in (39, 0, 13):
        step = found.step(k)
        assert (step.epoch, step.step) == (walked[k].epoch, walked[k].step)
        assert sequences([step]) == sequences([walked[k]])
    assert found.state_dict()["step"] == 0


def test_samples_are_found_in_their_sources():
    found = stream([Made([5, 6]), Made([7, 8, 9], first=50)])
    assert [found.sources.origin(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert found.sources.sample(3).input_ids.tolist() == list(range(51000, 51008))
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match=r"sample must be in \[0, 5\)"):
            found.sources.origin(wrong)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 3), method=st.sampled_from(METHODS))
def test_over_epochs_the_shares_are_those_of_the_weights(data, seed, method):
    """Exactly: after e epochs each source gave what its weight says, and up to one sample more."""
    made, weights = drawn_sources(data, seed)
    if not weights:
        weights = {"weights": (1.0,) * len(made), "weights_count": "tokens"}
    found = stream(made, {"seed": seed, "method": method} | weights)
    units = [
        {
            "samples": np.ones(len(of.lengths), int),
            "tokens": of.lengths.astype(int) - 1,
            "supervised": of.supervised,
        }[weights["weights_count"]]
        for of in made
    ]
    shares = [Fraction(weight) for weight in weights["weights"]]
    epoch = min(int(of.sum()) / share for of, share in zip(units, shares, strict=True))
    given_so_far = [0] * len(made)
    for number in range(4):
        for step in islice(found, found.steps_per_epoch):
            assert step.epoch == number
            for i in np.concatenate(step.packs).tolist():
                source, row = found.sources.origin(i)
                given_so_far[source] += int(units[source][row])
        for got, share, of in zip(given_so_far, shares, units, strict=True):
            wanted = math.floor((number + 1) * epoch * share)
            assert wanted <= got < wanted + int(of.max())


@pytest.mark.parametrize("unit", ["samples", "tokens", "supervised"])
def test_weights_count_what_they_are_told_to(unit):
    long = Made([31] * 60, supervised=[3] * 60)
    short = Made([11] * 400, first=100, supervised=[9] * 400)
    each = {"samples": (1, 1), "tokens": (30, 10), "supervised": (3, 9)}[unit]
    found = stream([long, short], {"weights": (1, 2), "weights_count": unit, "max_tokens": 64})
    steps = list(islice(found, found.steps_per_epoch))
    ids = np.concatenate([pack for step in steps for pack in step.packs])
    had = np.count_nonzero(ids < 60), np.count_nonzero(ids >= 60)
    # The whole of the source that runs out first, and of the other one what makes 1 : 2.
    want = {"samples": (60, 120), "tokens": (60, 360), "supervised": (60, 40)}[unit]
    assert had == want
    assert 2 * had[0] * each[0] == had[1] * each[1]


def test_a_state_is_small_json_that_says_what_it_is_of():
    source = Made(lengths(200))
    found = stream(source, {"method": "streaming", "window": 6, "seed": 4})
    list(islice(found, 7))
    state = json.loads(json.dumps(found.state_dict()))
    window = state.pop("window")
    assert state == {
        "version": 1,
        "fingerprint": source.fingerprint,
        "seed": 4,
        "epoch": 0,
        "step": 7,
        "packs_per_step": 4,
        "options": {
            "max_tokens": 32,
            "method": "streaming",
            "window": 6,
            "balance": "window",
            "balance_steps": 3,
            "cost_a": None,
            "weights": None,
            "weights_count": "samples",
        },
    }
    assert window["number"] == 2 and len(window["window"]) <= 6
    planned = stream(source)
    list(islice(planned, 7))
    assert planned.state_dict()["window"] is None


def test_a_state_tells_the_options_of_its_order():
    sources = [Made([5, 6]), Made([7, 8, 9], first=50)]
    found = stream(sources, {"weights": (1, 2.5), "seed": 7, "method": "next-fit", "cost_a": 9})
    assert read_options(json.loads(json.dumps(found.state_dict()))) == found.options


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"packs_per_step": 8}, "packs_per_step was 4, is 8"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"max_tokens": 40}, "max_tokens was 32, is 40"),
        ({"method": "streaming"}, "method was 'planned', is 'streaming'"),
        ({"balance_steps": 9}, "balance_steps was 3, is 9"),
        ({"weights": (1.0,)}, r"weights was None, is \[1.0\]"),
    ],
)
def test_a_state_of_other_options_is_refused_unless_forced(changed, message):
    found = stream(Made(lengths(90)))
    list(islice(found, 6))
    other = stream(Made(lengths(90)), changed)
    with pytest.raises(InputError, match=message):
        other.load_state_dict(found.state_dict())
    assert other.state_dict()["step"] == 0
    assert len(other.load_state_dict(found.state_dict(), force=True)) == 1
    assert other.state_dict()["step"] == (3 if "packs_per_step" in changed else 6)
    step = next(iter(other))
    assert names(step) == names(other.step(3 if "packs_per_step" in changed else 6))


def test_a_state_of_other_data_is_refused_unless_forced():
    found = stream(Made(lengths(90)))
    list(islice(found, 10))
    other = stream(Made(lengths(20, seed=1)))
    with pytest.raises(InputError, match="is of another run: fingerprint was"):
        other.load_state_dict(found.state_dict())
    (changed,) = other.load_state_dict(found.state_dict(), force=True)
    assert changed.startswith("fingerprint was")
    # The new epoch is shorter than where the old one was: it counts as trained.
    assert (other.state_dict()["epoch"], other.state_dict()["step"]) == (1, 0)


def test_the_order_of_the_sources_belongs_to_the_fingerprint():
    a, b = Made([5, 6]), Made([7, 8, 9], first=50)
    prints = {stream(sources).sources.fingerprint for sources in ([a], [a, b], [b, a], [b])}
    assert len(prints) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "must be of version 1, is of 2"),
        ({"step": 1000}, "epoch 0 has .* steps, no step 1000"),
        ({"step": -1}, "step of the stream's state must be a whole number, is -1"),
        ({"epoch": "0"}, "epoch of the stream's state must be a whole number, is '0'"),
        ({"epoch": True}, "epoch of the stream's state must be a whole number"),
        ({"options": None}, "options and window of the stream's state must be dictionaries"),
        ({"window": [1]}, "options and window of the stream's state must be dictionaries"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_state_is_refused(change, message, force):
    found = stream(Made(lengths(90)))
    with pytest.raises(InputError, match=message):
        found.load_state_dict(found.state_dict() | change, force=force)
    with pytest.raises(InputError, match="has no version"):
        found.load_state_dict({}, force=force)


@pytest.mark.parametrize(
    "order, options, message",
    [
        ({"packs_per_step": 6}, {"ranks": 4}, "must be a multiple of ranks = 4, is 6"),
        ({}, {"ranks": 2, "accumulate": 4}, "a multiple of ranks x accumulate = 2 x 4, is 4"),
        ({"packs_per_step": 64}, {"ranks": 64}, "an epoch has 2 packs, fewer than 64 ranks"),
        ({}, {"ranks": 2, "rank": 2}, r"rank must be in \[0, 2\), is 2"),
        ({}, {"pad_to": 31}, "pad_to must be at least 1 x max_tokens = 32"),
        ({}, {"pad_to": 127, "accumulate": 1}, "pad_to must be at least 4 x max_tokens = 128"),
        ({}, {"ranks": 0}, "ranks and accumulate must be at least 1, are 0 and None"),
        ({}, {"accumulate": 0}, "ranks and accumulate must be at least 1, are 1 and 0"),
        ({"max_tokens": 8}, {}, "source 1, row 2: the sample takes 9 rows of a pack, which has 8"),
        ({"weights": (1, 2)}, {}, "weights must be one for each source: 1, got 2"),
    ],
)
@pytest.mark.parametrize("method", ["planned", "streaming"])
def test_what_cannot_run_is_refused_at_once(order, options, message, method):
    with pytest.raises(InputError, match=message):
        stream(Made([5, 10, 8, 7, 9, 3]), order | {"method": method}, **options)


def test_no_samples_and_samples_without_targets_are_refused():
    for sources in ([], [Made([])]):
        with pytest.raises(InputError, match="no samples to train on"):
            stream(sources)
    with pytest.raises(InputError, match="source 2, row 2: a sample must have 2 tokens or more"):
        stream([Made([5]), Made([5, 1])])


def test_a_prepared_set_is_streamed(tmp_path):
    made = Made(lengths(60))
    write_store(tmp_path / "set", [made.sample(i) for i in range(60)])
    store = Store(tmp_path / "set")
    found = stream(store, {"method": "streaming"}, workers=2)
    steps = list(islice(found, found.steps_per_epoch))
    assert sequences(steps) == sequences(part_of(made, {"method": "streaming"}, len(steps)))
    assert found.state_dict()["fingerprint"] == store.fingerprint
    with pytest.raises(InputError, match="set, row 1: the sample takes"):
        stream(store, {"max_tokens": int(store.lengths[0]) - 2})


def test_an_unreadable_sample_is_an_error_where_its_step_would_be():
    source = Made(lengths(90))
    read = source.sample

    def sample(i: int):
        if i == 33:
            raise InputError("weights are negative", row=34)
        return read(i)

    source.sample = sample
    found = stream(source, workers=2)
    good = 0
    with pytest.raises(InputError, match="row 34: weights are negative"):
        for step in found:
            assert 33 not in np.concatenate(step.packs)
            good += 1
    assert found.state_dict()["step"] == good


def test_batches_are_pinned_where_asked(monkeypatch):
    from torch import Tensor

    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    (step,) = part_of(Made(lengths(20)), {}, 1, pin=True, accumulate=1)
    assert any(value is step.batches[0].input_ids for value in pinned)
    assert len(pinned) == 9  # every tensor of the one batch
    part_of(Made(lengths(20)), {}, 1, pin=False, accumulate=1)
    assert len(pinned) == 9
