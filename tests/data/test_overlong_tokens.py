"""Documents, completions and tokens made elsewhere, cut: every token and its weight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.overlong_rows import (
    check_fitted,
    fit,
    targets,
    tokenizer,
)
from varlen_sft.data.conversation import Text, Tokens

STOP = tokenizer().control.ids["<|im_end|>"]


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=80), st.integers(1, 40))
def test_every_token_of_a_document_but_the_first_is_a_target_once(text, limit):
    row = Text("x" + text, weight=0.5)
    whole = tokenizer().encode(row)
    fitted = fit(row, limit, "split")
    assert targets(*fitted.samples) == whole.input_ids[1:].tolist()
    check_fitted(fitted, whole, limit)
    assert fitted.samples[0].input_ids[0] == whole.input_ids[0]
    if fitted.outcome == "split":
        assert all(sample.token_weights[0] == 0 for sample in fitted.samples[1:])
        assert all(len(sample) == limit + 1 for sample in fitted.samples[:-1])
    for sample in fitted.samples:
        assert set(sample.token_weights[1:]) == {0.5}
    for one, other in zip(fitted.samples, fitted.samples[1:], strict=False):
        assert one.input_ids[-1] == other.input_ids[0]
    (cut,) = fit(row, limit, "truncate").samples
    assert cut.input_ids.tolist() == whole.input_ids[: limit + 1].tolist()
    assert (STOP in targets(cut)) == (len(whole) - 1 <= limit)


def test_a_document_by_hand():
    fitted = fit(Text("hello world it is."), 3, "split")
    texts = [tokenizer().decode(sample.input_ids) for sample in fitted.samples]
    assert texts == ["hello world it", " it is.<|im_end|>"]
    assert [sample.token_weights.tolist() for sample in fitted.samples] == [[1] * 4, [0, 1, 1, 1]]


def test_a_prompt_and_its_completion_are_one_turn():
    row = Text("world", "hello")
    rows = len(tokenizer().encode(row)) - 1
    for overlong in ("truncate", "split"):
        fitted = fit(row, rows - 1, overlong)
        assert (fitted.samples, fitted.outcome) == ((), "dropped")
        assert fitted.left_out == (
            f"{rows} rows do not fit a pack of {rows - 1} tokens: a prompt and its completion are "
            "not cut",
        )
        assert fit(row, rows, overlong).outcome == "whole"


def tokens(*weights: float) -> Tokens:
    ids = np.arange(3, 3 + len(weights), dtype=np.int32)
    return Tokens(ids, np.array(weights, dtype=np.float32))


@pytest.mark.parametrize(
    ("weights", "rows", "kept", "masked", "lost"),
    [
        ((0, 0, 1, 1, 0, 0, 2, 2, 2, 0), 7, [0, 0, 1, 1, 0, 0, 0, 0], 1, 3),
        ((0, 0, 1, 1, 0, 0, 2, 2, 0, 0), 7, [0, 0, 1, 1, 0, 0, 2, 2], 0, 0),
        ((0, 0, 1, 1, 0, 0, 2, 2, 2, 0), 5, [0, 0, 1, 1, 0, 0], 0, 3),
        ((1, 1, 1, 1, 1, 1), 3, [1, 1, 1, 1], 0, 2),  # a document
        ((0, 1, 1, 1, 1, 1), 3, [0, 1, 1, 1], 0, 2),  # after its first token
    ],
)
def test_tokens_are_truncated_without_half_an_answer(weights, rows, kept, masked, lost):
    fitted = fit(tokens(*weights), rows, "truncate")
    assert [s.token_weights.tolist() for s in fitted.samples] == [kept]
    assert fitted.samples[0].input_ids.tolist() == list(range(3, 3 + rows + 1))
    assert (fitted.runs_masked, fitted.targets_lost) == (masked, lost)


def test_parts_of_tokens_without_a_target_are_left_out_and_counted():
    fitted = fit(tokens(1, 1, 0, 0, 0, 0, 0.5), 2, "split")
    ids = [sample.input_ids.tolist() for sample in fitted.samples]
    assert (ids, fitted.parts_untrained) == ([[3, 4, 5], [7, 8, 9]], 1)
    assert [s.token_weights.tolist() for s in fitted.samples] == [[1, 1, 0], [0, 0, 0.5]]


def test_tokens_of_one_cut_answer_are_dropped():
    fitted = fit(tokens(0, 0, 1, 1, 1), 3, "truncate")
    assert (fitted.samples, fitted.outcome, fitted.targets_lost) == ((), "dropped", 3)
    assert fitted.left_out == (
        "4 rows do not fit a pack of 3 tokens: nothing of it that fits is trained",
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40), st.integers(1, 20))
def test_any_tokens_are_split_with_their_weights(weights, limit):
    row = tokens(*weights)
    fitted = fit(row, limit, "split")
    got = {
        int(token): float(weight)
        for sample in fitted.samples
        for token, weight in zip(sample.input_ids[1:], sample.token_weights[1:], strict=True)
    }
    assert all(len(sample) - 1 <= limit for sample in fitted.samples)
    assert sum(len(s) - 1 for s in fitted.samples) == len(got)
    expected = dict(zip(row.input_ids[1:].tolist(), weights[1:], strict=True))
    assert got.items() <= expected.items()
    assert all(expected[token] == 0 for token in expected.keys() - got.keys())
    assert fitted.targets_lost == 0
