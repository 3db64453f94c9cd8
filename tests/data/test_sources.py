"""Source strings, masks modes, sample processors, the hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.megatron_files import write
from varlen_sft.data.conversation import Conversation, ConversationError, Message, Text, Tokens
from varlen_sft.data.sources import (
    Source,
    load_processor,
    read_conversations,
    read_rows,
    write_conversations,
)
from varlen_sft.errors import InputError

HELLO = Conversation((Message("user", "hi"), Message("assistant", "hello")))
CHAT = {"messages": [{"role": m.role, "content": m.content} for m in HELLO.messages]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str, *rows: object) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def problem(source: object, **options) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(source, **options))
    return str(caught.value)


def test_source_strings(folder):
    assert Source.parse("a.jsonl") == Source("a.jsonl")
    assert Source.parse("sft:a/b:c") == Source("a/b:c", "sft")
    assert Source.parse("pretrain:/x/y@test") == Source("/x/y", "pretrain", "test")
    assert Source.parse("me@home@test") == Source("me@home", None, "test")
    assert Source.parse("./sft:a") == Source("./sft:a")
    put("me@home.jsonl")
    assert Source.parse("sft:me@home.jsonl") == Source("me@home.jsonl", "sft")
    assert Source.parse("hub:owner/name@train[:10]") == Source(
        "owner/name", None, "train[:10]", hub=True
    )
    assert str(Source.parse("sft:hub:owner/name")) == "hub:owner/name"
    for text in ("", "sft:", "hub:", "pretrain:hub:@a", "a@"):
        with pytest.raises(InputError, match="expected .sft:.pretrain:.search:..hub:.NAME.@SPLIT."):
            Source.parse(text)


def test_rows_of_every_kind_and_the_bad_ones_in_their_place(folder):
    put("rows", CHAT, {"text": "a"}, {"id": 1}, [], {"input_ids": [1, 2], "labels": [-100, 2]})
    with open("rows", "a") as file:
        file.write("{\n" + json.dumps(CHAT))
    for source in ("rows", folder / "rows", Source("rows")):
        rows = dict(read_rows(source))
        assert list(rows) == [1, 2, 3, 4, 5, 6, 7]
        assert rows[1] == rows[7] == HELLO and rows[2] == Text("a")
        assert isinstance(rows[5], Tokens) and rows[5].token_weights.tolist() == [0, 1]
        assert all(isinstance(rows[n], ConversationError) for n in (3, 4, 6))
        assert str(rows[3]).endswith("or 'text', found 'id'")
        assert str(rows[4]) == "expected a JSON object, got a list"
        assert str(rows[6]).startswith("not JSON: Expecting property name")


def test_the_mode_of_a_source_goes_to_its_rows(folder):
    put("rows", CHAT, {"text": "a"}, {"input_ids": [1, 2]})
    sft = [row for _, row in read_rows("sft:rows")]
    assert sft[0] == HELLO
    assert "and the source is 'sft:'" in str(sft[1])
    assert "input_ids without labels" in str(sft[2])
    pretrain = [row for _, row in read_rows("pretrain:rows")]
    assert "and the source is 'pretrain:'" in str(pretrain[0])
    assert pretrain[1] == Text("a")
    assert isinstance(pretrain[2], Tokens) and pretrain[2].token_weights.tolist() == [1, 1]


def test_ids_that_are_never_trained(folder):
    put("rows", {"input_ids": [1, 2], "labels": [1, 2]})
    ((_, row),) = read_rows("rows", mask_token_ids=[2])
    assert isinstance(row, Tokens) and row.token_weights.tolist() == [1, 0]


# -- sample processors


def faq(row):
    return {"text": row["q"] + row["a"]} if row["q"] else Text("nothing")


def refuse(row):
    raise ConversationError(f"no {row['q']!r} here")


def test_a_sample_processor_translates_rows(folder):
    put("rows", {"q": "a", "a": "b"}, {"q": "", "a": ""})
    expected = [(1, Text("ab")), (2, Text("nothing"))]
    assert list(read_rows("rows", sample_processor=faq)) == expected
    assert list(read_rows("rows", sample_processor=f"{__name__}:faq")) == expected
    ((_, first), _) = read_rows("rows", sample_processor=refuse)
    assert isinstance(first, ConversationError) and str(first) == "no 'a' here"
    ((_, first), _) = read_rows("rows", sample_processor=lambda row: None)
    assert str(first) == "expected a JSON object, got null"  # not left out


def test_a_sample_processor_that_fails_is_named_with_the_row(folder):
    put("rows", {"q": "a", "a": "b"}, {"q": "a"})
    assert problem("rows", sample_processor=faq) == (
        "rows, row 2: the sample_processor raised KeyError: 'a'"
    )
    assert problem("rows", sample_processor="faq") == (
        "sample_processor must be 'module:function', got 'faq'"
    )
    assert problem("rows", sample_processor="no_such_module:faq") == (
        "sample_processor 'no_such_module:faq': No module named 'no_such_module'"
    )
    assert "has no attribute 'faq'" in problem("rows", sample_processor="json:faq")
    assert problem("rows", sample_processor="json:__name__") == (
        "sample_processor 'json:__name__' is not callable"
    )
    assert load_processor("json:dumps") is json.dumps


# -- sources that are not there


def test_a_source_that_is_not_there_is_no_download(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError) as caught:
        read_rows("owner/name")  # before the first row
    assert str(caught.value) == "owner/name: no such file (on the hub? then hub:owner/name)"
    assert problem("none.jsonl") == "none.jsonl: no such file"
    assert problem(put("rows", CHAT) + "@train") == "rows: is a file and has no split 'train'"
    assert problem("hub:owner/name") == "hub:owner/name: needs datasets: pip install datasets"


def test_conversations_are_read_and_written_from_here_too(folder):
    write_conversations("rows", [HELLO])
    assert list(read_conversations("rows")) == [(1, HELLO)]


# -- the hub


class Streamed:
    """What datasets.load_dataset gives when it streams, as far as it is used."""

    def __init__(self, rows: list[dict], fail_after: int | None = None) -> None:
        self.rows, self.fail_after = rows, fail_after

    def with_format(self, kind: str) -> Streamed:
        assert kind == "arrow"
        return self

    def iter(self, batch_size: int):
        import pyarrow

        for start in range(0, len(self.rows), 2):
            if start == self.fail_after:
                raise ConnectionError("the line is dead")
            yield pyarrow.Table.from_pylist(self.rows[start : start + 2])


@pytest.fixture
def hub(monkeypatch):
    pytest.importorskip("pyarrow")
    calls = []

    def install(data: object) -> list:
        def load_dataset(*names, **options):
            calls.append((*names, options))
            if isinstance(data, Exception):
                raise data
            return data

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return calls

    return install


def test_the_hub_is_streamed_and_its_code_is_not_trusted(hub):
    calls = hub(Streamed([CHAT, CHAT, {"messages": [{"role": "user", "content": "hi"}]}]))
    rows = list(read_rows("hub:owner/name/en@train"))
    assert calls == [("owner/name", "en", {"split": "train", "streaming": True})]
    assert rows[:2] == [(1, HELLO), (2, HELLO)]
    assert str(rows[2][1]).startswith("no assistant message")
    assert list(read_rows("hub:squad"))[0] == (1, HELLO)
    assert calls[1][:2] == ("squad", None)


def test_a_split_of_the_hub_is_named(hub):
    hub({"train": Streamed([CHAT]), "test": Streamed([])})
    assert problem("hub:owner/name") == (
        "hub:owner/name: has the splits train, test: one must be named (NAME@SPLIT)"
    )
    hub({"test": Streamed([CHAT])})
    assert list(read_rows("hub:owner/name")) == [(1, HELLO)]


def test_what_the_hub_refuses_is_named(hub):
    hub(ConnectionError("no network"))
    assert problem("hub:owner/name") == "hub:owner/name: cannot be loaded: no network"
    hub(Streamed([CHAT] * 4, fail_after=2))
    assert problem("hub:owner/name") == (
        "hub:owner/name, row 2: cannot be read after this row: the line is dead"
    )


# -- Megatron


def test_megatron_documents_with_and_without_a_mask(folder):
    write(Path("plain"), [[[1, 2], [3]]])
    write(Path("masked"), [[[1, 2, 3, 1, 1, 0]]])
    ((_, row),) = read_rows("pretrain:plain")
    assert isinstance(row, Tokens) and row.input_ids.dtype == np.int32
    assert row.input_ids.tolist() == [1, 2, 3] and row.token_weights.tolist() == [1, 1, 1]
    ((_, row),) = read_rows("sft:masked.bin")
    assert isinstance(row, Tokens)
    assert row.input_ids.tolist() == [1, 2, 3] and row.token_weights.tolist() == [0, 1, 1]
    ((_, row),) = read_rows("plain.idx")
    assert "input_ids without labels" in str(row)
    assert problem("sft:plain") == (
        "plain.bin, row 1: expected tokens and as many mask entries, 0 or 1 ('sft:' reads "
        "documents so), got 3 entries that are not"
    )
