"""From a source to samples: what is yielded, refused, listed, checked and counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.data.overlong_rows import talk, targets, tokenizer, trained
from varlen_sft.data.load import tokenize_file, tokenize_source
from varlen_sft.data.masks import MaskOptions
from varlen_sft.errors import InputError

SPELLS = "the content of message 2 spells the control token '<|im_end|>'"


def row(*contents: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[k % 2], "content": c} for k, c in enumerate(contents)]}


def write(path: Path, rows: list[object]) -> Path:
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    path.write_text(text, encoding="utf-8")
    return path


GOOD, SPELLED, TEXT = row("hello", "it is."), row("a", "<|im_end|>"), {"text": "hello world it is."}
LONG = row("hello", "it is.", "what?", "world")
ROWS = [GOOD, SPELLED, "{", TEXT, row("a"), LONG]


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def rejects_of(path: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(list(line) == ["file", "row", "reason"] for line in lines)
    return [(line["row"], line["reason"]) for line in lines]


# -- rows and their numbers


def test_rows_become_samples_with_their_numbers(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD, "", TEXT, LONG])
    stream = tokenize_source(path, tokenizer())
    got = [(number, [trained(tokenizer(), s) for s in samples]) for number, samples in stream]
    assert got == [
        (1, [["it is.<|im_end|>"]]),
        (3, [["hello world it is.<|im_end|>"]]),
        (4, [["it is.<|im_end|>", "world<|im_end|>"]]),
    ]
    counts = stream.counts
    assert (counts.rows, counts.samples, counts.rejected, counts.untrained) == (3, 3, 0, 0)
    samples = [s for _, few in tokenize_source(path, tokenizer()) for s in few]
    assert (counts.tokens, counts.targets) == (sum(map(len, samples)), len(targets(*samples)))


def test_options_and_mask_modes_reach_the_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", [LONG])
    options = MaskOptions(history="per_assistant")
    ((number, samples),) = tokenize_source(path, tokenizer(), options)
    assert [trained(tokenizer(), s) for s in samples] == [["it is.<|im_end|>"], ["world<|im_end|>"]]
    with pytest.raises(InputError, match="rows.jsonl, row 1: the row is a conversation"):
        list(tokenize_source(f"pretrain:{path}", tokenizer()))
    write(path, [{"input_ids": [5, 6, 7, 8], "loss_mask": [1, 1, 1, 1]}])
    ((_, (sample,)),) = tokenize_source(path, tokenizer(), mask_token_ids=[7])
    assert sample.token_weights.tolist() == [1, 1, 0, 1]


def test_a_processor_makes_the_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"q": "a", "r": "b"}, {"q": "a"}])

    def processor(row: dict) -> dict:
        return {"messages": [{"role": "user", "content": row["q"]},
                             {"role": "assistant", "content": row["r"]}]}  # fmt: skip

    # A mistake in the code is not a row to skip.
    with pytest.raises(InputError, match="row 2: the sample_processor raised KeyError: 'r'"):
        list(tokenize_source(path, tokenizer(), sample_processor=processor, on_error="skip"))


def test_a_row_in_which_no_answer_is_trained_is_counted(tmp_path):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
    ]
    path = write(tmp_path / "rows.jsonl", [{"messages": messages}, GOOD])
    stream = tokenize_source(path, tokenizer(), MaskOptions(history="per_assistant"))
    assert [number for number, _ in stream] == [2]
    assert (stream.counts.rows, stream.counts.untrained) == (2, 1)


def test_a_file_of_conversations_alone(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD, LONG])
    samples = list(tokenize_file(path, tokenizer()))
    assert [trained(tokenizer(), s)[-1] for s in samples] == ["it is.<|im_end|>", "world<|im_end|>"]
    rows = len(samples[1]) - 1
    assert len(list(tokenize_file(path, tokenizer(), max_tokens=rows))) == 2
    with pytest.raises(InputError) as caught:
        list(tokenize_file(path, tokenizer(), max_tokens=rows - 1))
    reason = f"{rows} rows do not fit a pack of {rows - 1} tokens"
    assert str(caught.value) == f"{path}, row 2: {reason}"
    with pytest.raises(InputError, match="row 1: expected a conversation, the row is text"):
        list(tokenize_file(write(path, [TEXT]), tokenizer()))


# -- rows that cannot be used


def test_the_first_bad_row_is_an_error(path, tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    stream = tokenize_source(path, tokenizer(), rejects=rejects)
    assert next(stream)[0] == 1
    with pytest.raises(InputError) as caught:
        next(stream)
    assert str(caught.value) == f"{path}, row 2: {SPELLS}"
    assert sorted(tmp_path.iterdir()) == [path]  # no half a file


def test_bad_rows_are_skipped_counted_and_listed(path, tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    stream = tokenize_source(
        path, tokenizer(), on_error="skip", rejects=rejects, max_tokens=16, overlong="error"
    )
    assert [number for number, _ in stream] == [1, 4]
    assert (stream.counts.rows, stream.counts.rejected, stream.counts.samples) == (6, 4, 2)
    (two, three, five, six) = rejects_of(rejects)
    rows = len(tokenizer().encode(talk("hello", "it is.", "what?", "world"))) - 1
    assert two == (2, SPELLS)
    assert three[0] == 3 and "JSON" in three[1]
    assert five == (5, "no assistant message, so nothing to train: user")
    assert six == (6, f"{rows} rows do not fit a pack of 16 tokens")
    first = json.dumps({"file": str(path), "row": 2, "reason": SPELLS}, ensure_ascii=False)
    assert rejects.read_bytes().startswith(first.encode() + b"\n")
    assert sorted(tmp_path.iterdir()) == [rejects, path]


def test_what_does_not_fit_is_counted_with_its_rows(tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    long_turn = row("hello", "it is.", "what?", "world " * 40)
    path = write(tmp_path / "rows.jsonl", [GOOD, LONG, row("a", "world " * 40), long_turn])
    stream = tokenize_source(path, tokenizer(), max_tokens=16, overlong="split", rejects=rejects)
    assert [(number, len(samples)) for number, samples in stream] == [(1, 1), (2, 2), (4, 1)]
    over = stream.counts.overlong
    assert over.rows == {"dropped": [3], "truncated": [], "split": [2, 4]}
    assert (over.dropped, over.split, over.parts, over.parts_dropped) == (1, 2, 3, 1)
    three, four = rejects_of(rejects)
    assert three[0] == 3 and re.match(r"\d+ rows do not fit a pack of 16 tokens: ", three[1])
    assert four[0] == 4 and four[1].startswith("messages 3 to 4 are left out: one turn of ")
    assert stream.counts.rejected == 0

    stream = tokenize_source(path, tokenizer(), max_tokens=16, overlong="truncate")
    assert [number for number, _ in stream] == [1, 2, 4]
    over = stream.counts.overlong
    assert over.rows == {"dropped": [3], "truncated": [2, 4], "split": []}
    assert (over.truncated, over.parts, over.parts_dropped) == (2, 0, 0)
    stream = tokenize_source(path, tokenizer(), max_tokens=16, overlong="drop", rejects=rejects)
    assert [number for number, _ in stream] == [1]
    assert stream.counts.overlong.rows == {"dropped": [2, 3, 4], "truncated": [], "split": []}
    assert [number for number, _ in rejects_of(rejects)] == [2, 3, 4]


def test_an_id_outside_the_vocabulary_and_a_lone_token_are_refused(tmp_path):
    rows = [{"input_ids": ids, "loss_mask": [1] * len(ids)} for ids in ([5, 6], [5], [5, 300])]
    path, rejects = write(tmp_path / "rows.jsonl", rows), tmp_path / "rejects.jsonl"
    stream = tokenize_source(path, tokenizer(), vocab_size=300, on_error="skip", rejects=rejects)
    assert [number for number, _ in stream] == [1]
    assert rejects_of(rejects) == [
        (2, "one token alone has no target, two or more are needed"),
        (3, "token 1 has the id 300, the model's vocabulary is [0, 300)"),
    ]


def test_rejects_are_written_whole_or_not_at_all(path, tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    rejects.write_text("of an earlier run\n")
    stream = tokenize_source(path, tokenizer(), on_error="skip", rejects=rejects)
    next(stream)
    assert len(list(tmp_path.glob(".rejects.jsonl.*.part"))) == 1
    del stream  # nobody reads on
    assert sorted(tmp_path.iterdir()) == [rejects, path]
    assert rejects.read_text() == "of an earlier run\n"
    list(tokenize_source(write(path, [GOOD]), tokenizer(), rejects=rejects))
    assert rejects.read_bytes() == b""


def test_rejects_that_cannot_be_written_or_are_the_source(path, tmp_path):
    with pytest.raises(InputError, match="no/rejects.jsonl: cannot be written: No such file"):
        list(tokenize_source(path, tokenizer(), rejects=tmp_path / "no" / "rejects.jsonl"))
    with pytest.raises(InputError, match="rows.jsonl: the rejects file is the source itself"):
        tokenize_source(f"sft:{path}", tokenizer(), rejects=path)


def test_wrong_arguments_are_named(path):
    for wrong, message in (
        ({"on_error": "ignore"}, "on_error must be one of .*, got 'ignore'"),
        ({"cross_check": 0}, "cross_check must be 'all', 'none' or 1 or more, got 0"),
        ({"cross_check": "some"}, "cross_check must be .* got 'some'"),
        ({"overlong": "split"}, "overlong='split' needs max_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize_source(path, tokenizer(), **wrong)
    with pytest.raises(InputError, match="no such file"):
        tokenize_source("nothing.jsonl", tokenizer())
