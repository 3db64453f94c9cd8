"""Arrays read in pieces are what json reads whole; rows of any shape are rows or have a reason."""

from __future__ import annotations

import io
import json
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from varlen_sft.data import json_rows
from varlen_sft.data.conversation import Conversation, ConversationError, Text, Tokens
from varlen_sft.data.formats import MODES, REFUSED, parse_row
from varlen_sft.data.json_rows import json_array
from varlen_sft.data.messages import METADATA, ROLE_NAMES
from varlen_sft.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
ROWS = st.lists(JSON, max_size=5)


@given(ROWS, st.integers(1, 9), st.sampled_from([None, 0, 3]), st.booleans())
def test_an_array_in_pieces_is_the_array(rows, chunk, indent, ascii_only):
    # Lone surrogates can be written as escapes only.
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    data = text.encode("utf-8", "replace" if not ascii_only else "strict")
    with mock.patch.object(json_rows, "CHUNK", chunk):
        found = list(json_array(io.BytesIO(data)))
    assert found == list(enumerate(json.loads(data), 1))


@given(ROWS, st.integers(1, 9), st.data())
def test_a_part_of_an_array_gives_the_rows_before_and_an_error(rows, chunk, data):
    text = json.dumps(rows).encode()
    part = text[: data.draw(st.integers(0, len(text) - 1))]
    found = []
    with mock.patch.object(json_rows, "CHUNK", chunk), pytest.raises(InputError) as caught:
        for number, row in json_array(io.BytesIO(part)):
            found.append(row)
            assert number == len(found)
    whole = found if not found or not isinstance(found[-1], (int, float)) else found[:-1]
    assert whole == rows[: len(whole)]  # a number at the end may have lost its last digits
    assert caught.value.row in (len(found), len(found) + 1)


# -- any row

KEYS = [
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output"),
    *("response", "history", "text", "input_ids", "labels", "loss_mask", "assistant_masks"),
    *("mask_token_ids", "mask_spans", "attention_mask", "position_ids", "seq_lengths", "tools"),
    *("chat_template_kwargs", "system", "weight", "id", sorted(REFUSED)[0]),
]
FUNCTION = st.fixed_dictionaries({}, optional={"name": JSON, "arguments": JSON})
CALL = st.fixed_dictionaries({}, optional={"type": JSON, "function": FUNCTION | JSON, "name": JSON})
PART = st.fixed_dictionaries({"type": st.just("text")}, optional={"text": JSON})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(sorted(ROLE_NAMES)), "content": JSON | st.text() | st.lists(PART)},
    optional={
        "tool_calls": st.lists(CALL | JSON) | JSON,
        "reasoning": JSON,
        "thinking": JSON,
        "weight": JSON,
        "train": JSON,
        "name": JSON,
        sorted(METADATA)[0]: JSON,
    },
)
MESSAGES = st.lists(MESSAGE, max_size=4)
NUMBERS = st.lists(st.integers(-101, 5) | st.booleans() | st.floats(), max_size=4)
VALUES = JSON | MESSAGES | NUMBERS | st.integers(min_value=10**18) | st.text()
ANY_ROW = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)


@given(ANY_ROW, st.sampled_from([None, *MODES]))
@example({"messages": [{"role": "user", "content": []}]}, None)
@example({"input_ids": [[1], [2, 3]], "labels": {}}, None)
def test_any_row_is_a_row_or_has_a_reason(row, mode):
    try:
        parsed = parse_row(row, mode=mode)
    except ConversationError as error:
        assert str(error)
    else:
        assert isinstance(parsed, (Conversation, Text, Tokens))
