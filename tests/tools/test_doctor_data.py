"""``varlen-sft doctor --data`` counts what is planted, and says which rows are strange and why."""

from __future__ import annotations

import json
from functools import partial

import pytest

from tests.tools.doctor_cases import LAST_THOUGHT, ROWS, examined, findings, talk, write_folder
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError, Message, Text
from varlen_sft.data.masks import MaskOptions
from varlen_sft.errors import InputError
from varlen_sft.tools.doctor_data import DataOptions, take_census
from varlen_sft.tools.doctor_strange import Traits, odd_characters, strangest


@pytest.fixture
def folder(tmp_path):
    return partial(write_folder, tmp_path)


@pytest.fixture
def file(tmp_path):
    def make(*rows: dict):
        path = tmp_path / "chats [b].jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    return make


def test_what_is_planted_in_a_file_is_found(folder, file):
    report = examined(folder(), file(*ROWS))
    data = report["data"]
    found = findings(data)
    assert not report["passed"] and data["rows"] == 40
    assert [(one["count"], one["rows"]) for one in data["refused"]] == [
        (1, [3]),
        (2, [5, 6]),
        (1, [22]),
    ]
    assert [one["reason"] for one in data["refused"]] == [
        "the conversation is empty",
        "the content of message 2 spells the control token '<|im_end|>'",
        "not of this tokenizer: ids must be in [0, 302), got 9999",
    ]
    assert found["are rows refused?"] == ("fail", "4 of 40 rows, for 3 reasons, see below")
    assert found["are there rows with nothing to train?"] == ("fail", "1 of 40 rows: row 11")
    assert found["do tokens straddle the start of an answer?"] == (
        "note",
        "in 1 row: row 7; the text is cut there, as it is when a model is prompted",
    )
    assert found["do messages spell control tokens?"][1].startswith("in 1 row: row 9;")
    assert found["are there duplicates?"][1].startswith("in 1 row: row 15;")
    assert found["does what is trained end with a stop token?"] == (
        "note",
        "not in 1 row of input_ids: row 21",
    )
    assert found["is history written as it was said?"] == ("pass", "no thinking is left out")
    assert found["do two ways to find answers agree?"] == (
        "pass",
        "on 37 conversations, drawn at random",
    )


def test_shares_are_those_of_the_samples(folder, file):
    path = file(*ROWS)
    data = examined(folder(), path)["data"]
    tokenizer = ChatTokenizer.from_folder(folder())
    tokens, trained = dict.fromkeys(data["roles"], 0), dict.fromkeys(data["roles"], 0)
    for number, row in enumerate(ROWS, 1):
        if number in (3, 5, 6, 21, 22):
            continue
        user, answer = (Message(m["role"], m["content"]) for m in row["messages"])
        sample = tokenizer.encode(Conversation((user, answer)))
        for role, weight in zip(sample.roles, sample.token_weights, strict=True):
            name = ("none", "system", "user", "assistant", "tool")[role]
            tokens[name] += 1
            trained[name] += int(weight > 0 and number != 11)
    tokens["none"] += 1  # row 21: its first token is no target, its others are
    tokens["assistant"] += 3
    trained["assistant"] += 3
    assert data["roles"] == {r: {"tokens": tokens[r], "trained": trained[r]} for r in tokens}
    assert data["tokens"] == sum(tokens.values()) and data["trained"] == sum(trained.values())
    share = trained["assistant"] / tokens["assistant"]
    evidence = findings(data)["what is trained?"][1]
    assert f"assistant {share:.1%} of {tokens['assistant']}" in evidence


def test_the_strangest_rows_come_first_and_say_why(folder, file):
    strange = {one["row"]: one for one in examined(folder(), file(*ROWS))["data"]["strange"]}
    assert list(strange)[:2] == [11, 13] and {11, 19, 21, 15, 17, 7, 9} <= set(strange)
    reasons = {row: " | ".join(one["reasons"]) for row, one in strange.items()}
    assert "long: " in reasons[13] and " of it is trained, the median is " in reasons[13]
    assert "nothing is trained" in reasons[11]
    assert "3 odd characters" in reasons[19]
    assert "a trained answer does not end with a stop token" in reasons[21]
    assert reasons[15] == "the same as row 2"
    assert "1 empty answer" in reasons[17]
    assert "1 straddling token" in reasons[7]
    assert "a message spells a control token" in reasons[9]


def test_the_score_is_what_its_page_says():
    usual = [Traits(n, 100, 50) for n in range(1, 20)]
    rows = [Traits(20, 400, 50), Traits(21, 25, 0), Traits(22, 100, 50, straddles=9, rewritten=1),
            Traits(23, 100, 50, repeats=4), Traits(24, 100, 40)]  # fmt: skip
    found = strangest(usual + rows)
    assert [(one.row, one.score) for one in found] == [(21, 7.0), (20, 4.0), (22, 4.0), (23, 2.0)]
    assert found[0].reasons == ("nothing is trained", "short: 25 tokens, the median is 100")
    assert found[1].reasons == (
        "long: 400 tokens, the median is 100",
        "12.5% of it is trained, the median is 50.0%",
    )
    assert found[2].reasons == ("9 straddling tokens", "1 answer without its thinking")
    assert [one.row for one in strangest(usual + rows, 2)] == [21, 20] and strangest([]) == []


@pytest.mark.parametrize(
    ("text", "odd"),
    [("plain\n\ttext é🤖漢字 👩\u200d🔧", 0), ("\x00\x1b\x7f", 3), ("\u202e\ufeff\ue000\ufffd", 4)],
)
def test_odd_characters_are_counted(text, odd):
    assert odd_characters(Text(text)) == odd
    assert (
        odd_characters(Conversation((Message("user", text), Message("assistant", text)))) == 2 * odd
    )


def test_thinking_that_is_lost_in_the_data(folder, file):
    said = talk("a", "b", reasoning_content="hm")["messages"]
    path = file({"messages": said + said}, talk("a", "c"))
    name = "is history written as it was said?"
    model = folder(LAST_THOUGHT)
    told = findings(examined(model, path)["data"])[name]
    assert told == (
        "fail",
        "1 row with earlier answers that lose their thinking: row 1; use history=preserve or "
        "per_assistant",
    )
    kept = findings(examined(model, path, MaskOptions(history="preserve"))["data"])[name]
    assert kept == ("pass", "no thinking is left out")
    each = findings(examined(model, path, MaskOptions(history="per_assistant"))["data"])[name]
    assert each[0] == "pass" and each[1].endswith("row 1; it is not trained there")


def test_so_many_rows_are_checked_a_second_way(folder, file, monkeypatch):
    path, seen = file(*(talk(f"{n}", "a") for n in range(200)), {"text": "hello"}), []

    def check(self, rows, options=None):
        seen.extend(row.messages[0].content for row in rows)
        bad = ("5", "77")
        return [ConversationError("no") if r.messages[0].content in bad else None for r in rows]

    monkeypatch.setattr(ChatTokenizer, "cross_check", check)
    tokenizer = ChatTokenizer.from_folder(folder())
    census = take_census(tokenizer, MaskOptions(), DataOptions(source=str(path), cross_check=7))
    assert census.checked == len(set(seen)) == 7 and census.disagreements == []
    assert max(map(int, seen)) > 100 and min(map(int, seen)) < 100
    data = examined(folder(), path, cross_check=200)["data"]
    assert findings(data)["do two ways to find answers agree?"] == (
        "fail",
        "not in 2 of 200: row 6: no",
    )
    data = examined(folder(), path, cross_check=0)["data"]
    assert findings(data)["do two ways to find answers agree?"][0] == "note"


def test_progress_tells_of_rows(folder, file):
    told: list[str] = []
    options = DataOptions(source=str(file(*ROWS, *ROWS)))
    take_census(ChatTokenizer.from_folder(folder()), MaskOptions(), options, told.append)
    assert told[:2] == ["16 rows read", "32 rows read"] and "80 rows read" in told
    assert told[-1] == "74 of 74 rows checked a second way"


def test_the_first_token_is_no_target(folder, file):
    row = {"input_ids": [5, 6], "labels": [5, -100]}
    data = examined(folder(), file(row, talk("a", "b")))["data"]
    assert findings(data)["are there rows with nothing to train?"] == ("fail", "1 of 2 rows: row 1")


def test_a_file_without_rows_is_bad_input(folder, file):
    with pytest.raises(InputError, match="there are no rows"):
        examined(folder(), file())
