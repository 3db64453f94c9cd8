"""The second mechanism on the rows of a source: which it looks at, and what it finds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.data.overlong_rows import talk, tokenizer, trained
from tests.data.test_load import GOOD, LONG, ROWS, TEXT, rejects_of, row, write
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, Message
from varlen_sft.data.layout import Layout, Planner
from varlen_sft.data.load import BATCH, content_hash, tokenize_source
from varlen_sft.data.masks import MaskOptions
from varlen_sft.errors import InputError


@pytest.fixture
def planted(monkeypatch) -> None:
    """A planner that begins every answer one character late."""
    lay_out = Planner.lay_out

    def wrong(self: Planner, conversation: Conversation, only_last: bool = False) -> Layout:
        layout = lay_out(self, conversation, only_last)
        late = tuple(answer._replace(start=answer.start + 1) for answer in layout.answers)
        return replace(layout, answers=late)

    monkeypatch.setattr(Planner, "lay_out", wrong)


DISAGREE = "cross-check: two ways to find message 2 disagree on where it "


def test_a_disagreement_is_an_error_with_file_and_row(planted, tmp_path):
    path = write(tmp_path / "rows.jsonl", [TEXT, "", GOOD])
    stream = tokenize_source(path, tokenizer(), cross_check="all")
    assert next(stream)[0] == 1
    with pytest.raises(InputError) as caught:
        next(stream)
    assert str(caught.value).startswith(f"{path}, row 3: {DISAGREE}")
    assert (caught.value.file, caught.value.row) == (str(path), 3)
    # Nothing else would have seen it: the answer lacks its first letter.
    ((_, (sample,)),) = tokenize_source(write(path, [GOOD]), tokenizer(), cross_check="none")
    assert trained(tokenizer(), sample) == ["t is.<|im_end|>"]


def test_skipped_disagreements_are_named_and_counted_apart(planted, tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    rejects = tmp_path / "rejects.jsonl"
    stream = tokenize_source(path, tokenizer(), on_error="skip", cross_check="all", rejects=rejects)
    assert [number for number, _ in stream] == [4]
    counts = stream.counts
    assert (counts.rejected, counts.disagreements, counts.checked) == (5, 2, 3)
    reasons = dict(rejects_of(rejects))
    assert [number for number in reasons if reasons[number].startswith(DISAGREE)] == [1, 6]


def test_an_over_long_row_is_checked_too(planted, tmp_path):
    path = write(tmp_path / "rows.jsonl", [LONG])
    with pytest.raises(InputError, match="row 1: cross-check: two ways"):
        list(tokenize_source(path, tokenizer(), max_tokens=16, overlong="split", cross_check="all"))


def test_which_rows_are_checked_says_their_content(planted, tmp_path):
    rows = [row("hello", f"answer {k}") for k in range(2 * BATCH)]
    path, rejects = tmp_path / "rows.jsonl", tmp_path / "rejects.jsonl"
    chosen = {k for k in range(len(rows)) if content_hash(talk("hello", f"answer {k}")) % 16 == 0}
    assert 16 <= len(chosen) <= 56  # one in sixteen of 512, or 32
    for places in (range(len(rows)), range(len(rows))[::-1], [*range(100), *range(50, 512)]):
        write(path, [rows[k] for k in places])
        stream = tokenize_source(
            path, tokenizer(), on_error="skip", cross_check=16, rejects=rejects
        )
        kept = [places[number - 1] for number, _ in stream]
        refused = [places[number - 1] for number, _ in rejects_of(rejects)]
        assert refused == [k for k in places if k in chosen]
        assert kept == [k for k in places if k not in chosen]
        assert stream.counts.checked == stream.counts.disagreements == len(refused)


def test_a_hash_is_of_all_that_is_said():
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": 2}}}
    other = {"function": {"arguments": {"b": 2, "a": 1}, "name": "f"}}
    user, said = Message("user", "a"), Message("assistant", "b")
    one = content_hash(Conversation((user, said)))
    assert one == 7525658446917842798  # on every machine
    answers = [
        replace(said, reasoning_content="c"), replace(said, content="c"),
        replace(said, tool_calls=(call,)),
    ]  # fmt: skip
    hashes = [content_hash(Conversation((user, answer))) for answer in answers]
    assert len({one, *hashes}) == 4
    assert hashes[2] == content_hash(Conversation((user, replace(said, tool_calls=(other,)))))


def test_rows_are_checked_under_the_options_they_are_trained_with(monkeypatch, tmp_path):
    seen = []
    check = ChatTokenizer.cross_check

    def seeing(self: ChatTokenizer, rows: list, options: MaskOptions | None = None) -> list:
        seen.append((len(rows), options))
        return check(self, rows, options)

    monkeypatch.setattr(ChatTokenizer, "cross_check", seeing)
    options = MaskOptions(history="per_assistant")
    path = write(tmp_path / "rows.jsonl", [GOOD, TEXT, LONG])
    list(tokenize_source(path, tokenizer(), options, cross_check="all"))
    assert seen == [(2, options)]


def test_one_row_in_a_hundred_is_checked_without_being_asked(planted, tmp_path):
    k = next(k for k in range(10_000) if content_hash(talk("a", f"{k}")) % 100 == 0)
    path = write(tmp_path / "rows.jsonl", [row("a", f"{k + 1}"), row("a", f"{k}")])
    with pytest.raises(InputError, match="row 2: cross-check"):
        list(tokenize_source(path, tokenizer()))
