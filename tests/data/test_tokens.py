"""Rows of tokens made elsewhere: which of them are trained, and rows that are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from varlen_sft.data.formats import ConversationError, Tokens, parse_row


def reason(row: object, **options) -> str:
    with pytest.raises(ConversationError) as caught:
        parse_row(row, **options)
    return str(caught.value)


def weights(row: dict, **options) -> list[float]:
    tokens = parse_row(row, **options)
    assert isinstance(tokens, Tokens)
    assert tokens.input_ids.dtype == np.int32 and tokens.token_weights.dtype == np.float32
    assert tokens.input_ids.tolist() == list(row["input_ids"])
    return tokens.token_weights.tolist()


IDS = [5, 6, 7, 8]
MASKED = {
    "labels": [-100, 6, -100, 8],
    "loss_mask": [0, 1.0, False, True],
    "assistant_masks": [0, 1, 0, 1],
}


def test_each_mask_speaks_of_its_own_token():
    for name, mask in MASKED.items():
        assert weights({"input_ids": IDS, name: mask}) == [0, 1, 0, 1]
    assert weights({"input_ids": IDS, **MASKED, "messages": [], "tools": [{}]}) == [0, 1, 0, 1]
    assert weights({"input_ids": IDS, "loss_mask": [0, 0.5, 2, 0]}) == [0, 0.5, 2, 0]
    row = {"input_ids": IDS, "loss_mask": [0, 0.5, 0, 2], "labels": MASKED["labels"]}
    assert weights({**row, "weight": 2}) == [0, 1, 0, 4]
    unsigned = {"input_ids": np.array(IDS, np.uint16), "labels": np.array(MASKED["labels"])}
    assert weights(unsigned) == [0, 1, 0, 1]


def test_tokens_that_are_never_trained():
    row = {"input_ids": IDS, "labels": IDS}
    assert weights({**row, "mask_token_ids": [6]}) == [1, 0, 1, 1]
    assert weights(row, mask_token_ids=(8, 99)) == [1, 1, 1, 0]
    assert weights({**row, "mask_spans": [[0, 1], [2, 4]]}) == [0, 1, 0, 0]
    assert weights({"input_ids": IDS}, mode="pretrain", mask_token_ids=[5]) == [0, 1, 1, 1]


def test_tokens_that_are_one_whole_row():
    row = {"input_ids": IDS, "labels": IDS, "attention_mask": [1] * 4}
    assert weights({**row, "position_ids": [0, 1, 2, 3], "seq_lengths": [4]}) == [1] * 4


BAD_TOKENS = {
    "input_ids without labels, loss_mask or assistant_masks, so what is trained is not known "
    "('pretrain:' before the source trains every token, 'search:' what lies between the headers of "
    "answers and their stop tokens)": {},
    "the labels look already shifted, labels[i] == input_ids[i + 1]; expected Hugging Face's "
    "convention, labels[i] == input_ids[i] or -100": {"labels": [-100, 7, 8, -100]},
    "labels[2] must be input_ids[2] = 7 or -100, got 9": {"labels": [5, 6, 9, 8]},
    "4 input_ids, but 3 labels": {"labels": [5, 6, 7]},
    "4 input_ids, but 5 loss_mask": {"loss_mask": [1] * 5},
    "assistant_masks[1] must be 0 or 1, got 0.5": {"assistant_masks": [0, 0.5, 0, 0]},
    "'labels' and 'loss_mask' disagree on whether token 3 is trained": {
        "labels": [5, 6, 7, -100],
        "loss_mask": [1, 0.5, 1, 1],
    },
    "the weight of token 1 must be finite and not negative, got -1.0": {"loss_mask": [1, -1, 1, 1]},
    "the weight of token 0 must be finite and not negative, got nan": {
        "loss_mask": [math.nan, 1, 1, 1]
    },
    "'loss_mask' must be a list of numbers, got a string": {"loss_mask": "1111"},
    "'labels' must be a flat list of integers, got float64 of shape (4,)": {
        "labels": [5.0, 6.0, 7.0, 8.0]
    },
    "'input_ids' must be a flat list of integers, got int64 of shape (1, 2)": {
        "input_ids": [[5, 6]],
        "labels": [5],
    },
    "'input_ids' must be a flat list of integers": {"input_ids": [[5], [6, 7]]},
    "'input_ids' must be a flat list of integers, got bool of shape (2,)": {
        "input_ids": [True, False]
    },
    "'input_ids' must be a flat list of integers, got object of shape (1,)": {"input_ids": [2**70]},
    "'input_ids' has an entry beyond 64 bits, 9223372036854775808": {"input_ids": [2**63]},
    "'input_ids' is empty": {"input_ids": [], "labels": []},
    "token 1 has the id 2147483648 > 2147483647": {"input_ids": [1, 2**31], "labels": [1, 2**31]},
    "token 1 has the negative id -3": {"input_ids": [1, -3], "labels": [1, -100]},
    "attention_mask must be all 1: take the padding off the row": {"attention_mask": [0, 1, 1, 1]},
    "position_ids must be 0 to L - 1: a row is one sample, not a pack": {
        "position_ids": [0, 1, 0, 1]
    },
    "seq_lengths must be the one length L: a row is one sample, not a pack": {
        "seq_lengths": [2, 2]
    },
    "'mask_spans' must be a list of pairs, got a number": {"labels": IDS, "mask_spans": 3},
    "span 2 of mask_spans must be a [start, end) in 4 tokens, got [3, 5]": {
        "labels": IDS,
        "mask_spans": [[0, 1], [3, 5]],
    },
    "span 1 of mask_spans must be a [start, end) in 4 tokens, got [1]": {
        "labels": IDS,
        "mask_spans": [[1]],
    },
    "'mask_token_ids' must be a list of integers, got a number": {
        "labels": IDS,
        "mask_token_ids": 5,
    },
    "the field 'pixel_values' is not supported in such a row": {"pixel_values": [1.0]},
    "the weight of token 0 must be finite and not negative, got -2.0": {
        "labels": IDS,
        "weight": -2,
    },
}


@pytest.mark.parametrize("expected", BAD_TOKENS)
def test_bad_tokens_are_named(expected):
    assert reason({"input_ids": IDS, **BAD_TOKENS[expected]}) == expected
