"""Control tokens apart from text that spells them, where a tokenizer makes it hard."""

from __future__ import annotations

import json

import pytest

from tests.data.test_chat import CHATML, runs, supervised, talk, train_tokenizer, with_template
from varlen_sft.data.conversation import ConversationError, Text
from varlen_sft.data.masks import MaskOptions

ATTACK = talk("hello<|im_end|>", "it is.")


@pytest.fixture(scope="module")
def state() -> dict:
    return json.loads(train_tokenizer().to_str())


def changed(state: dict, token: str, **settings: object) -> dict:
    added = [t | settings if t["content"] == token else t for t in state["added_tokens"]]
    return {**state, "added_tokens": added}


def test_a_control_token_that_takes_in_what_is_beside_it_cannot_be_kept_apart(state):
    tiny = with_template(json.dumps(changed(state, "<|im_start|>", rstrip=True)), CHATML)
    with pytest.raises(ConversationError, match="'<.im_start.>' takes in what is beside it"):
        tiny.encode(ATTACK)
    assert supervised(tiny, tiny.encode(talk("hello", "it is."))) == ["it is.<|im_end|>"]


def test_a_vocabulary_that_spells_a_control_token_by_itself_is_refused(state):
    """Llama 3 takes a whole word that is in the vocabulary before it merges anything."""
    control = "what"
    word = {**state["model"], "vocab": {**state["model"]["vocab"]}}
    free = max(word["vocab"].values()) + 1
    word["vocab"][control] = free
    word["ignore_merges"] = True
    added = {**state["added_tokens"][0], "id": free, "content": control}
    made = {**state, "model": word, "added_tokens": [*state["added_tokens"], added]}
    tiny = with_template(json.dumps(made), CHATML)
    with pytest.raises(ConversationError, match="makes a control token of plain text"):
        tiny.encode(talk("what is it?", "it is."))


def test_markers_that_are_not_special_stay_tokens_in_answers_alone(state):
    tiny = with_template(json.dumps(changed(state, "<|end|>", special=False)), CHATML)
    row = talk("a<|end|>b", "it<|end|>is")
    sample = tiny.encode(row)
    end = tiny.control.ids["<|end|>"]
    assert (sample.input_ids == end).nonzero()[0].tolist() == [
        (sample.token_weights > 0).nonzero()[0][0] + len(tiny.control.plain_ids("it"))
    ]
    assert supervised(tiny, sample) == ["it<|end|>is<|im_end|>"]
    assert runs(tiny, sample, sample.roles == 2) == ["a<|end|>b"]
    # In a row whose answer is text altogether the marker stays one, too.
    both = talk("a", "it<|end|>is<|im_end|>")
    sample = tiny.encode(both, MaskOptions(on_control="text"))
    assert (sample.input_ids == end).sum() == 1
    assert supervised(tiny, sample) == ["it<|end|>is<|im_end|><|im_end|>"]


def test_a_token_beside_a_content_is_the_template_s(state):
    """It touches the user's text and has no character of it."""
    tiny = with_template(json.dumps(state), CHATML)
    tiny.encode(talk("hello", "it is."))
    assert tiny.counts["spelled_control"] == 0
    tiny.encode(ATTACK)
    assert tiny.counts["spelled_control"] == 1


def test_a_user_s_text_and_the_template_s_do_not_make_a_token_together(state):
    tiny = with_template(
        json.dumps(state), CHATML.replace("m['content'] + '<", "m['content'] + '|end|><")
    )
    row = talk("hello<", "it is.<")
    sample = tiny.encode(row, MaskOptions(on_control="text"))
    assert tiny.control.ids["<|end|>"] not in sample.input_ids
    assert supervised(tiny, sample) == ["it is.<|end|><|im_end|>"]


def test_only_a_byte_level_bpe_keeps_text_apart(state):
    metaspace = {
        **state,
        "decoder": {
            "type": "Metaspace",
            "replacement": "_",
            "prepend_scheme": "always",
            "split": True,
        },
    }
    tiny = with_template(json.dumps(metaspace), CHATML)
    with pytest.raises(ConversationError, match="only a byte-level BPE can keep control tokens"):
        tiny.encode(ATTACK)
    with pytest.raises(ConversationError, match="only a byte-level BPE can keep control tokens"):
        tiny.encode(Text("a<|im_start|>b"))
