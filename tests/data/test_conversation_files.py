"""Files of conversations, read and written."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from varlen_sft.data.formats import (
    Conversation,
    ConversationError,
    Message,
    read_conversations,
    write_conversations,
)
from varlen_sft.errors import InputError

HELLO = Conversation((Message("user", "hi"), Message("assistant", "hello")))
HI = ("user", "hi")
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def messages(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


@pytest.fixture
def read(tmp_path):
    def read(data: bytes | str):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return list(read_conversations(path))

    return read


def test_conversations_stream(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(messages(HI, ("assistant", "hello"))) + "\nnot JSON\n")
    rows = read_conversations(path)
    assert list(islice(rows, 1)) == [(1, HELLO)]  # the bad row is not read yet
    with pytest.raises(InputError, match="row 2: not JSON: Expecting value at column 1"):
        next(rows)


def test_a_row_that_is_no_conversation_is_named_with_file_and_row(read, tmp_path):
    good = json.dumps(messages(HI, ("assistant", "hello")))
    with pytest.raises(InputError) as caught:
        read(good + '\n\n{"text": "a"}\n')
    assert str(caught.value) == (
        f"{tmp_path}/rows.jsonl, row 3: expected a conversation, the row is text"
    )
    with pytest.raises(InputError) as caught:
        read(good + "\n" + json.dumps(messages(HI)))
    assert str(caught.value) == (
        f"{tmp_path}/rows.jsonl, row 2: no assistant message, so nothing to train: user"
    )


def test_a_conversation_cannot_be_made_wrong():
    with pytest.raises(ConversationError, match="no assistant message"):
        Conversation((Message("user", "a"), Message("user", "b")))


def test_conversations_can_be_told_apart_in_a_set():
    with_tools = Conversation(HELLO.messages, tools=({"name": "f"},))
    assert len({HELLO, Conversation(HELLO.messages), with_tools}) == 2


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "out.jsonl"
    odd = Conversation((Message("user", "é\n\u2028\r\ud83e"[:-1]), Message("assistant", "")))
    full = Conversation(
        (
            Message("user", "a", weight=0.0),
            Message("assistant", "", "b", (WEATHER,)),
            Message("tool", "c", extra={"name": "weather", "tool_call_id": "1"}),
            Message("assistant", "d", reasoning_content="", weight=0.3),
        ),
        tools=({"name": "weather"},),
        template_kwargs={"enable_thinking": True},
    )
    write_conversations(path, [HELLO, odd, full])
    assert list(read_conversations(path)) == [(1, HELLO), (2, odd), (3, full)]
    first = path.read_bytes().split(b"\n")[0].decode()
    assert first == json.dumps(messages(HI, ("assistant", "hello")))
    assert "é" in path.read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "out.jsonl"
    write_conversations(path, [HELLO])
    before = path.read_bytes()

    def rows():
        yield HELLO
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_conversations(path, rows())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
