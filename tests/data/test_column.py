from __future__ import annotations

import pytest

from tests.data.prepared import chats, jsonl, made, model_folder
from varlen_sft.data import column
from varlen_sft.data.column import processor
from varlen_sft.data.conversation import Conversation, ConversationError
from varlen_sft.data.sources import load_processor, read_rows
from varlen_sft.data.store import Store

SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_messages_in_another_column(tmp_path):
    rows = [{"chat data": SAID, "id": 3, "messages": [], "input_ids": [1]}, {"chat": SAID}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    found = [row for _, row in read_rows(str(path), sample_processor=processor("chat data"))]
    assert isinstance(found[0], Conversation)
    assert [m.content for m in found[0].messages] == ["hi", "hello"]
    assert isinstance(found[1], ConversationError)
    assert str(found[1]) == "no column 'chat data' with the messages; the row has chat"


def test_a_worker_finds_it_by_its_name_and_the_samples_are_those_of_messages(tmp_path):
    model = model_folder(tmp_path / "model")
    plain = jsonl(tmp_path / "a.jsonl", chats(9))
    other = jsonl(tmp_path / "b.jsonl", [{"said": row["messages"]} for row in chats(9)])
    made(tmp_path / "plain", model, plain)
    made(tmp_path / "other", model, other, sample_processor=processor("said"), workers=2)
    one, two = Store(tmp_path / "plain"), Store(tmp_path / "other")
    assert len(one) == len(two) == 9
    for i in range(9):
        assert (one.sample(i).input_ids == two.sample(i).input_ids).all()
        assert (one.sample(i).token_weights == two.sample(i).token_weights).all()


def test_what_is_no_column():
    assert load_processor(processor("x"))(3) == 3  # refused where rows are parsed
    with pytest.raises(AttributeError):
        column.__wrapped__  # noqa: B018
