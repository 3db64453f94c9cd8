"""One row of every format, as people publish it; and every way in which a row is wrong."""

from __future__ import annotations

import json

import pytest

from varlen_sft.data.formats import (
    Conversation,
    ConversationError,
    Message,
    Text,
    parse_row,
)

HELLO = Conversation((Message("user", "hi"), Message("assistant", "hello")))
HI = ("user", "hi")
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def messages(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


def answer(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", **fields}]}


def parsed(row: dict, **options) -> tuple[Message, ...]:
    conversation = parse_row(row, **options)
    assert isinstance(conversation, Conversation)
    return conversation.messages


def reason(row: object, **options) -> str:
    with pytest.raises(ConversationError) as caught:
        parse_row(row, **options)
    return str(caught.value)


# -- messages


def test_messages():
    row = messages(("system", "Be brief."), ("user", "hi"), ("assistant", "hello é🤖\u2028"))
    assert parse_row(row) == Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "hi"),
            Message("assistant", "hello é🤖\u2028"),
        )
    )


@pytest.mark.parametrize("user", ["human", "user"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant"])
@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_sharegpt(user, assistant, key):
    row = {"id": 7, key: [{"from": user, "value": "hi"}, {"from": assistant, "value": "hello"}]}
    assert parse_row(row) == HELLO
    row = {key: [{"role": user, "content": "hi"}, {"role": assistant, "content": "hello"}]}
    assert parse_row(row) == HELLO


def test_slimorca_as_published():
    row = {
        "conversations": [
            {"from": "system", "value": "You are an AI assistant.", "weight": None},
            {"from": "human", "value": "Write an article.", "weight": 0.0},
            {"from": "gpt", "value": "Title", "weight": 1.0},
        ]
    }
    assert parsed(row) == (
        Message("system", "You are an AI assistant."),
        Message("user", "Write an article.", weight=0.0),
        Message("assistant", "Title", weight=1.0),
    )


def test_magpie_as_published():
    row = {
        "uuid": "b1a5",
        "model": "a model",
        "gen_input_configs": {"temperature": 1.0, "top_p": 1.0, "seed": None},
        "instruction": "What is 2 + 2?",
        "response": "4",
        "conversations": [
            {"from": "human", "value": "What is 2 + 2?"},
            {"from": "gpt", "value": "4"},
        ],
        "task_category": "Math",
        "other_task_category": [],
        "difficulty": "very easy",
        "instruct_reward": -3.5,
        "language": "EN",
    }
    assert parsed(row) == (Message("user", "What is 2 + 2?"), Message("assistant", "4"))
    del row["conversations"]
    assert parsed(row) == (Message("user", "What is 2 + 2?"), Message("assistant", "4"))


def test_what_data_sets_call_the_roles():
    call = json.dumps({"name": "weather", "arguments": '{"city": "Köln"}'})
    row = {
        "conversations": [
            {"from": "developer", "value": "s"},
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "rain"},
            {"from": "ipython", "value": "1"},
            {"from": "function", "value": "2"},
            {"from": "gpt", "value": "b"},
        ]
    }
    assert parsed(row) == (
        Message("system", "s"),
        Message("user", "a"),
        Message("assistant", "", tool_calls=(WEATHER,)),
        Message("tool", "rain"),
        Message("tool", "1"),
        Message("tool", "2"),
        Message("assistant", "b"),
    )


def test_content_in_text_parts_is_joined():
    parts = [{"type": "text", "text": "a\n", "image": None}, {"type": "text", "text": "b"}]
    assert parsed(messages(("user", parts), ("assistant", "c")))[0] == Message("user", "a\nb")


def test_tools_calls_and_results():
    row = messages(("user", "Rain?"), ("assistant", None), ("tool", "yes"), ("assistant", "Yes."))
    text = json.dumps({"city": "Köln"})
    function = {"name": "weather", "arguments": text}
    row["messages"][1]["tool_calls"] = [{"id": "c1", "type": "function", "function": function}]
    row["messages"][2] |= {"name": "weather", "tool_call_id": "c1", "tool_calls": []}
    row["tools"] = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    conversation = parse_row(row)
    assert conversation.messages == (
        Message("user", "Rain?"),
        Message("assistant", "", tool_calls=({"id": "c1", **WEATHER},)),
        Message("tool", "yes", extra={"name": "weather", "tool_call_id": "c1"}),
        Message("assistant", "Yes."),
    )
    assert conversation.tools == tuple(row["tools"])
    assert parse_row({**row, "tools": json.dumps(row["tools"])}) == conversation
    assert function["arguments"] == text  # the row itself is left as it was
    for nothing in ([], "[]", ""):
        assert parse_row({**row, "tools": nothing}).tools is None


@pytest.mark.parametrize(
    "calls",
    [
        [WEATHER],
        [{"name": "weather", "arguments": {"city": "Köln"}}],
        {"name": "weather", "arguments": '{"city": "Köln"}'},
        json.dumps([WEATHER]),
    ],
)
def test_calls_have_one_form(calls):
    (_, message) = parsed(answer(tool_calls=calls, content="I look."))
    assert message == Message("assistant", "I look.", tool_calls=(WEATHER,))
    assert parsed(answer(tool_calls=calls))[1].content == ""  # no content at all


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_by_any_name(name):
    row = answer(content="4", **{name: "2 and 2"})
    row["messages"][0][name] = ""  # as columns have it
    assert parsed(row) == (
        Message("user", "hi"),
        Message("assistant", "4", reasoning_content="2 and 2"),
    )
    assert parsed(answer(content="4", **{name: ""}))[1].reasoning_content == ""
    assert parsed(answer(content="4", **{name: None}))[1].reasoning_content is None


def test_variables_of_the_template():
    row = {**messages(("user", "hi"), ("assistant", "hello")), "chat_template_kwargs": None}
    assert parse_row(row) == HELLO
    for given in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        row["chat_template_kwargs"] = given
        assert parse_row(row).template_kwargs == {"enable_thinking": False}


def test_weights_of_messages():
    fields = [{}, {"train": True}, {"train": False}, {"weight": 0.3}, {"weight": 2, "train": True}]
    weights = [parsed(answer(content="a", **given))[1].weight for given in fields]
    assert weights == [1.0, 1.0, 0.0, 0.3, 2.0]
    row = answer(content="a", weight=0.5) | {"weight": 0.5}
    assert [m.weight for m in parsed(row)] == [0.5, 0.25]


def test_a_system_prompt_beside_the_messages():
    row = messages(("user", "hi"), ("assistant", "hello"))
    for name in ("system", "system_prompt"):
        assert parsed({**row, name: "s"}) == (Message("system", "s"), *HELLO.messages)
        assert parse_row({**row, name: ""}) == HELLO
    both = messages(("system", "s"), ("user", "hi"), ("assistant", "hello"))
    assert parsed({**both, "system": "s"}) == parsed(both)
    assert "'system', and its first message is another" in reason({**both, "system": "t"})


def test_metadata_is_no_field_and_neither_is_what_is_empty():
    row = {"messages": [], "tools": [], "source": "here", "score": 3, "images": [], "text": "hi"}
    row["messages"] = [
        {"role": "user", "content": "hi", "id": 7, "images": [], "function_call": None},
        {"role": "assistant", "content": "hello", "timestamp": "now", "name": "", "audio": ""},
    ]
    assert parse_row(row) == HELLO


# -- the other formats


def test_prompt_and_completion_as_strings():
    assert parse_row({"prompt": "2 + 2 =", "completion": " 4"}) == Text(" 4", "2 + 2 =")
    row = {"prompt": "2 + 2 =", "completion": " 4", "weight": 0.5}
    assert parse_row(row, mode="pretrain") == Text("2 + 2 = 4", weight=0.5)


def test_prompt_and_completion_as_messages_train_the_completion_alone():
    turn = messages(("user", "a"), ("assistant", "b"))["messages"]
    row = {"prompt": [*turn, turn[0]], "completion": [turn[1]], "system": "s"}
    found = parsed(row)
    assert [m.role for m in found] == ["system", "user", "assistant", "user", "assistant"]
    assert [m.weight for m in found] == [0, 0, 0, 0, 1]
    bad = {"prompt": [*turn, turn[0]], "completion": [{"role": "assistant", "content": 3}]}
    assert reason(bad) == "the content of message 4 must be a string, got a number"


def test_alpaca():
    row = {"instruction": "Translate.", "input": "Haus", "output": "house", "text": "Below is ..."}
    assert parsed(row) == (Message("user", "Translate.\n\nHaus"), Message("assistant", "house"))
    assert parsed({**row, "input": " "})[0].content == "Translate."
    dolly = {"instruction": "Translate.", "context": "Haus", "response": "house", "category": "x"}
    assert parsed(dolly) == parsed(row)
    assert parsed({**row, "history": [["a", "b"]], "system": "s"})[:3] == (
        Message("system", "s"),
        Message("user", "a"),
        Message("assistant", "b"),
    )


def test_text():
    assert parse_row({"text": "Once upon", "id": 3}) == Text("Once upon")
    assert parse_row({"text": "Once upon", "weight": 2}, mode="pretrain") == Text(
        "Once upon", weight=2.0
    )
    assert reason({"text": ""}) == "the text is empty"
