"""Answers to held-out conversations: the right prompts and answers, and no trace in the run."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.data.prepared import chats, jsonl, made, model_folder
from tests.data.test_chat import CHATML
from tests.train.ranks import on_ranks
from tests.train.setups import small_run
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.store import Store
from varlen_sft.data.template_files import stop_ids
from varlen_sft.errors import InputError
from varlen_sft.train.config import LogConfig
from varlen_sft.train.distributed import World
from varlen_sft.train.run import run
from varlen_sft.train.samples import Samples, questions

MOODY = "{{ '<|im_start|>system\n' + mood|default('calm') + '<|im_end|>\n' }}" + CHATML
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "what is it?"},
                  {"role": "assistant", "content": "it is."}],
     "chat_template_kwargs": {"mood": "hello\n\n"}},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                  {"role": "user", "content": "user assistant"},
                  {"role": "assistant", "content": "\U0001f916 world"}]},
]  # fmt: skip


def train(folder: Path, *arguments: str) -> str:
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    with console.file:
        run(small_run(folder, *arguments), console, lambda: nullcontext(lambda *a: None))
    return console.export_text()


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "out" / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    """A folder whose template has a variable, and a prepared set of ROWS."""
    folder = tmp_path_factory.mktemp("moody")
    model = model_folder(folder / "model")
    (model / "chat_template.jinja").write_text(MOODY)
    made(folder / "talks", model, jsonl(folder / "talks.jsonl", ROWS))
    return folder


def test_a_prompt_is_what_the_row_itself_makes_of_the_template(moody):
    tokenizer = ChatTokenizer.from_folder(moody / "model")
    found = questions({"talks": Store(moody / "talks")}, 9)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(moody / "model")
    lengths = [1, 3]  # messages before the last answer
    for question, row, count in zip(found, ROWS, lengths, strict=True):
        expected = theirs.apply_chat_template(
            row["messages"][:count], add_generation_prompt=True, return_dict=False,
            **row.get("chat_template_kwargs", {}),
        )  # fmt: skip
        assert list(question.prompt) == expected
    assert "hello" in tokenizer.decode(found[0].prompt) and found[0].prompt != found[1].prompt
    texts = [[tokenizer.decode(q.asked), tokenizer.decode(q.answer)] for q in found]
    assert texts == [
        ["what is it?", "it is.<|im_end|>"],
        ["user assistant", "\U0001f916 world<|im_end|>"],
    ]
    assert [(q.source, q.sample) for q in found] == [("talks", 1), ("talks", 2)]


def test_sources_come_in_turn_and_documents_not_at_all(moody):
    document = jsonl(moody / "text.jsonl", [{"text": "hello world"}] * 3)
    made(moody / "text", moody / "model", f"pretrain:{document}")
    made(moody / "more", moody / "model", jsonl(moody / "more.jsonl", chats(3)))
    stores = {name: Store(moody / name) for name in ("text", "talks", "more")}

    def chosen(count: int) -> list[tuple[str, int]]:
        return [(q.source, q.sample) for q in questions(stores, count)]

    assert chosen(4) == [("talks", 1), ("more", 1), ("talks", 2), ("more", 2)]
    assert chosen(9) == [*chosen(4), ("more", 3)] and chosen(0) == []


def test_a_model_stops_where_its_folder_says(tmp_path):
    assert stop_ids(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert stop_ids(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert stop_ids(tmp_path) == [9, 7]


class Said:
    """A journal that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.events: list[tuple[str, dict]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def event(self, name: str, **facts: Any) -> None:
        self.events.append((name, facts))


@pytest.mark.parametrize(
    ("source", "tokenizer", "why"),
    [("text", True, "no held-out sample is a conversation"), ("talks", False, "no tokenizer.json")],
)
def test_why_nothing_is_generated_is_said_once(moody, tmp_path, source, tokenizer, why):
    if source == "text":
        document = jsonl(tmp_path / "text.jsonl", [{"text": "hello world"}])
        made(moody / source, moody / "model", f"pretrain:{document}", force=True)
    folder = moody / "model" if tokenizer else tmp_path
    samples = Samples(LogConfig(), {source: Store(moody / source)}, folder, World())
    journal: Any = Said()
    for step in (1, 2):
        samples.tell(torch.nn.Linear(1, 1), step, journal)
    assert len(journal.lines) == 1 and why in journal.lines[0] and not journal.events


def test_without_held_out_data_or_with_none_wanted_nothing_is_said(moody):
    journal: Any = Said()
    talks = {"talks": Store(moody / "talks")}
    for options, stores in ((LogConfig(), {}), (LogConfig(samples=0), talks)):
        Samples(options, stores, moody / "model", World()).tell(torch.nn.Linear(1, 1), 1, journal)
    assert not journal.lines and not journal.events
    with pytest.raises(InputError, match=r"log\.sample_tokens must be 1 or more, is 0"):
        LogConfig(sample_tokens=0)
    with pytest.raises(InputError, match=r"log\.samples must be 0 or more, is -1"):
        LogConfig(samples=-1)


def test_a_tokenizer_that_cannot_be_read_is_named(moody, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read"):
        Samples(LogConfig(), {"talks": Store(moody / "talks")}, tmp_path, World())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that validates twice, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    said = train(folder, "--valid_every", "3", "--lr", "0.01", "--sample_tokens", "9")
    return folder, said


def text(tokenizer: Any, ids: list[int]) -> str:
    """Ids that the tokenizer has no token for, of which the model has some, are written out."""
    known = groupby(ids, lambda token: token < len(tokenizer))
    return "".join(
        tokenizer.decode(list(run)) if is_known else "".join(f"<token {t}>" for t in run)
        for is_known, run in known
    )


def test_the_answers_are_those_of_generate_on_the_export(whole):
    transformers = pytest.importorskip("transformers")
    folder, said = whole
    told = events(folder, "samples")
    assert [event["step"] for event in told] == [3, 6]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out" / "model")
    for row, one in zip(chats(4), told[1]["samples"], strict=True):
        ids = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        prompt = ids["input_ids"].shape[1]
        out = model.eval().generate(
            **ids, do_sample=False, max_new_tokens=9,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), pad_token_id=0,
        )  # fmt: skip
        assert one["said"] == text(tokenizer, out[0, prompt:].tolist())
        assert one["prompt"] == tokenizer.decode(out[0, :prompt])
        assert one["asked"] == row["messages"][0]["content"]
        assert one["answer"] == row["messages"][1]["content"] + "<|im_end|>"
        assert one["exact"] == (one["said"] == one["answer"]) and one["sample"] in range(1, 5)
    exact = sum(one["exact"] for one in told[1]["samples"])
    assert f'step 6: {exact} of 4 held-out answers word for word; to "what is 0? " it says' in said


def test_a_run_with_samples_is_the_run_without_bit_for_bit(whole, tmp_path):
    folder, _ = whole
    train(tmp_path, "--valid_every", "3", "--lr", "0.01", "--log.samples", "0")
    assert not events(tmp_path, "samples")
    for name, fields in (
        ("step", ("step", "loss", "grad_norm", "lr", "real_tokens")),
        ("validation", ("step", "loss")),
    ):
        one, other = (
            [[event[field] for field in fields] for event in events(f, name)]
            for f in (folder, tmp_path)
        )
        assert one == other and len(one) == {"step": 6, "validation": 2}[name]
    weights = [f / "out" / "model" / "model.safetensors" for f in (folder, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def sharded(folder: Path, *options: str) -> str:
    return train(folder, "--steps", "2", "--lr", "0.01", "--sample_tokens", "9", *options)


def test_two_ranks_ask_together_and_rank_0_tells(tmp_path):
    small_run(tmp_path)  # writes the files
    first, second = on_ranks(2, sharded, tmp_path, "--samples", "3")
    assert first.count("held-out answers word for word") == 1 and second == ""
    [told] = events(tmp_path, "samples")
    answers = [row["messages"][1]["content"] + "<|im_end|>" for row in chats(3)]
    assert [one["answer"] for one in told["samples"]] == answers
    assert all(one["said"] for one in told["samples"])
