"""The parts of the learning benchmark: its task, its marks, and what it breaks on purpose."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # where its files find each other

import learning_answers
import learning_broken
import learning_runs
import learning_table
import learning_task

from varlen_sft.data.batch import collate
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.tools.register_machine import answer
from varlen_sft.train import setup


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return learning_task.write_model(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def dialogues() -> learning_task.Dialogues:
    return learning_task.draw(300, 20, seed=0, min_turns=1, max_turns=3)


@pytest.fixture(scope="module")
def samples(folder, dialogues):
    tokenizer = ChatTokenizer.from_folder(folder)
    return [tokenizer.encode(dialogue) for dialogue in dialogues.held_out[:6]]


def test_a_token_is_a_character(folder, dialogues):
    tokenizer = ChatTokenizer.from_folder(folder)
    hf = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    for dialogue in dialogues.held_out:
        sample = tokenizer.encode(dialogue)
        messages = [{"role": m.role, "content": m.content} for m in dialogue.messages]
        text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)
        assert tokenizer.decode(sample.input_ids) == hf.decode(sample.input_ids) == text
        assert len(sample) == sum(len(m["content"]) + 2 for m in messages)
        made = hf.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert made["input_ids"] == sample.input_ids.tolist()
        answers = [m["content"] + "<|end|>" for m in messages if m["role"] == "assistant"]
        assert hf.decode(sample.input_ids[sample.token_weights > 0]) == "".join(answers)
    assert hf("\x07é")["input_ids"] == [hf.unk_token_id] * 2


def test_held_out_is_never_trained():
    """Of one-turn dialogues many are drawn twice, so that something has to be left out."""
    some = learning_task.draw(4000, 300, seed=0, min_turns=1, max_turns=1)
    other = learning_task.draw(4000, 300, seed=1, min_turns=1, max_turns=1)
    short, train, held_out = ({d.messages[-2].content for d in part} for part in some)
    assert len(some.held_out) == 300 and not held_out & short and not held_out & train
    assert other.held_out == some.held_out and other.train != some.train
    drawn = learning_task.register_machine_conversations(4000, 0, 1, 1)
    assert held_out & {d.messages[-2].content for d in drawn}
    assert {len(d.messages) for d in some.short} == {2}  # no system prompt


def test_a_score_is_of_whole_dialogues(dialogues):
    held_out = dialogues.held_out
    asked: list[list[list[str]]] = []

    def reply(talks):
        asked.append([[m.content for m in talk] for talk in talks])
        return [answer(talk) for talk in talks]

    count = sum(m.role == "assistant" for d in held_out for m in d.messages)
    right = learning_answers.score(held_out, reply)
    assert right == (20, 20, count, count, []) and right.share == 1
    longest = max(held_out, key=lambda d: len(d.messages))
    assert [m.content for m in longest.messages[:-1]] in sum(asked, [])


def test_a_score_can_fail(dialogues):
    """One wrong answer costs its dialogue, and is the past of what follows."""
    zero = "Start with all registers at 0 and an empty list."  # may begin several
    talks = [d for d in dialogues.held_out if zero not in {m.content for m in d.messages}]
    held_out = [d for d in talks if len(d.messages) >= 4][:5]
    pasts = []

    def reply(talks):
        pasts.extend([m.content for m in talk if m.role == "assistant"] for talk in talks)
        return ["A=1" if talk[-1] in held_out[0].messages[:2] else answer(talk) for talk in talks]

    found = learning_answers.score(held_out, reply)
    assert (found.dialogues, found.of_answers - found.answers) == (4, 1)
    first = next(m.content for m in held_out[0].messages if m.role == "assistant")
    assert found.wrong[0][1:] == (first, "A=1") and any(p[:1] == ["A=1"] for p in pasts)
    silent = learning_answers.score(held_out, lambda talks: [None] * len(talks))
    padded = learning_answers.score(held_out, lambda talks: [answer(t) + " " for t in talks])
    assert (silent.answers, padded.answers, silent.share) == (0, 0, 0)


def test_labels_across_samples(samples):
    good, bad = collate(samples), learning_broken.labels_across_samples(samples)
    edges = bad.cu_seqlens[1:-1].long() - 1
    firsts = torch.tensor([int(s.input_ids[0]) for s in samples[1:]])
    assert torch.equal(bad.labels[edges], firsts)
    kept = torch.ones(len(bad.labels), dtype=torch.bool)
    kept[edges] = False
    assert torch.equal(bad.labels[kept], good.labels)
    assert torch.equal(bad.input_ids[kept], good.input_ids)


def test_mask_one_token_late(samples):
    bad = learning_broken.mask_one_token_late(samples)
    start = 0
    for sample in samples:
        trained = (bad.labels[start : start + len(sample) - 1] != -100).numpy()
        assert np.array_equal(trained, sample.token_weights[:-1] > 0)
        start += len(sample) - 1


def test_positions_run_on(samples):
    good, bad = collate(samples), learning_broken.positions_run_on(samples)
    assert torch.equal(bad.position_ids, torch.arange(len(good.input_ids)))
    assert torch.equal(bad.cu_seqlens, good.cu_seqlens) and torch.equal(bad.labels, good.labels)


def test_turns_as_samples(samples, folder):
    bad = learning_broken.turns_as_samples(samples)
    hf = ChatTokenizer.from_folder(folder)
    for first, end in zip(bad.cu_seqlens[:-1].tolist(), bad.cu_seqlens[1:].tolist(), strict=True):
        text = hf.decode(bad.input_ids[first:end].numpy())
        assert text.count("<|assistant|>") == 1 and text.startswith(("<|user|>", "<|system|>"))
        assert bad.position_ids[first:end].tolist() == list(range(end - first))


@pytest.mark.parametrize("name", learning_broken.BATCHES)
def test_streams_are_broken_only_meanwhile(name, samples):
    sources = [SimpleNamespace(
        lengths=np.array([len(s) for s in samples]), supervised=np.ones(len(samples), np.int64),
        fingerprint="x", sample=samples.__getitem__,
    )]  # fmt: skip
    options = setup.OrderOptions(max_tokens=8192, packs_per_step=1)

    def first(stream):
        return next(iter(stream(sources, options, setup.StreamOptions(workers=0))))

    with learning_broken.batches_from(learning_broken.BATCHES[name]):
        broken = first(setup.PackStream)
    whole = first(setup.PackStream)
    given = [samples[k] for k in whole.samples[0]]
    expected = learning_broken.BATCHES[name](given)
    assert torch.equal(broken.batches[0].position_ids, expected.position_ids)
    assert torch.equal(broken.batches[0].labels, expected.labels)
    assert torch.equal(whole.batches[0].labels, collate(given).labels)


def test_cheapest_first():
    costs = np.random.default_rng(0).integers(1, 100, 512)
    with learning_broken.cheapest_first(window=128):
        options = setup.OrderOptions(max_tokens=64, packs_per_step=2)
        steps = learning_broken.balance.epoch_steps(costs, 2, window=options.balance_steps)
    assert options.balance_steps == 128 and setup.OrderOptions.__name__ == "OrderOptions"
    sums = np.array([costs[step].sum() for step in steps])
    assert len(sums) == 256
    for half in (sums[:128], sums[128:]):
        assert (np.diff(half) >= 0).all() and half[0] < half[-1]


def test_a_whole_run_in_small(tmp_path):
    """Few steps learn nothing, and the table says so."""
    task = learning_runs.Task(steps=2, dialogues=12, held_out=3, seed=0)
    found = learning_runs.from_scratch(task, tmp_path, {})
    assert found["parameters"] <= 3_000_000 and len(found["curve"]) == 2
    assert found["score"]["share"] == 0 and found["score"]["of_dialogues"] == 3
    assert 3 < found["held_out_loss"] < 5  # ln 102 is 4.6
    results = {"scratch": {"runs": {"seed 0": found}}}
    (met, text), *rest = learning_table.goals(results)
    assert not met and not rest and text.startswith("seed 0: 0.0% of 3 dialogues in ")
    assert len(learning_table.tables(results)) == 1


def test_what_is_broken_has_to_be_worse_than_the_worst_seed():
    def runs(**shares: float) -> dict:
        return {
            "runs": {name.replace("_", " "): {"score": {"share": shares[name]}} for name in shares}
        }

    results = {
        "broken": runs(as_it_is=0.9, labels_across_samples=0.85, turns_as_samples=0.7),
        "spread": runs(seed_1=0.8, seed_2=0.95),
    }
    assert learning_table.shares_as_it_is(results) == [0.9, 0.8, 0.95]
    assert [met for met, _ in learning_table.goals(results)] == [False, True]


def test_a_curve_in_one_line():
    assert learning_table.spark([4, 2, 0.1, 0]) == "█▅▁▁" and learning_table.spark([]) == ""
