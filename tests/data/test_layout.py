"""Templates that would fool a search: each is either placed right or refused by name."""

from __future__ import annotations

import pytest

from tests.data.test_chat import CHATML, answers, runs, supervised, talk, train_tokenizer
from tests.data.test_chat import with_template as with_source
from tests.data.test_masks import CALL
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError, Message
from varlen_sft.data.masks import MaskOptions

TALK = talk("hello", "it is.", "what?", "world")
END = "+ '<|im_end|>' + '\n'"


@pytest.fixture(scope="module")
def make():
    tiny_json = train_tokenizer().to_str()
    return lambda source: with_source(tiny_json, source)


def changed(old: str, new: str) -> str:
    assert old in CHATML
    return CHATML.replace(old, new)


REFUSED = {
    "the text depends on how a content begins": (
        changed("{{ '<|im_s", "{% if m.content.startswith('h') %}!{% endif %}{{ '<|im_s"),
        r"cannot be told from the template's own: at character 0 it has '!<.im_start",
    ),
    "the messages stand in another order": (
        changed("in messages", "in messages[::-1]"),
        "writes message 2 before the end of an earlier one",
    ),
    "the prompt holds the beginning of the answer": (
        changed("assistant\n' }}", "assistant\nit' }}"),
        r"message 2 begins at character \d+, its generation prompt ends at \d+",
    ),
    "the last answer ends with another token": (
        changed(END, "+ ('<|end|>' if loop.last and m.role != 'user' else '<|im_end|>')"),
        "the answer in message 2 ends with '<.end.>' when it is the last, and is followed by '<.i",
    ),
    "the template calls for tools only in its own text": (
        changed("m['content']", "('' if m.tool_calls else m['content'])"),
        "the template leaves out the tool calls of message 2",
    ),
    "generation tags leave out the stop token": (
        changed("m['content']", "'' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ ''"),
        "generation tags enclose 'it is.' for message 2, a model samples 'it is.<.im_end.>'",
    ),
    "a header that the template does not prompt with": (
        changed("'\n' + m", "'\n' + ('assistant\n' if m.role != 'user' else '') + m").replace(
            "'<|im_start|>assistant\n'", "'assistant\n'"
        ),
        "the template rewrites history",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_proven_is_refused(make, name):
    source, reason = REFUSED[name]
    row = TALK
    if "tools" in name:
        row = Conversation((Message("user", "a"), Message("assistant", "", tool_calls=(CALL,))))
    with pytest.raises(ConversationError, match=reason):
        make(source).encode(row)


def test_a_user_who_spells_the_stop_token_that_history_lacks(make):
    """The row has what looks like the end of the answer right after it, in the user's words."""
    tiny = make(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}<|im_start|>"
        "{% elif loop.last %}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(ConversationError, match="message 3 begins at character 23, before message"):
        tiny.encode(talk("hello", "it is.", "<|im_end|> what?", "world"))


def test_a_text_of_the_template_s_own_before_a_prompt_and_before_a_stop(make):
    """What is learned from one turn is no more than a guess for the next."""
    notes = "{% if 'x' in m.content %}!!{% endif %}"
    tiny = make(changed("m['content'] " + END, "m['content'] }}" + notes + "{{ " + END[2:]))
    for row in (talk("a", "b", "x", "x", "a", "b"), talk("x", "x", "a", "b", "x", "x")):
        assert supervised(tiny, tiny.encode(row)) == [
            (m.content + "!!" * (m.content == "x") + "<|im_end|>")
            for m in row.messages
            if m.role == "assistant"
        ]
        assert tiny.cross_check([row]) == [None]


def test_white_space_at_the_end_of_a_content_is_its_own(make):
    tiny = make(CHATML)
    row = talk("hello \n ", "it is. \n", "what?\n\n", "world  ")
    sample = tiny.encode(row)
    assert supervised(tiny, sample) == answers(row)
    assert runs(tiny, sample, sample.roles == 2) == ["hello \n ", "what?\n\n"]


def test_a_tool_s_name_may_be_written_again_with_its_result(make):
    call = "{% for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments.a }}"
    call += "{% endfor %}"
    tool = "{% if m.role == 'tool' %}{{ m.name + ': ' }}{% endif %}"
    source = changed("m['content'] " + END, "'' }}" + tool + call + "{{ m['content'] " + END)
    tiny = make(source.replace("m.name", "messages[loop.index0 - 1].tool_calls[0].function.name"))
    row = Conversation(
        (
            Message("user", "hello"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "world"),
            Message("assistant", "it is."),
        )
    )
    sample = tiny.encode(row)
    assert supervised(tiny, sample) == ["whatit<|im_end|>", "it is.<|im_end|>"]
    assert "what: world" in tiny.decode(sample.input_ids)


def test_generation_tags_may_enclose_more(make):
    source = changed("m['content'] " + END, "'' }}{% generation %}{{ m['content'] " + END)
    tiny = make(source.replace("{% endfor %}", "{% endgeneration %}{% endfor %}", 1))
    assert tiny.template.has_generation_tags
    assert supervised(tiny, tiny.encode(TALK)) == answers(TALK)


def test_template_variables_are_not_mixed_up(make):
    """What was learned with one value of a variable is not used with another."""
    closing = "{{ '<|end|>' if short else '<|im_end|>' }}\n"
    source = changed(END, "}}" + closing + "{{ ''").replace("+ }}", "}}")
    tiny: ChatTokenizer = make(source)
    for short, stop in ((False, "<|im_end|>"), (True, "<|end|>"), (False, "<|im_end|>")):
        row = Conversation(TALK.messages, template_kwargs={"short": short})
        tiny.template.stop_tokens = ("<|end|>",)
        assert supervised(tiny, tiny.encode(row)) == answers(TALK, stop)


def test_a_longer_prompt_is_not_taken_for_a_shorter_one_with_an_answer(make):
    """With ``quiet`` an empty thought is part of the prompt, without it of the answer."""
    thought = "'\n' + ('<t></t>' if m.role == 'assistant' else '') + m"
    prompt = "assistant\n' + ('<t></t>' if quiet else '') }}"
    tiny = make(changed("'\n' + m", thought).replace("assistant\n' }}", prompt))
    for quiet in (False, True, False, True):
        row = Conversation(TALK.messages, template_kwargs={"quiet": quiet})
        lead = "" if quiet else "<t></t>"
        want = [f"{lead}it is.<|im_end|>", f"{lead}world<|im_end|>"]
        assert supervised(tiny, tiny.encode(row)) == want


def test_a_model_that_sees_images_gets_its_contents_in_parts(make):
    """Such templates loop over parts, and would write each character of a string as nothing."""
    parts = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    tiny = make(changed("m['content'] " + END, "'' }}" + parts + "{{ " + END[2:]))
    assert supervised(tiny, tiny.encode(TALK)) == answers(TALK)


def test_only_what_is_trained_needs_a_proof(make):
    """History in another form is no harm to the last answer."""
    tiny = make(changed(END, "+ ('<|im_end|>' if loop.last or m.role == 'user' else '')"))
    with pytest.raises(ConversationError, match="rewrites history"):
        tiny.encode(TALK)
    last = tiny.encode(TALK, MaskOptions(supervision_mode="last_assistant"))
    assert supervised(tiny, last) == ["world<|im_end|>"]


def test_a_control_token_before_the_stop_token_is_said_too(make):
    """Cohere ends a response with one token and the turn with the next."""
    tiny = make(changed(END, "+ '<|end|><|im_end|>'"))
    row = talk("hello", "it is.", "what?", "world")
    assert supervised(tiny, tiny.encode(row)) == answers(row, "<|end|><|im_end|>")


def test_a_call_may_end_with_a_token_of_its_own(make):
    """The last control token that the template writes when the call is the last message."""
    tiny = make(
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.name + '<|end|>.<|im_start|>' }}{% else %}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = Conversation((Message("user", "hello"), Message("assistant", "", tool_calls=(CALL,))))
    assert supervised(tiny, tiny.encode(row)) == ["what<|end|>.<|im_start|>"]
