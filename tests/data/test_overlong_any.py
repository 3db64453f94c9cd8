"""However a conversation is cut, it fits, and trains only what the whole would, nothing twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.overlong_rows import (
    ANSWERS,
    MODES,
    TEMPLATES,
    check_fitted,
    conversations,
    fit,
    is_part_of,
    longest,
    rows_of,
    targets,
    tokenizer,
    trained,
    turn,
)
from varlen_sft.data.overlong import fit_rows
from varlen_sft.data.sample import ROLES
from varlen_sft.data.turns import Turns

STOP = tokenizer().control.ids["<|im_end|>"]
templates = st.sampled_from(sorted(TEMPLATES))
modes = st.sampled_from(sorted(MODES))


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@settings(max_examples=60, deadline=None)
@given(conversations(), st.integers(5, 120), modes)
def test_any_split_trains_each_target_once_or_counts_it(template, conversation, limit, mode):
    options = MODES[mode]
    whole = tokenizer(template).encode(conversation, options)
    fitted = fit(conversation, limit, "split", options, template)
    check_fitted(fitted, whole, limit)
    turns = [turn(conversation, k) for k in range(len(Turns.of(conversation)))]
    alone = [rows_of(one, template) <= limit for one in turns]
    if len(whole) - 1 <= limit:
        assert fitted.outcome == "whole"
    elif mode == "assistant":
        begun = [longest(one, limit, template) for one in turns]
        expected = [
            text
            for one in begun
            if one is not None
            for text in trained(tokenizer(template), tokenizer(template).encode(one))
        ]
        got = [text for sample in fitted.samples for text in trained(tokenizer(template), sample)]
        assert got == expected
        assert fitted.outcome == ("split" if any(begun) else "dropped")
        if fitted.outcome == "split":
            assert len(fitted.left_out) == alone.count(False)
    if mode == "all" and template == "default_system" and all(alone):
        assert fitted.targets_lost == 0


@settings(max_examples=100, deadline=None)
@given(conversations(weights=True), st.integers(5, 120), templates, modes)
def test_any_truncation_is_the_longest_prefix(conversation, limit, template, mode):
    options = MODES[mode]
    whole = tokenizer(template).encode(conversation, options)
    fitted = fit(conversation, limit, "truncate", options, template)
    check_fitted(fitted, whole, limit) if fitted.outcome != "whole" else None
    if fitted.outcome == "whole" or mode.startswith("last"):
        assert fitted.outcome == ("whole" if len(whole) - 1 <= limit else "dropped")
        return
    part = longest(conversation, limit, template)
    assert [sample.input_ids.tolist() for sample in fitted.samples] == [
        tokenizer(template).encode(kept).input_ids.tolist() for kept in [part] if kept is not None
    ]


@settings(max_examples=100, deadline=None)
@given(conversations(), st.integers(5, 120), templates, st.sampled_from(["truncate", "split"]))
def test_only_answers_are_trained_and_all_with_their_stop_tokens(
    conversation, limit, template, overlong
):
    fitted = fit(conversation, limit, overlong, ANSWERS, template)
    for sample in fitted.samples:
        weights = np.append(sample.token_weights, 0)
        assert (sample.roles[sample.token_weights > 0] == ROLES.index("assistant")).all()
        assert (sample.token_weights[sample.roles == ROLES.index("assistant")] == 1).all()
        last = (weights[:-1] > 0) & (weights[1:] == 0)
        assert (sample.input_ids[last] == STOP).all()


@settings(max_examples=60, deadline=None)
@given(conversations(), st.integers(5, 120), st.sampled_from(["assistant", "all", "prompt"]))
def test_equal_weight_is_of_the_row_and_not_of_the_part(conversation, limit, mode):
    options = replace(MODES[mode], equal_sample_weight=True)
    for overlong in ("split", "truncate"):
        fitted = fit(conversation, limit, overlong, options)
        sums = [sample.token_weights[1:].sum(dtype=np.float64) for sample in fitted.samples]
        assert sum(sums) == pytest.approx(1, abs=1e-6) or not sums
        used = {float(w) for s in fitted.samples for w in s.token_weights[1:] if w}
        assert mode == "prompt" or max(used, default=1) == pytest.approx(min(used, default=1))


@settings(max_examples=40, deadline=None)
@given(conversations(), st.integers(5, 120), st.sampled_from(["assistant", "all", "roles"]))
def test_any_row_of_each_answer(conversation, limit, mode):
    options = replace(MODES[mode], history="per_assistant")
    whole = tokenizer().encode_many([conversation], options)
    wanted = targets(*tokenizer().encode_many([conversation], options))
    for overlong in ("truncate", "split"):
        fitted = fit(conversation, limit, overlong, options)
        assert all(len(sample) - 1 <= limit for sample in fitted.samples)
        assert is_part_of(targets(*fitted.samples), wanted)
        assert fitted.targets_lost == len(wanted) - len(targets(*fitted.samples))
    fits = [targets(sample) for sample in whole if len(sample) - 1 <= limit]
    assert sum(fits, []) == targets(*fit(conversation, limit, "truncate", options).samples)


@settings(max_examples=20, deadline=None)
@given(st.lists(conversations(), min_size=2, max_size=6), st.integers(5, 120))
def test_a_batch_is_as_its_rows_one_by_one(rows, limit):
    for overlong in ("split", "truncate"):
        together = fit_rows(tokenizer(), rows, ANSWERS, limit, overlong)
        for row, fitted in zip(rows, together, strict=True):
            alone = fit(row, limit, overlong)
            assert [s.input_ids.tolist() for s in fitted.samples] == [
                s.input_ids.tolist() for s in alone.samples
            ]
            assert replace(fitted, samples=()) == replace(alone, samples=())
