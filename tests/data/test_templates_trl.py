"""The same labels as TRL's ``assistant_only_loss`` with its training templates, where both are
defined; where they differ, by what and why.

TRL trains what stands in the ``{% generation %}`` tags of its templates. That is what the model
would have sampled and, by template,

- the newline that the template writes after the stop token, where generation is over already
  (`tag_end`);
- the header, or the end of it, that the generation prompt holds (`tag`): the whole of it for
  DeepSeek, GPT-OSS and Muse, its newline for Qwen 2.5, an opened ``<think>`` for Nemotron 3 and
  Qwen 3.5 to 3.8;
- the eos_token that Phi 3 writes after the whole conversation.

It is less where a tag ends in a character of several tokens, of which transformers marks the first
alone (`SPLIT`; only DiffusionGemma closes its tags before the stop token).

Three kinds of rows have other tokens: answers whose first characters would merge with the header,
which are cut here as they are at inference; contents that spell control tokens, which are text
here; and rows that are refused here, because what TRL trains is not what the model would have said.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.data.templates import tokenizers
from tests.data.templates.conversations import conversations
from tests.data.templates.facts import Facts
from tests.data.templates.oracle import Expected, expected
from tests.data.templates.prove import chat_tokenizer, trained
from tests.data.templates.templates import FACTS, sources
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError
from varlen_sft.data.sample import Sample

SPLIT = {"characters of many tokens", "emoji", "right to left", "combining", "private use"}
TRAINING = [name for name in FACTS if name.endswith("_training")]

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not sources(), reason="needs the chat templates in trl: pip install trl"
)


@functools.cache
def both(name: str) -> tuple[ChatTokenizer, transformers.PreTrainedTokenizerFast]:
    facts = FACTS[name]
    text = tokenizers.with_tokens(tokenizers.byte_level(), facts)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(text),
        chat_template=sources()[name],
        **facts.variables,
    )
    return chat_tokenizer(text, name), theirs


def theirs(name: str, row: Conversation) -> Sample:
    """What TRL makes of a row: ids, and which of them are labels."""
    chat, tokenizer = both(name)
    made = tokenizer.apply_chat_template(
        [chat.template.view(message) for message in row.messages],
        tools=row.tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = np.array(made["input_ids"], dtype=np.int32)
    mask = np.array(made["assistant_masks"], dtype=np.float32)
    return Sample(ids, mask, np.zeros(len(ids), dtype=np.uint8))


def tagged(name: str, facts: Facts, want: Expected) -> list[str]:
    texts = list(want.tagged)
    if name.startswith("phi3"):
        texts[-1] += facts.eos
    return texts


def test_the_same_labels():
    """Equal ids; TRL trains the oracle's texts and what its tags add to them, and nothing that is
    trained here is left out there."""
    counts = dict.fromkeys(("equal", "straddles_cut", "spelled_control", "split"), 0)
    for name in TRAINING:
        for title, row in conversations(FACTS[name]).items():
            if (kind := compare(name, title, row)) is not None:
                counts[kind] += 1
    assert counts["equal"] > 800
    assert counts["straddles_cut"] > 300
    assert counts["spelled_control"] > 80
    assert counts["split"] == len(SPLIT)


def compare(name: str, title: str, row: Conversation) -> str | None:
    chat, _ = both(name)
    before = chat.counts.copy()
    (outcome,) = chat.encode_rows([row])
    if isinstance(outcome, ConversationError):
        return None
    ours, other, where = outcome[0], theirs(name, row), f"{name}: {title}"
    for kind in ("straddles_cut", "spelled_control"):
        if chat.counts[kind] > before[kind]:
            assert ours.input_ids.tolist() != other.input_ids.tolist(), where
            return kind
    assert ours.input_ids.tolist() == other.input_ids.tolist(), where
    left_out = ours.input_ids[ours.token_weights > other.token_weights]
    if name == "diffusion_gemma_training" and title in SPLIT:
        assert chat.decode(left_out) and set(chat.decode(left_out)) == {"\ufffd"}, where
        return "split"
    assert len(left_out) == 0, where
    assert trained(chat, other) == tagged(name, FACTS[name], expected(FACTS[name], row)), where
    return "equal"


@pytest.mark.parametrize(
    "name", [n for n in TRAINING if FACTS[n].tag == FACTS[n].prompt and FACTS[n].header is None]
)
def test_only_the_newline_differs(name):
    """Where the tags begin after the generation prompt, the masks differ in `tag_end` alone."""
    chat, _ = both(name)
    facts = FACTS[name]
    row = conversations(facts)["many turns" if facts.system == "written" else "one token"]
    ours, other = chat.encode(row), theirs(name, row)
    more = chat.decode(ours.input_ids[other.token_weights > ours.token_weights])
    turns = sum(message.role == "assistant" for message in row.messages)
    extra = facts.eos if name.startswith("phi3") else ""
    assert more == facts.tag_end * turns + extra
