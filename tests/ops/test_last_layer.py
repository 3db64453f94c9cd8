from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import relative_error
from varlen_sft import reference
from varlen_sft.ops import last_layer
from varlen_sft.ops.cross_entropy import linear_cross_entropy, supervised_rows
from varlen_sft.ops.last_layer import (
    LastRows,
    last_rows,
    pick_rows,
    query_runs,
    rows_cross_entropy,
)
from varlen_sft.ops.sequences import sequences_from_lengths

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=6)


def rows_of(*spans: tuple[int, int]) -> torch.Tensor:
    return torch.cat([torch.arange(a, b) for a, b in spans])


# ------------------------------------------------------------------------ queries


def test_one_answer_at_the_end_of_each_sequence_queries_it_with_keys_as_they_lie():
    sequences = sequences_from_lengths([50, 10, 40])
    rows = rows_of((40, 50), (90, 100))
    runs = query_runs(rows, sequences)
    assert runs.k_rows is None and runs.k_sequences is sequences and runs.kept is None
    assert torch.equal(runs.rows, rows)
    assert runs.sequences.cu_seqlens.tolist() == [0, 10, 10, 20]
    assert runs.sequences.max_seqlen == 10 and runs.sequences.cu_seqlens.dtype == torch.int32


def test_a_short_end_that_is_not_supervised_is_queried_too():
    runs = query_runs(rows_of((40, 48)), sequences_from_lengths([50]))
    assert runs.k_rows is None and torch.equal(runs.rows, torch.arange(40, 50))
    assert runs.kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_answers_far_apart_become_sequences_with_the_keys_before_them():
    rows = rows_of((5, 10), (500, 510), (1010, 1020), (1700, 1710))
    runs = query_runs(rows, sequences_from_lengths([1000, 1000]))
    assert torch.equal(runs.rows, rows) and runs.kept is None
    assert runs.sequences.cu_seqlens.tolist() == [0, 5, 15, 25, 35]
    spans = (0, 10), (0, 510), (1000, 1020), (1000, 1710)
    assert torch.equal(runs.k_rows, rows_of(*spans))
    assert runs.k_sequences.lengths() == [b - a for a, b in spans]
    assert runs.k_sequences.max_seqlen == 710


def test_a_gap_is_queried_while_it_is_short():
    gap = last_layer.LONGEST_GAP
    for start, count in ((300 + gap, 1), (301 + gap, 2)):
        rows = rows_of((290, 300), (start, start + 10), (1990, 2000))
        runs = query_runs(rows, sequences_from_lengths([1000, 1000]))
        assert len(runs.sequences.cu_seqlens) - 1 == count + 1
        assert len(runs.rows) == (start + 10 - 290 if count == 1 else 20) + 10


def test_without_copies_all_rows_after_the_first_supervised_one_are_queried():
    rows = rows_of((5, 10), (500, 510), (1700, 1710))
    runs = query_runs(rows, sequences_from_lengths([600, 2000]), copy_keys=False)
    assert runs.k_rows is None
    assert torch.equal(runs.rows, rows_of((5, 600), (1700, 2600)))
    assert torch.equal(runs.rows[runs.kept], rows)


def test_nobody_waits_for_a_device_unasked(monkeypatch):
    """Where the host does not see rows, they stay as they are; asked to look, no key is copied."""
    sequences, rows = (
        sequences_from_lengths([600, 2000]),
        rows_of((5, 10), (500, 510), (2500, 2510)),
    )
    padded = torch.cat([rows, torch.full((3,), -1)])
    assert last_rows(padded, 2600, sequences).runs.k_rows is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    unseen = last_rows(padded, 2600, sequences)
    assert unseen.rows is padded and unseen.runs is None
    seen = last_rows(padded, 2600, sequences, wait=True)
    assert torch.equal(seen.rows, rows) and seen.runs.k_rows is None
    assert torch.equal(seen.runs.rows, rows_of((5, 600), (2500, 2600)))


def test_few_counts_of_rows_and_queries_occur():
    """750 queries round to a multiple of 64, 301 rows to one of 32; no key is added."""
    sequences = sequences_from_lengths([700, 700])
    rows = torch.cat((torch.arange(0, 600, 2), torch.tensor([1350])))
    last = last_rows(rows, 1400, sequences)
    assert len(last.rows) == 320 and torch.equal(last.rows[:301], rows)
    assert last.rows[301:].eq(-1).all() and last.runs.kept[301:].eq(-1).all()
    plain = query_runs(rows, sequences)
    count = len(plain.rows)
    assert count == 750 and len(last.runs.rows) == 768
    assert torch.equal(last.runs.rows[:count], plain.rows) and last.runs.rows[count:].eq(-1).all()
    for own, before, more in (
        (last.runs.sequences, plain.sequences, 18), (last.runs.k_sequences, plain.k_sequences, 0)
    ):  # fmt: skip
        end = int(before.cu_seqlens[-1]) + more
        assert own.cu_seqlens.tolist() == [*before.cu_seqlens.tolist(), end]
    counts = {last_layer._rounded(n) for n in range(512, 1025)}
    assert counts == set(range(512, 1025, 64))
    assert [last_layer._rounded(n) for n in (1, 127, 255, 257)] == [1, 127, 256, 288]


def test_nearly_all_rows_are_not_worth_picking():
    sequences = sequences_from_lengths([100])
    assert last_rows(torch.arange(81), 100, sequences) is None
    assert last_rows(torch.arange(80), 100, sequences) is not None
    assert last_rows(torch.full((128,), -1), 1000, sequences) is None  # nothing to train
    assert last_rows(torch.empty(0, dtype=torch.int64), 1000, sequences) is None
    assert query_runs(rows_of((1, 3)), sequences, copy_keys=False) is None


def test_rows_out_of_order_are_refused():
    with pytest.raises(ValueError, match="rows must be in ascending order"):
        last_rows(torch.tensor([3, 2]), 100, sequences_from_lengths([100]))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.booleans(), st.randoms(use_true_random=False))
def test_every_supervised_row_has_its_query_and_all_keys_up_to_it(lengths, every, copy, random):
    sequences, total = sequences_from_lengths(lengths), sum(lengths)
    rows = torch.tensor(sorted(random.sample(range(total), max(1, total // every))))
    runs = query_runs(rows, sequences, copy_keys=copy)
    if runs is None:
        return
    kept = runs.rows if runs.kept is None else runs.rows[runs.kept]
    assert torch.equal(kept, rows)
    keys = torch.arange(total) if runs.k_rows is None else runs.k_rows
    q_edges, k_edges = (s.cu_seqlens.tolist() for s in (runs.sequences, runs.k_sequences))
    assert len(q_edges) == len(k_edges) and q_edges[-1] == len(runs.rows)
    assert k_edges[-1] == len(keys)
    starts = sequences.cu_seqlens.tolist()
    for i in range(len(q_edges) - 1):
        own, its_keys = runs.rows[q_edges[i] : q_edges[i + 1]], keys[k_edges[i] : k_edges[i + 1]]
        if len(own) == 0:
            continue
        begin = max(s for s in starts if s <= int(own[0]))
        assert torch.equal(its_keys, torch.arange(begin, int(own[-1]) + 1))
        assert torch.equal(own, torch.arange(int(own[0]), int(own[-1]) + 1))


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(2, 9), st.sampled_from([None, 8]), st.randoms(use_true_random=False))
def test_attention_of_the_runs_is_that_of_the_pack(lengths, every, window, random):
    sequences, total = sequences_from_lengths(lengths), sum(lengths)
    rows = torch.tensor(sorted(random.sample(range(total), max(1, total // every))))
    runs = query_runs(rows, sequences)
    if runs is None:
        return
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(total, h, 8, generator=generator, dtype=torch.double, requires_grad=True)
        for h in (4, 2, 2)
    )
    whole = reference.varlen_attention(q, k, v, sequences, window_size=window)[rows]
    own_k, own_v = k, v
    if runs.k_rows is not None:
        own_k, own_v = (pick_rows(x, runs.k_rows, repeated=True) for x in (k, v))
    few = reference.varlen_attention(
        pick_rows(q, runs.rows), own_k, own_v, runs.sequences, k_sequences=runs.k_sequences,
        window_size=window,
    )  # fmt: skip
    few = few if runs.kept is None else pick_rows(few, runs.kept)
    assert relative_error(few.detach(), whole.detach()) < 1e-12
    weight = torch.linspace(-1, 1, whole.numel(), dtype=torch.double).view_as(whole)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (few, whole)),
                    strict=True):  # fmt: skip
        assert relative_error(a, b) < 1e-10


# ------------------------------------------------------------------- rows, device


def test_picked_rows_and_their_gradients():
    x = torch.randn(5, 2, 3, dtype=torch.double, requires_grad=True)
    rows = torch.tensor([4, 1, -1, 2, -1])
    picked = pick_rows(x, rows)
    assert torch.equal(picked[[0, 1, 3]], x[[4, 1, 2]])
    grad = torch.randn_like(picked)
    (dx,) = torch.autograd.grad(picked, x, grad)
    assert torch.equal(dx[[4, 1, 2]], grad[[0, 1, 3]]) and (dx[[0, 3]] == 0).all()


def test_pads_pick_a_row_that_is_picked_anyway():
    """Row 0 may hold anything, and 0 * NaN would be in the gradients of the layer's weights."""
    x = torch.tensor([[float("nan")], [1.0], [2.0]])
    assert pick_rows(x, torch.tensor([1, 2, -1])).flatten().tolist() == [1.0, 2.0, 2.0]
    assert pick_rows(x, torch.tensor([], dtype=torch.int64)).shape == (0, 1)


def test_gradients_of_repeated_rows_are_added_in_fp32():
    x = torch.zeros(3, 1, dtype=torch.bfloat16, requires_grad=True)
    picked = pick_rows(x, torch.tensor([1] * 300 + [2]), repeated=True)
    (dx,) = torch.autograd.grad(picked.sum(), x)
    assert dx.flatten().tolist() == [0.0, 300.0, 1.0]  # one by one bf16 stops at 256
    assert dx.dtype == torch.bfloat16


def test_loss_of_picked_rows_is_that_of_all():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 8, generator=generator, dtype=torch.double, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.double, requires_grad=True)
    labels = torch.randint(0, 11, (200,), generator=generator)
    labels[torch.rand(200, generator=generator) < 0.7] = -100
    weights = torch.rand(200, generator=generator)
    rows = supervised_rows(labels, weights)
    assert rows[-1] == -1
    whole = linear_cross_entropy(hidden, weight, labels, token_weights=weights, rows=rows)
    few = rows_cross_entropy(
        pick_rows(hidden, rows), weight, labels, token_weights=weights, rows=rows
    )
    for a, b in zip(whole, few, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    a, b = (torch.autograd.grad(x.loss_sum, (hidden, weight)) for x in (whole, few))
    assert relative_error(a[0], b[0]) < 1e-12 and relative_error(a[1], b[1]) < 1e-12


def test_moving_keeps_every_tensor_and_none():
    made = last_rows(rows_of((5, 10), (500, 510)), 1000, sequences_from_lengths([1000]))
    moved = made.to("meta")
    assert moved.runs.rows.device.type == moved.runs.k_rows.device.type == "meta"
    assert moved.runs.sequences.cu_seqlens.device.type == "meta" and moved.runs.kept is None
    assert moved.runs.k_sequences.max_seqlen == made.runs.k_sequences.max_seqlen == 510
    assert LastRows(made.rows).to("meta").runs is None
