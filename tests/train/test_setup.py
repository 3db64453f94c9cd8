from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.data.prepared import chat, chats, jsonl, made
from tests.train.setups import small_run
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.store import Store
from varlen_sft.data.stream import PackStream
from varlen_sft.errors import InputError
from varlen_sft.train.config_file import parse_config
from varlen_sft.train.optimizer import MasterAdamW
from varlen_sft.train.setup import (
    make_optimizer,
    open_stream,
    prepare_sets,
    total_steps,
    train_options,
    valid_steps,
)
from varlen_sft.train.stages import JoinedStream, StagedStream


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, rows, and the sets of ``small_run``."""
    folder = tmp_path_factory.mktemp("setup")
    prepare_sets(small_run(folder), folder / "llama")
    return folder


def sets_of(config, place: Path) -> dict[str, Store]:
    return {text: Store(p) for text, p in prepare_sets(config, place / "llama").items()}


def trained(step, tokenizer: ChatTokenizer) -> list[str]:
    """What the supervised rows of a step learn, row after row of its batches."""
    return [tokenizer.decode(batch.labels[batch.labels >= 0].tolist()) for batch in step.batches]


def test_raw_rows_are_prepared_once_and_found_again_by_what_they_are(place):
    config = small_run(place)
    rows = f"{place}/chats.jsonl"
    store = sets_of(config, place)[rows]
    assert len(store) == 40 and store.manifest["inputs"][0]["rows"] == 40
    assert store.prefix.parent == place / "out" / "prepared"
    assert store.prefix.name == store.fingerprint[:16]
    before = {p: p.stat().st_mtime_ns for p in store.prefix.parent.iterdir()}
    assert sets_of(config, place)[rows].prefix == store.prefix
    same_rows = jsonl(place / "copy.jsonl", chats())  # under another name
    renamed = parse_config("", ["--name", str(place / "llama"), "--train", str(same_rows), "--out",
                                str(place / "out"), "--max_tokens", "128"])  # fmt: skip
    assert sets_of(renamed, place)[str(same_rows)].prefix == store.prefix
    assert {p: p.stat().st_mtime_ns for p in store.prefix.parent.iterdir()} == before
    other = small_run(place, "--supervision_mode", "last_assistant")
    assert sets_of(other, place)[rows].prefix != store.prefix
    cached = small_run(place, "--cache", str(place / "cache"))
    assert sets_of(cached, place)[rows].prefix == place / "cache" / store.prefix.name


def test_rows_are_hashed_once(place):
    config, told = small_run(place, "--cache", str(place / "fresh")), []
    prepare_sets(config, place / "llama", lambda *of: told.append(of))
    sizes = [(place / name).stat().st_size for name in ("chats.jsonl", "valid.jsonl")]
    assert [of[1:] for of in told if of[0] == "hash"] == [(size, size) for size in sizes]
    assert [of[0] for of in told].count("rows") >= 2


def test_the_options_of_data_decide_what_is_trained(place):
    row = {"said": chat("hi", "hello world")["messages"]}
    rows = jsonl(place / "said.jsonl", [row, row])
    tokenizer = ChatTokenizer.from_folder(place / "llama")

    def text(*arguments: str) -> list[str]:
        config = small_run(place, "--train", str(rows), "--valid", "[]",
                           "--conversation_column", "said", *arguments)  # fmt: skip
        sample = sets_of(config, place)[str(rows)].sample(0)
        return tokenizer.decode(sample.input_ids[sample.token_weights > 0].tolist())

    assert text() == "hello world<|im_end|>"
    assert text("--train_roles", "user", "--supervision_mode", "roles") == "hi"
    assert "<|im_start|>user" in text("--train_on_completions_only", "false")
    template = place / "bare.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    config = small_run(place, "--train", str(rows), "--valid", "[]", "--conversation_column",
                       "said", "--template", str(template))  # fmt: skip
    sample = sets_of(config, place)[str(rows)].sample(0)
    assert tokenizer.decode(sample.input_ids.tolist()).startswith("user:hi<|im_end|>assistant:")


def test_a_prepared_set_is_taken_as_it_is(place):
    prefix = place / "own"
    made(prefix, place / "llama", place / "chats.jsonl")
    config = small_run(place, "--train", str(prefix), "--out", str(place / "elsewhere"))
    assert sets_of(config, place)[str(prefix)].prefix == prefix
    with pytest.raises(InputError, match="own: was prepared with prompt_weight = 0.0, and data"):
        prepare_sets(small_run(place, "--train", str(prefix), "--prompt_weight", "0.5"), place)


def test_a_row_that_cannot_be_used_is_named(place):
    rows = jsonl(place / "bad.jsonl", [*chats(2), {"messages": []}])
    with pytest.raises(InputError, match="bad.jsonl, row 3: "):
        sets_of(small_run(place, "--train", str(rows)), place)
    assert len(sets_of(small_run(place, "--train", str(rows), "--on_error", "skip"), place)) == 2
    long = jsonl(place / "long.jsonl", [chat("x " * 300, "y")])
    with pytest.raises(InputError, match="long.jsonl, row 1: .* do not fit a pack"):
        sets_of(small_run(place, "--train", str(long)), place)


def test_ranks_share_the_steps_of_one_rank(place):
    config = small_run(place, "--seed", "3")
    sets = prepare_sets(config, place / "llama")
    alone = open_stream(config, sets, place / "llama")
    assert isinstance(alone, PackStream) and type(alone) is PackStream
    assert alone.accumulate == 4 and alone.options.seed == 3
    # (2 C (H + K) + 3 C I / D) / H + 1, see ModelSizes.a
    assert alone.options.cost_a == (2 * 32 * (4 + 2) + 3 * 32 * 48 // 16) // 4 + 1
    parts = [open_stream(config, sets, place / "llama", rank, 2) for rank in range(2)]
    for whole, *halves in zip(*(islice(s, 4) for s in (alone, *parts)), strict=True):
        found = sorted(i for half in halves for ids in half.samples for i in ids.tolist())
        assert found == sorted(i for ids in whole.samples for i in ids.tolist())


def test_options_of_the_stream(place):
    config = small_run(
        place, "--packing", "streaming", "--balance", "none", "--accumulate", "2", "--isolate",
        "false", "--train", f"[{place}/chats.jsonl, {place}/valid.jsonl]", "--weights", "[3, 1]",
    )  # fmt: skip
    stream = open_stream(config, prepare_sets(config, place / "llama"), place / "llama")
    assert type(stream) is JoinedStream and stream.accumulate == 2
    options = stream.options
    assert (options.method, options.balance, options.weights) == ("streaming", "none", (3.0, 1.0))
    batch = stream.step(0).batches[0]
    total = len(batch.input_ids)
    assert total % 64 == 0 and batch.real_tokens > 64 > batch.pad_tokens
    assert batch.cu_seqlens.tolist() == [0, batch.real_tokens, *[total] * (batch.pad_tokens > 0)]


def test_stages_take_their_data_in_turn(place):
    text = f"""
model: {{name: '{place}/llama'}}
stream: {{max_tokens: 128, packs_per_step: 2}}
run: {{out: '{place}/out', steps: 5}}
stages:
- {{name: a, start_training_step: 1, train: '{place}/valid.jsonl'}}
- {{name: b, start_training_step: 3, train: '{place}/chats.jsonl'}}
"""
    config = small_run(place, text=text)
    sets = prepare_sets(config, place / "llama")
    stream = open_stream(config, sets, place / "llama")
    assert isinstance(stream, StagedStream) and stream.starts == [1, 3]
    assert [len(s.sources.lengths) for s in stream.streams] == [9, 40]
    assert total_steps(config, stream) == 5


def test_validation_packs_are_the_same_on_any_ranks(place):
    config = small_run(place, "--max_tokens", "100", "--valid", f"{place}/chats.jsonl",
                       "--valid_packs", "5")  # fmt: skip
    sets = prepare_sets(config, place / "llama")
    alone = [step.batches for step in valid_steps(config, sets)]
    assert len(alone) == 5
    texts = sorted(str(batch.input_ids.tolist()) for (batch,) in alone)
    parts = [valid_steps(config, sets, rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    batches = [batch for part in parts for step in part for batch in step.batches]
    assert sorted(str(b.input_ids.tolist()) for b in batches if b.weight_sum) == texts
    assert [float(b.weight_sum) for b in batches].count(0.0) == 1
    assert valid_steps(small_run(place, "--valid", "[]"), sets) == ()


def test_the_length_of_a_run(place):
    config = small_run(place, "--steps", "null", "--epochs", "2.5", "--packs_per_step", "2")
    stream = open_stream(config, prepare_sets(config, place / "llama"), place / "llama")
    per_epoch = stream.steps_per_epoch
    assert per_epoch == 5 and total_steps(config, stream) == 13
    assert total_steps(small_run(place, "--steps", "7"), stream) == 7


def test_the_optimizer_and_its_schedule_are_those_asked_for(place):
    config = small_run(place, "--lr", "0.5", "--schedule", "linear", "--warmup", "0.5", "--floor",
                       "0.2", "--weight_decay", "0.1", "--betas", "[0.8, 0.9]").optim  # fmt: skip
    layer = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(config, layer)
    assert isinstance(optimizer, MasterAdamW)
    groups = optimizer._adamw.param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert {g["betas"] for g in groups} == {(0.8, 0.9)}
    options = train_options(config, 100)
    assert [options.rate(p) for p in (0.25, 0.5, 0.75, 1.0)] == pytest.approx([0.25, 0.5, 0.3, 0.1])
    assert options.max_steps == 100 and options.max_grad_norm == 1.0
