"""Every way in which a row is wrong, and the words that name it."""

from __future__ import annotations

import pytest

from varlen_sft.data.formats import Conversation, ConversationError, Message, Tokens, parse_row

HELLO = Conversation((Message("user", "hi"), Message("assistant", "hello")))
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
IDS = [5, 6, 7, 8]


def messages(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


def answer(**fields) -> dict:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", **fields}]}


def reason(row: object, **options) -> str:
    with pytest.raises(ConversationError) as caught:
        parse_row(row, **options)
    return str(caught.value)


def test_a_mode_refuses_rows_that_contradict_it():
    assert reason({"text": "a"}, mode="sft").startswith("the row is plain text, of which every")
    assert reason(messages(("user", "a")), mode="pretrain").startswith(
        "the row is a conversation, and the source is 'pretrain:'"
    )
    assert reason({"input_ids": IDS, "labels": IDS}, mode="pretrain") == (
        "the row has 'labels', and the source is 'pretrain:', which trains all tokens"
    )
    assert parse_row(messages(("user", "hi"), ("assistant", "hello")), mode="sft") == HELLO
    tokens = parse_row({"input_ids": IDS, "labels": IDS}, mode="sft")
    assert isinstance(tokens, Tokens) and tokens.token_weights.tolist() == [1] * 4
    assert reason({"text": "a"}, mask_token_ids=[1]) == (
        "mask_token_ids is for rows of 'input_ids', this has none"
    )
    with pytest.raises(ValueError, match="mode must be one of .*'search'. or None, got 'all'"):
        parse_row({"text": "a"}, mode="all")


ORDER = "roles must be an optional system, then user and assistant in turn: "
KNOWN = (
    "system, user, assistant, tool, developer, human, gpt, function_call, function, ipython, "
    "observation"
)
HI = ("user", "hi")
DEEP: list = []
for _ in range(2000):
    DEEP = [DEEP]

BAD_ROWS = [
    ([1], "expected a JSON object, got a list"),
    (3, "expected a JSON object, got a number"),
    (
        {"prompt": "hi", "id": 1, "messages": None},
        "expected 'input_ids', 'messages', 'conversations', 'prompt' and 'completion', "
        "'instruction' and 'output', or 'text', found 'prompt', 'id'",
    ),
    (
        {"messages": [], "conversations": []},
        "the row has 'messages' and 'conversations', which of them counts?",
    ),
    ({"messages": "hi"}, "'messages' must be a list, got a string"),
    ({"messages": []}, "the conversation is empty"),
    ({"messages": ["hi"]}, "message 1 must be an object, got a string"),
    ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
    ({"conversations": [{"from": "human"}]}, "message 1 has no 'value'"),
    ({"messages": [{"content": "hi"}]}, "message 1 has neither 'role' nor 'from'"),
    (messages(HI, ("bot", "hello")), f"message 2 has the unknown role 'bot', known are {KNOWN}"),
    (messages((["user"], "hi")), f"message 1 has the unknown role ['user'], known are {KNOWN}"),
    (messages((None, "hi")), f"message 1 has the unknown role None, known are {KNOWN}"),
    (messages(HI, ("assistant", None)), "the content of message 2 must be a string, got null"),
    (messages(("user", 3)), "the content of message 1 must be a string, got a number"),
    (
        messages(("user", ["hi"])),
        "part 1 of the content of message 1 must be an object, got a string",
    ),
    (
        messages(("user", [{"type": "text", "text": "a"}, {"type": "image_url"}])),
        "part 2 of the content of message 1 is of the type 'image_url', only 'text' is supported",
    ),
    (
        messages(("user", [{"type": "text"}])),
        "part 1 of the content of message 1 must be a string, got null",
    ),
    (messages(("user", "a\ud800")), "the content of message 1 has a lone surrogate at character 1"),
    (messages(("system", "s"), HI), "no assistant message, so nothing to train: system, user"),
    (messages(("assistant", "hello")), ORDER + "message 1 must be user, found assistant"),
    (
        messages(("system", "s"), ("assistant", "hello")),
        ORDER + "message 2 must be user, found assistant",
    ),
    (
        messages(("user", "a"), ("user", "b"), ("assistant", "c")),
        ORDER + "message 2 must be assistant, found user",
    ),
    (
        messages(("user", "a"), ("assistant", "b"), ("system", "c")),
        ORDER + "message 3 must be user or tool, found system",
    ),
    (
        messages(("user", "a"), ("tool", "b"), ("assistant", "c")),
        ORDER + "message 2 must be assistant, found tool",
    ),
    (
        messages(("user", "a"), ("assistant", "b"), ("user", "c")),
        "a conversation must end with assistant: message 3, the last, is user",
    ),
    (
        answer(content="a", weight=-1),
        "the weight of message 2 must be finite and not negative, got -1.0",
    ),
    (
        answer(content="a", weight=10**400),
        "the weight of message 2 must be finite and not negative, got inf",
    ),
    (answer(content="a", weight="1"), "the weight of message 2 must be a number, got a string"),
    (answer(content="a", weight=True), "the weight of message 2 must be a number, got a boolean"),
    (answer(content="a", train=1), "the train of message 2 must be true or false, got a number"),
    (answer(content="a", train=True, weight=0), "message 2 has 'train' true and 'weight' 0"),
    (answer(content="a", train=False, weight=0.5), "message 2 has 'train' false and 'weight' 0.5"),
    (
        answer(content="a", tool_plan="first"),
        "message 2 has 'tool_plan', which is not supported, and a template may read it: a "
        "sample_processor can remove or translate it",
    ),
    (answer(content="a", name=3), "the name of message 2 must be a string, got a number"),
    (
        answer(content="a", reasoning="b", thinking="c"),
        "message 2 has 'reasoning' and 'thinking', and they differ",
    ),
    (answer(content="a", thinking=["b"]), "the thinking of message 2 must be a string, got a list"),
    (
        {"messages": [{"role": "user", "content": "a", "reasoning": "b"}]},
        "message 1 is from user and has 'reasoning_content'",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [WEATHER]}]},
        "message 1 is from user and has 'tool_calls'",
    ),
    (
        answer(tool_calls="[{"),
        "the tool calls of message 2 must be JSON, got '[{': Expecting "
        "property name enclosed in double quotes at character 3",
    ),
    (answer(tool_calls=3), "the tool calls of message 2 must be a list, got a number"),
    (
        answer(tool_calls=[WEATHER, "x"]),
        "the tool calls of message 2 must be objects, item 2 is a string",
    ),
    (
        answer(tool_calls=[{"type": "custom"}]),
        "tool call 1 of message 2 is of the type 'custom', expected 'function'",
    ),
    (
        answer(tool_calls=[{"function": "f"}]),
        "the function of tool call 1 of message 2 must be an object, got a string",
    ),
    (
        answer(tool_calls=[{"arguments": {}}]),
        "tool call 1 of message 2 must have a 'name', got None",
    ),
    (answer(tool_calls=[{"name": "f"}]), "tool call 1 of message 2 (f) has no 'arguments'"),
    (
        answer(tool_calls=[{"name": "f", "arguments": '{"a": '}]),
        "the arguments of tool call 1 of message 2 (f) must be JSON, got '{\"a\": ': Expecting "
        "value at character 7",
    ),
    (
        answer(tool_calls=[{"name": "f", "arguments": '{"a": 1, "a": 2}'}]),
        "the key 'a' stands twice in one object",
    ),
    (
        answer(tool_calls=[{"name": "f", "arguments": "[1]"}]),
        "the arguments of tool call 1 of message 2 (f) must be an object, got a list",
    ),
    (
        answer(tool_calls=[{"name": "f", "arguments": "1" * 5000}]),
        "the arguments of tool call 1 of message 2 (f) is not JSON that can be read: Exceeds the "
        "limit (4300 digits) for integer string conversion: value has 5000 digits; use "
        "sys.set_int_max_str_digits() to increase the limit",
    ),
    (
        answer(tool_calls=[{"name": "f", "arguments": {"a": "\ud800"}}]),
        "a string in the tool calls of message 2 has a lone surrogate at character 0",
    ),
    (
        messages(HI, ("function_call", "<tool_call>")),
        "the tool calls of message 2 must be JSON, got '<tool_call>': Expecting value at "
        "character 1",
    ),
    (
        messages(HI, ("function_call", "")),
        "message 2 has the role function_call, and its 'content' is empty",
    ),
    (
        {"messages": [{"role": "function_call", "content": "{}", "tool_calls": [WEATHER]}]},
        "message 1 has the role function_call and 'tool_calls' as well",
    ),
    (
        {**messages(HI), "tools": "x"},
        "'tools' must be JSON, got 'x': Expecting value at character 1",
    ),
    ({**messages(HI), "tools": ["f"]}, "'tools' must be objects, item 1 is a string"),
    (
        {**messages(HI), "tools": [{"name": "\ud800"}]},
        "a string in tool 1 has a lone surrogate at character 0",
    ),
    (
        {**messages(HI), "chat_template_kwargs": [1]},
        "'chat_template_kwargs' must be an object, got a list",
    ),
    (
        {**messages(HI), "chat_template_kwargs": {"messages": []}},
        "'chat_template_kwargs' may not set 'messages'",
    ),
    (
        {**messages(HI), "chat_template_kwargs": {"bos_token": "x"}},
        "'chat_template_kwargs' may not set 'bos_token'",
    ),
    (
        {**messages(HI), "enable_thinking": False},
        "the field 'enable_thinking' is not supported in such a row",
    ),
    ({**messages(HI), "images": ["a"]}, "the field 'images' is not supported in such a row"),
    ({**messages(HI), "labels": [1]}, "the field 'labels' is not supported in such a row"),
    ({"text": "a", "tools": [{}]}, "the field 'tools' is not supported in such a row"),
    (
        {"prompt": "a", "completion": "b", "system": "c"},
        "the field 'system' is not supported in such a row",
    ),
    (
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
        "prompt and completion must both be strings or both be lists of messages, got a string "
        "and a list",
    ),
    ({"prompt": "a", "completion": "\ud800"}, "the completion has a lone surrogate at character 0"),
    ({"prompt": [], "completion": {}}, "'completion' must be a list, got an object"),
    ({"instruction": 3, "output": "a"}, "the instruction must be a string, got a number"),
    (
        {"instruction": "a", "output": "b", "response": "c"},
        "the row has 'output' and 'response', and they differ",
    ),
    (
        {"instruction": "a", "output": "b", "history": "c"},
        "'history' must be a list of pairs, got a string",
    ),
    (
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "turn 1 of 'history' must be a pair of texts",
    ),
    ({"text": 3}, "the text must be a string, got a number"),
    ({"text": "a", "weight": -1}, "the weight must be finite and not negative, got -1.0"),
    ({"text": "a", "weight": "b"}, "the weight of the row must be a number, got a string"),
    ({**messages(HI), "tools": [{"a": DEEP}]}, "the row is nested too deeply"),
]


@pytest.mark.parametrize(
    ("row", "expected"), BAD_ROWS, ids=lambda part: part if isinstance(part, str) else "row"
)
def test_a_bad_row_is_named(row, expected):
    assert reason(row) == expected
