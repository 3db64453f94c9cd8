from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.formats import Conversation, ConversationError, Message, write_conversations
from varlen_sft.data.load import check_vocabulary, tokenize_file
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.template import ChatTemplate
from varlen_sft.errors import InputError
from varlen_sft.tools.demo_data import chatterbot_conversations, register_machine_conversations

CHATML_TOKENS = {"<|im_start|>": 1, "<|im_end|>": 1, "<|end|>": 0}  # per message
TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE that merges runs of newlines, and newlines with spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", *TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["user assistant system hello world\n\n\n  \n  é🤖 what is it? it is.\n\n"] * 50
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tiny_json() -> str:
    return train_tokenizer().to_str()


@pytest.fixture(scope="module")
def tiny(tiny_json) -> ChatTokenizer:
    return ChatTokenizer(tiny_json, ChatTemplate(CHATML, TOKENS))


@pytest.fixture(scope="module")
def smollm2(smollm2_tokenizer_dir) -> ChatTokenizer:
    return ChatTokenizer.from_folder(smollm2_tokenizer_dir)


def talk(*contents: str, system: str | None = None) -> Conversation:
    messages = [] if system is None else [Message("system", system)]
    for k, content in enumerate(contents):
        messages.append(Message(("user", "assistant")[k % 2], content))
    return Conversation(tuple(messages))


def runs(tokenizer: ChatTokenizer, sample: Sample, chosen: np.ndarray) -> list[str]:
    """The text of every unbroken run of chosen tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    return [
        tokenizer.decode(sample.input_ids[a:b])
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def supervised(tokenizer: ChatTokenizer, sample: Sample) -> list[str]:
    assert set(np.unique(sample.token_weights)) <= {0.0, 1.0}
    return runs(tokenizer, sample, sample.token_weights > 0)


def answers(conversation: Conversation, stop: str = "<|im_end|>") -> list[str]:
    return [m.content + stop for m in conversation.messages if m.role == "assistant"]


def with_template(tiny_json: str, source: str, tokens: dict[str, str] = TOKENS) -> ChatTokenizer:
    return ChatTokenizer(tiny_json, ChatTemplate(source, tokens))


# -- what is trained


def test_roles_and_weights_of_every_token(tiny):
    conversation = talk("hello", "it is.", "what?", "world", system="hello")
    sample = tiny.encode(conversation)
    assert tiny.decode(sample.input_ids) == tiny.render(conversation.messages)
    assert (sample.input_ids.dtype, sample.token_weights.dtype, sample.roles.dtype) == (
        np.dtype("int32"),
        np.dtype("float32"),
        np.dtype("uint8"),
    )
    texts = {role: runs(tiny, sample, sample.roles == k) for k, role in enumerate(ROLES)}
    assert texts == {
        "none": [
            "<|im_start|>system\n",
            "<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
            "\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
            "\n",
        ],
        "system": ["hello"],
        "user": ["hello", "what?"],
        "assistant": ["it is.<|im_end|>", "world<|im_end|>"],
        "tool": [],
    }
    assert ((sample.token_weights == 1) == (sample.roles == ROLES.index("assistant"))).all()


def test_a_message_is_where_it_was_written_not_where_its_words_occur_first(tiny):
    conversation = talk("user", "user", "assistant", "user", system="user")
    sample = tiny.encode(conversation)
    assert runs(tiny, sample, sample.roles == ROLES.index("user")) == ["user", "assistant"]
    assert runs(tiny, sample, sample.roles == ROLES.index("system")) == ["user"]
    assert supervised(tiny, sample) == ["user<|im_end|>", "user<|im_end|>"]


def test_a_character_of_many_tokens_is_trained_whole(tiny):
    conversation = talk("é", "🦙", "🦙🤖", "a🦙\u0301 ")
    assert supervised(tiny, tiny.encode(conversation)) == answers(conversation)


@pytest.mark.parametrize(
    ("answer", "straddles"),
    [("\n\nhello", True), ("  hello", True), ("\n", True), (" hello", False), ("", False)],
)
def test_a_token_over_the_start_of_an_answer_is_cut(tiny_json, answer, straddles):
    tiny = with_template(tiny_json, CHATML)
    conversation = talk("hello", answer, "what?", "it is.")
    text = tiny.render(conversation.messages)
    joint = Tokenizer.from_str(tiny_json).encode(text, add_special_tokens=False)
    start = len(tiny.render(conversation.messages[:1], add_generation_prompt=True))
    assert any(a < start < b for a, b in joint.offsets) == straddles

    sample = tiny.encode(conversation)
    assert tiny.straddles_cut == int(straddles)
    assert (sample.input_ids.tolist() != joint.ids) == straddles
    assert supervised(tiny, sample) == answers(conversation)
    assert tiny.decode(sample.input_ids) == text
    # The model sees the same tokens when it is asked.
    prompt = tiny.encode_prompt(conversation.messages[:1])
    assert prompt.dtype == np.int32
    first = int(sample.token_weights.argmax())
    assert sample.input_ids[:first].tolist() == prompt.tolist()


def test_a_stop_token_other_than_eos(tiny_json):
    source = CHATML.replace("<|im_end|>", "<|end|>")
    tiny = with_template(tiny_json, source)
    conversation = talk("hello", "it is.", "what?", "world")
    assert supervised(tiny, tiny.encode(conversation)) == answers(conversation, "<|end|>")


def test_a_control_token_of_other_letters(tiny_json):
    stop = "<｜end▁of▁sentence｜>"
    tiny = with_template(
        tiny_json.replace("<|end|>", stop),
        CHATML.replace("'<|im_end|>'", "eos_token"),
        {**TOKENS, "eos_token": stop},
    )
    conversation = talk("hello", "it is.", "what?", "world")
    assert supervised(tiny, tiny.encode(conversation)) == answers(conversation, stop)


def test_a_conversation_like_one_before_is_rendered_once_and_another_twice(tiny_json, monkeypatch):
    renders = []
    template = ChatTemplate(CHATML, TOKENS)
    render = template.render
    monkeypatch.setattr(template, "render", lambda *a, **k: renders.append(1) or render(*a, **k))
    tiny = ChatTokenizer(tiny_json, template)
    tiny.encode(talk("a", "b", "c", "d", "e", "f"))
    renders.clear()
    tiny.encode(talk("a", " b\n", *"cdefghijkl"))
    assert len(renders) == 1
    thought = Message("assistant", "b", reasoning_content=" ")
    tiny.encode(Conversation((*talk("a", "b", "c", "d").messages[:3], thought)))
    assert len(renders) == 1 + 2


def test_generation_blocks_and_what_templates_may_call(tiny_json):
    source = (
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
        "    {{- '<|im_start|>' + m.role + '\n' }}\n"
        "    {%- if m.role == 'assistant' %}\n"
        "        {% generation %}{{ m.content + eos_token }}{% endgeneration %}\n"
        "    {%- else %}{{ m.content | tojson }}{% endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}\n"
        "{%- if tools is not none %}{{ raise_exception('tools') }}{% endif %}"
    )
    tiny = with_template(tiny_json, source)
    conversation = talk("a <b> & é", "it is.")
    assert tiny.render(conversation.messages) == (
        '<|im_start|>user\n"a <b> & é"<|im_start|>assistant\nit is.<|im_end|>'
    )
    assert supervised(tiny, tiny.encode(conversation)) == ["it is.<|im_end|>"]


def test_a_template_that_trims_is_no_harm_to_what_is_not_trained(tiny_json):
    tiny = with_template(tiny_json, CHATML.replace("m['content']", "(m['content'] | trim)"))
    conversation = talk(" hello\n", "it is.")
    sample = tiny.encode(conversation)
    assert supervised(tiny, sample) == ["it is.<|im_end|>"]
    assert runs(tiny, sample, sample.roles == ROLES.index("user")) == ["hello"]
    assert supervised(tiny, tiny.encode(talk("a", " it is.\n"))) == ["it is.<|im_end|>"]


# -- what is refused

LAST_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</t>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSED = {
    "history loses its thoughts": (
        LAST_ONLY,
        "the template cuts the content of message 2",
    ),
    "a note comes after the history": (
        CHATML.replace("{% if add", "{{ 'Now: ' }}{% if add"),
        "the template rewrites history: the prompt of message 2 ends in .*Now: ",
    ),
    "no generation prompt": (
        CHATML.split("{% if add")[0],
        "writes '<|im_start|>' before the answer in message 2 and does not prompt with it",
    ),
    "another generation prompt": (
        CHATML.replace("assistant\n' }}", "assistant\n<t>' }}"),
        "the template rewrites history",
    ),
    "no stop token": (
        CHATML.replace("'<|im_end|>' + ", ""),
        "no stop token closes the answer in message 2: it is followed by '.n'",
    ),
    "the next header is no stop token": (
        CHATML.replace("'<|im_end|>' + '\n'", "''"),
        "no stop token closes the answer in message 2: it is followed by ''",
    ),
    "a message is left out": (
        CHATML.replace("m['content']", "(m['content'] if not loop.first else '')"),
        "the template leaves out the content of message 1",
    ),
    "a message comes twice": (
        "{{ messages[0].content }}" + CHATML,
        "the template writes the content of message 1 more than once",
    ),
    "the template says no": (
        "{{ raise_exception('no thanks') }}",
        "the chat template refused: no thanks",
    ),
    "the template leaves its sandbox": (
        "{{ messages.__class__.__mro__ }}",
        "the chat template refused: access to attribute '__class__' .* unsafe",
    ),
    "the template changes its input": (
        "{{ messages.append(1) }}",
        "the chat template refused: access to attribute 'append' .* unsafe",
    ),
    "a namespace is made with a dunder": (
        "{{ namespace(__html__=1) }}",
        "the chat template refused: a template may not set '__html__'",
    ),
    "a namespace grows a dunder": (
        "{% set n = namespace() %}{% set n.__html__ = 1 %}",
        "the chat template refused: a template may not set '__html__'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_proven_is_refused(tiny_json, case):
    source, reason = REFUSED[case]
    tiny = with_template(tiny_json, source)
    with pytest.raises(ConversationError, match=reason.replace("|", r"\|")):
        tiny.encode(talk("hello", "a</t>b", "what?", "c</t>d"))


def test_what_the_template_puts_before_an_answer_is_sampled_too(tiny_json):
    thought = "'\n' + ('<t></t>' if m.role == 'assistant' else '') + m"
    tiny = with_template(tiny_json, CHATML.replace("'\n' + m", thought))
    sample = tiny.encode(talk("a", "<t></t>", "b", ""))
    assert supervised(tiny, sample) == ["<t></t><t></t><|im_end|>", "<t></t><|im_end|>"]


def test_characters_used_to_mark_contents_may_occur_in_them(tiny_json):
    tiny = with_template(tiny_json, CHATML)  # one that has not seen such a shape yet
    conversation = talk("\ue000\ue001", "\ue002 \ue000")
    assert supervised(tiny, tiny.encode(conversation)) == answers(conversation)
    everything = "".join(map(chr, [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)]))
    conversation = talk(everything, "a")
    assert supervised(tiny, tiny.encode(conversation)) == answers(conversation)
    everything += "".join(map(chr, range(0x100000, 0x10FFFE)))
    with pytest.raises(ConversationError, match="more strings than there are marks"):
        with_template(tiny_json, CHATML).encode(talk(everything, "a"))


@pytest.mark.parametrize("control", ["<|im_end|>", "<|im_start|>", "<|end|>"])
def test_an_answer_that_spells_a_control_token_is_refused_or_text(tiny, control):
    conversation = talk("hello", "hello" + control + "!", system="hello")
    with pytest.raises(ConversationError) as caught:
        tiny.encode(conversation)
    assert str(caught.value) == f"the content of message 3 spells the control token {control!r}"
    sample = tiny.encode(conversation, MaskOptions(on_control="text"))
    assert supervised(tiny, sample) == answers(conversation)
    assert (sample.input_ids == tiny.control.ids[control]).sum() == CHATML_TOKENS[control] * 3


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("control", ["<|im_end|>", "<|im_start|>", "<|end|>"])
def test_a_control_token_that_a_user_spells_is_text(tiny, place, control):
    contents = ["hello", "hello"]
    contents[place] += control + "!"
    conversation = talk(contents[1], "it is.", system=contents[0])
    sample = tiny.encode(conversation)
    assert tiny.decode(sample.input_ids) == tiny.render(conversation.messages)
    assert (sample.input_ids == tiny.control.ids[control]).sum() == CHATML_TOKENS[control] * 3
    assert supervised(tiny, sample) == ["it is.<|im_end|>"]
    assert runs(tiny, sample, sample.roles == ROLES.index("user")) == [contents[1]]


def test_contents_are_normalised_as_the_tokenizer_would(tiny_json):
    state = json.loads(tiny_json)
    state["normalizer"] = {"type": "NFC"}
    tiny = with_template(json.dumps(state), CHATML)
    sample = tiny.encode(talk("e\u0301", "e\u0301 ok"))
    assert supervised(tiny, sample) == ["\u00e9 ok<|im_end|>"]
    # What composes over the edge of a message was never one text.
    accented = CHATML.replace("'\n' + m", "'\n' + ('e' if m.role == 'user' else '') + m")
    with pytest.raises(ConversationError, match="the tokenizer does not keep the text: .* byte 17"):
        with_template(json.dumps(state), accented).encode(talk("\u0301", "ok"))


def test_a_stop_token_that_takes_in_white_space_is_refused(tiny_json):
    state = json.loads(tiny_json)
    for token in state["added_tokens"]:
        token["lstrip"] = token["content"] == "<|im_end|>"
    tiny = with_template(json.dumps(state), CHATML)
    assert supervised(tiny, tiny.encode(talk("a", "b"))) == ["b<|im_end|>"]
    with pytest.raises(ConversationError, match="the tokenizer does not keep the text"):
        tiny.encode(talk("a", "b "))


def test_a_stop_token_that_melts_into_the_answer_is_refused(tiny_json):
    state = json.loads(tiny_json)
    for token in state["added_tokens"]:
        token["single_word"] = token["content"] == "<|im_end|>"
    tiny = with_template(json.dumps(state), CHATML)
    assert supervised(tiny, tiny.encode(talk("a", "b."))) == ["b.<|im_end|>"]
    with pytest.raises(ConversationError, match="'<|im_end|>' of message 2 is not a token of its"):
        tiny.encode(talk("a", "b"))


def test_what_a_tokenizer_file_may_hide(tiny_json, tiny):
    tokenizer = Tokenizer.from_str(tiny_json)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=99)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    hiding = with_template(tokenizer.to_str(), CHATML)
    conversation = talk("hello world hello world", "it is.")
    expected = tiny.encode(conversation).input_ids.tolist()
    assert hiding.encode(conversation).input_ids.tolist() == expected


def test_another_tokenizer_is_placed_by_its_offsets(tmp_path):
    """SentencePiece's way: spaces belong to words, bytes stand for characters it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["[INST] hello world [/INST] it is. what is it?"] * 50, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    tiny = ChatTokenizer(json.dumps(state), ChatTemplate(template, {"eos_token": "</s>"}))
    sample = tiny.encode(talk("hello", "it is.", "what?", "\u00e9\U0001f999 is it"))
    first, second = supervised(tiny, sample)
    assert first == " it is.</s>" and second == " \u00e9\U0001f999 is it</s>"
    with pytest.raises(ConversationError, match="only a byte-level BPE can keep control tokens"):
        tiny.encode(talk("</s>", "it is."))
    lossy = {**state, "model": {**state["model"], "byte_fallback": False, "unk_token": None}}
    tiny = ChatTokenizer(json.dumps(lossy), ChatTemplate(template, {"eos_token": "</s>"}))
    with pytest.raises(ConversationError, match="the tokenizer leaves out '\u00e9'"):
        tiny.encode(talk("hello", "\u00e9 it is."))
    greedy = [t | {"rstrip": t["content"] == "</s>"} for t in state["added_tokens"]]
    closed = template.replace("'</s>'", "'</s>\n'")
    tiny = ChatTokenizer(
        json.dumps({**state, "added_tokens": greedy}), ChatTemplate(closed, {"eos_token": "</s>"})
    )
    with pytest.raises(ConversationError, match="'</s>' of message 2 is not a token of its own"):
        tiny.encode(talk("hello", "it is."))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_any_text_is_trained_exactly(tiny, contents):
    conversation = talk(*contents)
    sample = tiny.encode(conversation)
    assert tiny.decode(sample.input_ids) == tiny.render(conversation.messages)
    assert supervised(tiny, sample) == answers(conversation)


PIECES = st.sampled_from(
    ["<|im_", "end|>", "<|im_end|>", "<|", "|>", "\n", " ", "\r\n", "user", "é", "🦙", "\ue000"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(PIECES, max_size=5).map("".join), min_size=2, max_size=2))
def test_hostile_text_is_trained_exactly_or_refused_by_name(smollm2, contents):
    conversation = talk(*contents)
    try:
        sample = smollm2.encode(conversation)
    except ConversationError as error:
        assert "message 2 spells the control token '<|im_end|>'" in str(error)
        assert "<|im_end|>" in contents[1]
        sample = smollm2.encode(conversation, MaskOptions(on_control="text"))
    else:
        assert "<|im_end|>" not in contents[1]
    finally:
        assert supervised(smollm2, sample) == answers(conversation)


# -- many at once, files


def test_many_at_once_are_the_same_as_one_by_one(tiny):
    conversations = [talk("hello", "\n\nit is."), talk("é\u08a0€", "🦙"), talk("what?", "world")]
    cut = tiny.straddles_cut
    many = tiny.encode_many(conversations)
    assert tiny.straddles_cut == cut + 1
    for conversation, sample in zip(conversations, many, strict=True):
        alone = tiny.encode(conversation)
        assert sample.input_ids.tolist() == alone.input_ids.tolist()
        assert sample.token_weights.tolist() == alone.token_weights.tolist()
        assert sample.roles.tolist() == alone.roles.tolist()


def test_outcomes_stand_in_their_places(tiny):
    outcomes = tiny.encode_rows([talk("a", "b"), talk("a", "<|end|>"), talk("a", "c")])
    assert [type(outcome) for outcome in outcomes] == [tuple, ConversationError, tuple]
    assert supervised(tiny, outcomes[2][0]) == ["c<|im_end|>"]
    with pytest.raises(ConversationError, match="message 2 spells"):
        tiny.encode_many([talk("a", "b"), talk("a", "<|end|>")])
    assert tiny.encode_many([]) == []


def test_a_file_becomes_samples_in_order(tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_conversations(path, [talk("a", f"answer {k}") for k in range(600)])
    samples = tokenize_file(path, tiny, vocab_size=400)
    texts = [text for sample in samples for text in supervised(tiny, sample)]
    assert texts == [f"answer {k}<|im_end|>" for k in range(600)]


def test_a_bad_row_of_a_file_is_named(tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    write_conversations(path, [talk("a", "b")] * 300 + [talk("a", "<|im_end|>")])
    samples = tokenize_file(path, tiny)
    assert len(list(islice(samples, 300))) == 300
    with pytest.raises(InputError) as caught:
        next(samples)
    assert str(caught.value) == (
        f"{path}, row 301: the content of message 2 spells the control token '<|im_end|>'"
    )


def test_an_id_outside_the_vocabulary_is_named(tiny, tmp_path):
    sample = Sample(np.array([1, 7, 9], np.int32), np.ones(3, np.float32), np.zeros(3, np.uint8))
    check_vocabulary(sample, 10)
    with pytest.raises(InputError) as caught:
        check_vocabulary(sample, 7)
    assert str(caught.value) == "token 1 has the id 7, the model's vocabulary is [0, 7)"
    path = tmp_path / "rows.jsonl"
    write_conversations(path, [talk("a", "b")])
    with pytest.raises(InputError, match=r"rows.jsonl, row 1: token .* vocabulary is \[0, 3\)"):
        list(tokenize_file(path, tiny, vocab_size=3))


def test_decode_refuses_an_id_it_does_not_have(tiny):
    assert tiny.decode([1, 2]) == "<|im_start|><|im_end|>"
    for token in (-1, 302):
        with pytest.raises(ValueError, match=rf"ids must be in \[0, 302\), got {token}"):
            tiny.decode([token])


def test_fingerprint_follows_everything_that_decides_the_ids(tiny_json):
    def of(tokenizer=tiny_json, source=CHATML, tokens=TOKENS) -> str:
        return with_template(tokenizer, source, tokens).fingerprint()

    other = tiny_json.replace("<|end|>", "<|and|>")
    tokens = {**TOKENS, "eos_token": "<|end|>"}
    prints = [of(), of(other), of(source=CHATML + " "), of(tokens=tokens)]
    assert len(set(prints)) == 4
    assert of() == prints[0] and len(prints[0]) == 64


# -- folders


@pytest.fixture
def folder(tmp_path, tiny_json) -> Path:
    (tmp_path / "tokenizer.json").write_text(tiny_json)
    config = {
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "bos_token": "<|im_start|>",
        "chat_template": CHATML,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_from_folder_with_the_template_in_the_configuration(folder, tiny):
    loaded = ChatTokenizer.from_folder(str(folder))
    assert loaded.special_tokens == TOKENS
    assert loaded.fingerprint() == tiny.fingerprint()


def test_from_folder_prefers_the_template_file(folder):
    (folder / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert ChatTokenizer.from_folder(folder).render([Message("user", "a")]) == "<|im_start|>file"


def test_from_folder_takes_the_default_of_named_templates(folder):
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTokenizer.from_folder(folder).render([Message("user", "a")]) == "y"


def test_from_folder_names_what_is_wrong(folder):
    def reason() -> str:
        with pytest.raises(InputError) as caught:
            ChatTokenizer.from_folder(folder)
        return str(caught.value).removeprefix(str(folder))

    (folder / "chat_template.jinja").write_text("\n{% if %}")
    assert reason().startswith("/chat_template.jinja: not a Jinja template: line 2: Expected an ex")
    with pytest.raises(TemplateSyntaxError):
        ChatTemplate("{% if %}", {})
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    assert reason() == "/chat_template.jinja: not UTF-8: invalid start byte at byte 1"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text("[]")
    assert reason() == "/tokenizer_config.json: expected a JSON object"
    (folder / "tokenizer_config.json").write_text("{")
    assert reason().startswith("/tokenizer_config.json: not JSON: ")
    (folder / "tokenizer_config.json").write_text("{}")
    assert reason().startswith(": no chat template: neither chat_template.jinja nor")
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "tokenizer.json").write_text("{}")
    assert reason().startswith("/tokenizer.json: not a tokenizer that can be used: ")
    (folder / "tokenizer.json").unlink()
    assert reason() == ": no tokenizer.json in this folder"


def test_neither_torch_nor_transformers_is_imported(folder):
    code = (
        "import sys; from varlen_sft.data.load import tokenize_file\n"
        "assert not {'tokenizers', 'jinja2'} & set(sys.modules)\n"
        "from varlen_sft.data.chat import ChatTokenizer; ChatTokenizer.from_folder(sys.argv[1])\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", code, str(folder)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "[]\n"


# -- the real thing


def test_ids_are_those_of_transformers_on_the_demo_conversations(smollm2, smollm2_tokenizer_dir):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(smollm2_tokenizer_dir))
    chatterbot, _ = chatterbot_conversations()
    conversations = chatterbot[::9] + register_machine_conversations(100, 0, 1, 12)
    assert len(conversations) >= 200
    cut = smollm2.straddles_cut
    samples = smollm2.encode_many(conversations)
    assert smollm2.straddles_cut == cut  # or the ids would differ from theirs
    for conversation, sample in zip(conversations, samples, strict=True):
        messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
        assert smollm2.render(conversation.messages) == theirs.apply_chat_template(
            messages, tokenize=False
        )
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert sample.input_ids.tolist() == ids
        assert supervised(smollm2, sample) == answers(conversation)
        prompt = theirs.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert smollm2.encode_prompt(conversation.messages[:-1]).tolist() == prompt


def test_smollm2_puts_its_own_system_prompt_and_it_is_nobodys(smollm2):
    sample = smollm2.encode(talk("hi", "hello"))
    roles = {role: runs(smollm2, sample, sample.roles == k) for k, role in enumerate(ROLES)}
    assert roles["none"][0].startswith("<|im_start|>system\nYou are a helpful AI assistant named")
    assert (roles["system"], roles["user"]) == ([], ["hi"])
    assert roles["assistant"] == ["hello<|im_end|>"]


@pytest.mark.parametrize("answer", ["\n\nhello", "  hello", "\n"])
def test_smollm2_answers_that_begin_with_white_space_are_cut(smollm2, answer):
    cut = smollm2.straddles_cut
    sample = smollm2.encode(talk("hi", answer))
    assert smollm2.straddles_cut == cut + 1
    assert supervised(smollm2, sample) == [answer + "<|im_end|>"]
