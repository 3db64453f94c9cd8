"""Many rows weighed in one line of tokens are the rows weighed one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_chat import CHATML, TOKENS, talk, train_tokenizer
from varlen_sft.data import edges
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError, Message
from varlen_sft.data.edges import TextEncoder
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.template import ChatTemplate

TINY = ChatTokenizer(train_tokenizer().to_str(), ChatTemplate(CHATML, TOKENS))
STOP = 2  # <|im_end|>; the ids below 3 are special
WORDS = ["hello", "é", "🤖", "\n\n", " ", "what is it?", "<|end|>", "<|im_start|>"]
SAID = [word for word in WORDS if word[0] != "<"] + ["", "world"]
OPTIONS = [
    MaskOptions(),
    MaskOptions(supervision_mode="all", prompt_weight=0.5),
    MaskOptions(supervision_mode="last_assistant", prompt_weight=0.25),
    MaskOptions(supervision_mode="roles", roles=("user", "system")),
    MaskOptions(supervision_mode="roles", roles=("assistant", "user"), prompt_weight=0.5),
    MaskOptions(mask_special_tokens=True, prompt_weight=1.0),
]


def naive(row: Conversation, options: MaskOptions) -> Sample:
    """One token at a time, by the bytes that it stands for: what design calls supervised."""
    text, ids = b"", []
    spans: list[tuple[int, int, str, int]] = []
    for number, message in enumerate(row.messages):
        header = f"<|im_start|>{message.role}\n".encode()
        content = message.content.encode()
        start = len(text) + len(header)
        # Answers before the last are history, if it alone is trained: contents without a stop.
        alone = options.supervision_mode == "last_assistant" and number + 1 < len(row.messages)
        stop = 0 if alone or message.role != "assistant" else len(b"<|im_end|>")
        # White space before a content is the template's as well as the user's.
        ahead = 0 if stop else len(content) - len(content.lstrip())
        spans.append((start + ahead, start + len(content) + stop, message.role, number))
        text += header + content + b"<|im_end|>\n"
    ids = [int(token) for token in TINY.encode(row, options).input_ids]
    table = TINY._encoder.token_bytes
    assert b"".join(table[token] for token in ids) == text
    whole = 1.0 if options.supervision_mode == "all" else options.prompt_weight
    weights, roles, stops = [whole] * len(ids), [0] * len(ids), [False] * len(ids)
    last = max(n for *_, role, n in spans if role == "assistant")
    for is_answer in (False, True):
        for start, end, role, number in spans:
            if (role == "assistant") != is_answer:
                continue
            value = 1.0 if is_answer or role in options.roles else whole
            if is_answer and options.supervision_mode == "roles":
                value = float("assistant" in options.roles)
            if is_answer and options.supervision_mode == "last_assistant":
                value = float(number == last)
            at = 0
            for k, token in enumerate(ids):
                if at < end and at + len(table[token]) > start:
                    roles[k], stops[k] = ROLES.index(role), is_answer and token == STOP
                    weights[k] = value * row.messages[number].weight
                at += len(table[token])
    if options.mask_special_tokens:
        kept = zip(ids, weights, stops, strict=True)
        weights = [0.0 if token < 3 and not stop else weight for token, weight, stop in kept]
    return Sample(np.array(ids, np.int32), np.array(weights, np.float32), np.array(roles, np.uint8))


@st.composite
def conversations(draw):
    weights = st.sampled_from([1.0, 1.0, 0.3, 0.0])
    asked = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
    said = st.lists(st.sampled_from(SAID), max_size=4).map("".join)
    messages = [Message("system", draw(asked))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(asked), weight=draw(weights)))
        messages.append(Message("assistant", draw(said), weight=draw(weights)))
    return Conversation(tuple(messages))


@settings(max_examples=60, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=6), st.sampled_from(OPTIONS))
def test_rows_in_one_line_are_the_rows_token_by_token(rows, options):
    made = TINY.encode_rows(rows, options)
    for row, found in zip(rows, made, strict=True):
        if isinstance(found, ConversationError):
            raise found
        (sample,), expected = found, naive(row, options)
        np.testing.assert_array_equal(sample.input_ids, expected.input_ids)
        np.testing.assert_array_equal(sample.token_weights, expected.token_weights)
        np.testing.assert_array_equal(sample.roles, expected.roles)


def test_a_sample_does_not_hold_on_to_its_neighbours():
    for (sample,) in TINY.encode_rows([talk("hello", "world")] * 3):
        for array in (sample.input_ids, sample.token_weights, sample.roles):
            assert array.base is None


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(train_tokenizer().to_str())


def test_texts_placed_together_are_those_placed_alone(encoder, monkeypatch):
    texts = ["hello world", "", "é🤖 it is", "what\n\n is it?" * 30, "x"]
    monkeypatch.setattr(edges, "_MOST_CHARACTERS", 20)  # the long one is a group of its own
    assert list(edges._groups(texts)) == [(0, 3), (3, 4), (4, 5)]
    for text, found in zip(texts, encoder.encode(texts), strict=True):
        (alone,) = encoder.encode([text])
        by_bytes = encoder.by_bytes(text, found.ids.tolist())
        assert found.text == alone.text == text and found.in_bytes
        for name in ("ids", "starts", "ends"):
            np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))
            np.testing.assert_array_equal(getattr(found, name), getattr(by_bytes, name))


def test_a_text_that_is_not_kept_says_so_and_its_neighbours_stay(encoder):
    texts = ["hello", "world", "what"]
    ids = [encoder.tokenizer.encode(text).ids for text in ("hello", "word", "what")]
    first, second, third = encoder._all_by_bytes(texts, ids)
    assert isinstance(second, ConversationError)
    assert "expected b'ld' at byte 3" in str(second)
    np.testing.assert_array_equal(first.ids, ids[0])
    np.testing.assert_array_equal(third.starts, encoder.by_bytes("what", ids[2]).starts)


def test_tokens_of_a_neighbour_do_not_fill_a_gap(encoder):
    """Together the tokens spell both texts, but each text has tokens of the other."""
    texts = ["hello wor", "ld"]
    ids = [encoder.tokenizer.encode(text).ids for text in ("hello ", "world")]
    assert all(isinstance(one, ConversationError) for one in encoder._all_by_bytes(texts, ids))


def test_every_cut_of_a_row_is_counted():
    before = dict(TINY.counts)
    TINY.encode_rows([talk("hello", "\n\nhello", "what", " \n", "is it?", "world")])
    assert TINY.counts["straddles_cut"] - before.get("straddles_cut", 0) == 2
