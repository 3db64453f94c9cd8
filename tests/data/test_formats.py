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


def messages(*turns: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})


@pytest.fixture
def read(tmp_path):
    def read(data: bytes | str):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return list(read_conversations(path))

    return read


def test_reads_messages(read):
    row = messages(("system", "Be brief."), ("user", "hi"), ("assistant", "hello é🤖\u2028"))
    assert read(row) == [
        (
            1,
            Conversation(
                (
                    Message("system", "Be brief."),
                    Message("user", "hi"),
                    Message("assistant", "hello é🤖\u2028"),
                )
            ),
        )
    ]


@pytest.mark.parametrize("user", ["human", "user"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant"])
def test_reads_sharegpt(read, user, assistant):
    row = {
        "id": 7,
        "conversations": [{"from": user, "value": "hi"}, {"from": assistant, "value": "hello"}],
    }
    assert read(json.dumps(row)) == [(1, HELLO)]


def test_rows_are_physical_lines_and_a_byte_order_mark_is_no_text(read):
    row = messages(("user", "hi"), ("assistant", "hello"))
    data = "\ufeff\n \r\n" + row + "\r\n\n" + row.replace(", ", ",\r ")  # a lone \r ends no line
    assert read(data) == [(3, HELLO), (5, HELLO)]
    assert read("\ufeff" + row) == [(1, HELLO)]


def test_an_unset_extra_field_is_no_field(read):
    row = {
        "messages": [
            {"role": "user", "content": "hi", "tool_calls": None},
            {"role": "assistant", "content": "hello"},
        ],
        "tools": [],
        "source": "here",
    }
    assert read(json.dumps(row)) == [(1, HELLO)]


def test_streams(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(messages(("user", "hi"), ("assistant", "hello")) + "\nnot JSON\n")
    rows = read_conversations(path)
    assert list(islice(rows, 1)) == [(1, HELLO)]  # the bad row is not read yet
    with pytest.raises(InputError, match="row 2"):
        next(rows)


ORDER = "roles must be an optional system, then user and assistant in turn: "
BAD_ROWS = {
    '{"messages": [}': "not JSON: Expecting value at column 15",
    "[1]": "expected a JSON object, got a list",
    "3": "expected a JSON object, got a number",
    '{"text": "hi", "id": 1}': "expected either the key 'messages' or the key 'conversations', "
    "found 'text', 'id'",
    '{"messages": [], "conversations": []}': "expected either the key 'messages' or the key "
    "'conversations', found 'messages', 'conversations'",
    '{"messages": "hi"}': "'messages' must be a list, got a string",
    '{"messages": []}': "the conversation is empty",
    '{"messages": ["hi"]}': "message 1 must be an object, got a string",
    '{"messages": [{"role": "user"}]}': "message 1 has no 'content'",
    '{"conversations": [{"role": "user", "content": "hi"}]}': "message 1 has no 'from'",
    messages(("user", "hi"), ("bot", "hello")): "message 2 has the unknown role 'bot', known are "
    "system, user, assistant, tool",
    '{"conversations": [{"from": "bing", "value": "hi"}]}': "message 1 has the unknown role "
    "'bing', known are system, user, assistant, tool, human, gpt",
    messages((["user"], "hi")): "message 1 has the unknown role ['user'], known are "
    "system, user, assistant, tool",
    messages(("user", "hi"), ("assistant", None)): "the content of message 2 must be a string, "
    "got null",
    messages(("user", ["hi"])): "the content of message 1 must be a string, got a list",
    messages(("user", 3)): "the content of message 1 must be a string, got a number",
    messages(("user", "a\ud800")): "the content of message 1 has a lone surrogate at character 1",
    messages(("system", "s"), ("user", "hi")): "no assistant message, so nothing to train: "
    "system, user",
    messages(("assistant", "hello")): ORDER + "message 1 must be user, found assistant",
    messages(("system", "s"), ("assistant", "hello")): ORDER
    + "message 2 must be user, found assistant",
    messages(("user", "a"), ("user", "b"), ("assistant", "c")): ORDER
    + "message 2 must be assistant, found user",
    messages(("user", "a"), ("assistant", "b"), ("system", "c")): ORDER
    + "message 3 must be user, found system",
    messages(("user", "a"), ("tool", "b"), ("assistant", "c")): ORDER
    + "message 2 must be assistant, found tool",
    messages(("user", "a"), ("assistant", "b"), ("user", "c")): "a conversation must end with "
    "assistant: message 3, the last, is user",
    '{"messages": [{"role": "user", "content": "a", "weight": 0}]}': "message 1 has 'weight', "
    "which is not supported yet (only 'role' and 'content' are)",
    '{"messages": [], "tools": [{}]}': "the field 'tools' is not supported yet",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(messages(("user", "hi"), ("assistant", "hello")) + "\n\n" + row + "\n")
    with pytest.raises(InputError) as caught:
        list(read_conversations(path))
    assert caught.value.reason == BAD_ROWS[row]
    assert str(caught.value) == f"{path}, row 3: {BAD_ROWS[row]}"


def test_bytes_that_are_no_text_are_named(read):
    with pytest.raises(InputError, match="row 1: not UTF-8: invalid start byte at byte 3$"):
        read(b'{"\xff')
    with pytest.raises(InputError, match="row 1: not JSON that can be read: .*recursion"):
        read("[" * 100_000)


def test_a_file_that_cannot_be_read_is_named_before_the_first_row(tmp_path):
    with pytest.raises(InputError) as caught:
        read_conversations(tmp_path / "none.jsonl")
    assert str(caught.value) == f"{tmp_path}/none.jsonl: no such file"
    with pytest.raises(InputError, match="is a folder, expected a JSON lines file"):
        read_conversations(tmp_path)


def test_a_conversation_cannot_be_made_wrong():
    with pytest.raises(ConversationError, match="no assistant message"):
        Conversation((Message("user", "a"), Message("user", "b")))


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "out.jsonl"
    odd = Conversation((Message("user", "é\n\u2028\r\ud83e"[:-1]), Message("assistant", "")))
    write_conversations(path, [HELLO, odd])
    assert list(read_conversations(path)) == [(1, HELLO), (2, odd)]
    first = path.read_bytes().split(b"\n")[0].decode()
    assert first == messages(("user", "hi"), ("assistant", "hello"))
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
