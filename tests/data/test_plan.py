"""A plan from lengths, against values worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.sizes import TINY
from varlen_sft.data.balance import epoch_order
from varlen_sft.data.packing import OverlongSample, pack
from varlen_sft.data.plan import Bin, PlanOptions, Spread, histogram, make_plan
from varlen_sft.data.plan_overlong import OverlongPlan, fit_lengths
from varlen_sft.errors import InputError

LENGTHS = np.array([7, 3, 6, 4, 5, 5, 2], dtype=np.int32)
LABELS = np.array([7, 1, 2, 3, 0, 4, 1], dtype=np.int64)


def test_a_plan_by_hand():
    """Packs 7 + 3, 6 + 4, 5 + 5 and 2; two of them are a step of two ranks."""
    plan = make_plan(LENGTHS, LABELS, PlanOptions(max_tokens=10, ranks=2, epochs=2.5))
    assert (plan.samples, plan.tokens, plan.supervised) == (7, 32, 18)
    assert (plan.packing.packs, plan.packing.fill) == (4, 32 / 40)
    assert (plan.steps, plan.last_step_packs, plan.options.packs_per_step) == (2, 2, 2)
    # Sorted by tokens in the one window: 2 and 10 are a step, 10 and 10 the other.
    assert plan.step_tokens == Spread(16, 12, 20, pytest.approx(19.92))
    assert plan.step_supervised.mean == 9
    assert plan.imbalance == Spread(
        pytest.approx((10 / 6 + 1) / 2), 1.0, pytest.approx(10 / 6), pytest.approx(1.66, abs=0.01)
    )
    assert plan.waiting == pytest.approx(1 - 16 / 20)
    assert (plan.cost_a, plan.flops, plan.steps_wanted) == (None, None, 5)
    assert plan.overlong == OverlongPlan("error", 0, 0, 0, 0, 0, False)


def test_the_last_step_holds_what_is_left():
    plan = make_plan(LENGTHS, LABELS, PlanOptions(max_tokens=10, packs_per_step=3, ranks=3))
    assert (plan.steps, plan.last_step_packs) == (2, 1)
    assert plan.step_tokens == Spread(16, 2, 30, pytest.approx(29.72))
    assert plan.imbalance == Spread(1.0, 1.0, 1.0, 1.0) and plan.waiting == 0  # full steps alone
    plan = make_plan(LENGTHS, LABELS, PlanOptions(max_tokens=10, packs_per_step=8, ranks=2))
    assert (plan.steps, plan.last_step_packs) == (1, 4)
    assert plan.imbalance == Spread(0.0, 0.0, 0.0, 0.0)


def test_flops_and_costs_with_a_model():
    plan = make_plan(LENGTHS, LABELS, PlanOptions(max_tokens=10), TINY)
    squares = int((LENGTHS.astype(int) ** 2).sum())
    assert plan.flops is not None and plan.cost_a == TINY.a
    assert plan.flops.layers == 3 * TINY.per_token * 32
    assert plan.flops.attention == 3 * 2 * 2 * 4 * 2 * (squares + 32)
    assert plan.flops.head == 3 * 2 * 6 * 11 * 18


def test_a_dict_for_json():
    plan = make_plan(LENGTHS, LABELS, PlanOptions(max_tokens=10, ranks=2), TINY)
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["packing"]["packs"] == 4 and found["options"]["max_tokens"] == 10
    assert found["flops"]["total"] == plan.flops.total  # type: ignore[union-attr]
    assert found["histogram"][0] == {"low": 2, "high": 3, "samples": 1, "tokens": 2}


@pytest.mark.parametrize("epochs", [0.07, 1.0, 3.0, 2.341])
def test_steps_for_epochs(epochs):
    lengths = np.full(100, 10)
    plan = make_plan(lengths, lengths, PlanOptions(max_tokens=10, epochs=epochs))
    assert plan.steps_wanted == {0.07: 7, 1.0: 100, 3.0: 300, 2.341: 235}[epochs]


def test_balance_is_told_in_advance():
    drawn = np.random.default_rng(0).lognormal(7.2, 1.3, 30_000)
    lengths = np.clip(drawn.astype(np.int32), 1, 32768)
    plans = {
        balance: make_plan(
            lengths, lengths, PlanOptions(max_tokens=32768, ranks=8, balance=balance), TINY
        )
        for balance in ("window", "none")
    }
    assert plans["window"].imbalance.mean < 1.01 < 1.3 < plans["none"].imbalance.mean
    assert plans["window"].waiting < 0.01 < 0.2 < plans["none"].waiting
    assert plans["window"].packing == plans["none"].packing


def test_samples_are_packed_in_the_order_of_the_first_epoch():
    """Sorted by length a stream would be packed otherwise than shuffled."""
    lengths = np.arange(1, 101)
    options = PlanOptions(max_tokens=100, method="next-fit", seed=4)
    order = epoch_order(100, 4, 0)
    by_hand = pack(lengths[order], 100, "next-fit")
    assert make_plan(lengths, lengths, options).packing.packs == len(by_hand)
    assert len(by_hand) != len(pack(lengths, 100, "next-fit"))


# ------------------------------------------------------------------ over-long


def test_over_long_samples_are_refused_by_name():
    with pytest.raises(OverlongSample, match="sample 0 has length 7.*6; 2 samples are longer"):
        make_plan([7, 3, 8], [1, 1, 1], PlanOptions(max_tokens=6))


def test_dropped():
    plan = make_plan(LENGTHS, LABELS, PlanOptions(max_tokens=5, overlong="drop"))
    assert plan.overlong == OverlongPlan("drop", 2, 13, 7, 0, 0, False)
    assert (plan.samples, plan.tokens, plan.supervised) == (5, 19, 9)


def test_truncated():
    plan = make_plan(LENGTHS, LABELS, PlanOptions(max_tokens=5, overlong="truncate"))
    assert plan.overlong == OverlongPlan("truncate", 2, 13, 7, 2, 10, True)
    assert (plan.samples, plan.tokens) == (7, 29)
    assert plan.supervised == 9 + 5 + 2  # at most five of seven labels


def test_split():
    lengths, labels, over = fit_lengths(
        np.array([7, 3, 11, 5, 10]), np.array([7, 1, 5, 2, 10]), 5, "split"
    )
    assert lengths.tolist() == [3, 5, 5, 2, 5, 5, 1, 5, 5]
    assert labels.tolist() == [1, 2, 5, 2, 2, 2, 1, 5, 5]
    assert over == OverlongPlan("split", 3, 28, 11, 7, 28, True)


def test_nothing_over_long_is_left_as_it_is():
    for policy in ("error", "drop", "truncate", "split"):
        lengths, labels, over = fit_lengths(LENGTHS, LABELS, 7, policy)
        assert lengths is LENGTHS and labels is LABELS
        assert over == OverlongPlan(policy, 0, 0, 0, 0, 0, False)
    with pytest.raises(ValueError, match="overlong must be one of .*got 'cut'"):
        fit_lengths(LENGTHS, LABELS, 7, "cut")  # type: ignore[arg-type]


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("lengths", "options", "reason"),
    [
        ([], {}, "no sample to pack .0 were too long"),
        ([11, 12], {"overlong": "drop"}, "no sample to pack .2 were too long"),
        ([3, 4], {"ranks": 3}, "an epoch has 1 pack, fewer than 3 ranks"),
        ([3, 0], {}, "sample 1 has length 0, must be at least 1"),
        ([9, 9], {"packs_per_step": 3, "ranks": 2}, "multiple of ranks x accumulation = 2 x 1"),
        ([9], {"packs_per_step": 3, "accumulate": 2}, "multiple of ranks x accumulation = 1 x 2"),
    ],
)
def test_bad_input_is_named(lengths, options, reason):
    with pytest.raises(InputError, match=reason):
        make_plan(lengths, [1] * len(lengths), PlanOptions(max_tokens=10, **options))


def test_bad_arguments():
    with pytest.raises(InputError, match=r"\(2,\) lengths and \(1,\) supervised counts"):
        make_plan([1, 2], [1], PlanOptions(max_tokens=10))
    for name in ("max_tokens", "packs_per_step", "ranks", "accumulate", "window", "balance_steps"):
        with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
            PlanOptions(**{"max_tokens": 10, name: 0})
    with pytest.raises(TypeError, match="lengths must be integers"):
        make_plan([1.5], [1], PlanOptions(max_tokens=10))
    for epochs in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="epochs must be more than 0"):
            PlanOptions(max_tokens=10, epochs=epochs)


# ------------------------------------------------------------------ histogram


def test_a_histogram_by_hand():
    found = histogram(np.array([3, 4, 5, 6, 6, 11, 12]))
    assert found == (
        Bin(3, 4, 1, 3),
        Bin(4, 6, 2, 9),
        Bin(6, 8, 2, 12),
        Bin(8, 12, 1, 11),
        Bin(12, 16, 1, 12),
    )
    assert histogram(np.array([], dtype=int)) == ()
    assert histogram(np.array([1, 1])) == (Bin(1, 2, 2, 2),)
    assert histogram(np.array([1, 2, 3])) == (Bin(1, 2, 1, 1), Bin(2, 3, 1, 2), Bin(3, 4, 1, 3))
    assert histogram(np.array([2**40 + 2**39])) == (Bin(3 << 39, 1 << 41, 1, 3 << 39),)


def test_a_histogram_counts_everything():
    lengths = np.random.default_rng(0).lognormal(6, 2, 10_000).astype(np.int32) + 1
    found = histogram(lengths)
    assert sum(b.samples for b in found) == 10_000
    assert sum(b.tokens for b in found) == lengths.sum(dtype=int)
    assert found[0].low <= lengths.min() < found[0].high
    assert found[-1].low <= lengths.max() < found[-1].high
