from __future__ import annotations

import json
import os
import threading
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.data.prepared import contents
from tests.train.setups import small_run
from varlen_sft.data.sample import ROLES
from varlen_sft.data.store import Store
from varlen_sft.data.stream import Step
from varlen_sft.errors import InputError
from varlen_sft.train import mock
from varlen_sft.train.config import TrainConfig
from varlen_sft.train.config_file import parse_config
from varlen_sft.train.distributed import World
from varlen_sft.train.mock import Drawn, MockTokens, held_steps
from varlen_sft.train.run import run
from varlen_sft.train.setup import open_stream, prepare_sets

ALIKE = ("cu_seqlens", "position_ids", "token_weights", "rows", "weight_sum", "target_roles")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, rows, and the prepared set of ``small_run``."""
    folder = tmp_path_factory.mktemp("mock")
    config = small_run(folder, "--valid", "[]")
    return folder, prepare_sets(config, folder / "llama")


def train(config: TrainConfig) -> tuple[str, str]:
    """(how it ended, what was said)."""
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    with console.file:
        ended = run(config, console, lambda: nullcontext(lambda *a: None))
    return ended, console.export_text()


def steps_of(log: Path) -> list[dict]:
    lines = map(json.loads, log.read_text().splitlines())
    return [line for line in lines if line["event"] == "step"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("isolate", ["true", "false"])
def test_each_step_has_the_shapes_of_the_runs_own_and_other_tokens(place, isolate):
    folder, sets = place
    config = small_run(folder, "--mock-data", "--isolate", isolate)
    own = islice(open_stream(config, sets, folder / "llama"), 5)
    made = held_steps(config, sets, folder / "llama", 5, World()).steps
    assert len(made) == 5
    for real, other in zip(own, made, strict=True):
        assert real.counts == other.counts
        for one, two in zip(real.batches, other.batches, strict=True):
            for name in ALIKE:
                assert torch.equal(getattr(one, name), getattr(two, name)), name
            assert torch.equal(one.labels >= 0, two.labels >= 0)
            assert not one.weight_sum or not torch.equal(one.input_ids, two.input_ids)
            inner = (two.labels[:-1] >= 0) & (two.position_ids[1:] > 0)
            assert torch.equal(two.labels[:-1][inner], two.input_ids[1:][inner])


def test_tokens_are_drawn_from_the_whole_vocabulary_and_stay_the_same(place):
    source = Store(place[1][f"{place[0]}/chats.jsonl"])
    made = MockTokens(source, 7)
    ids = np.concatenate([made.sample(i).input_ids for i in range(40)])
    assert sorted(set(ids.tolist())) == list(range(7)) and ids.dtype == np.int32
    again = np.concatenate([made.sample(i).input_ids for i in range(40)])
    assert np.array_equal(ids, again)
    assert made.supervised.tolist() == source.supervised.tolist()


def test_drawn_lengths_are_log_normal_and_fit():
    made = Drawn(10_000_000, 4096, seed=3)
    rows = made.lengths - 1
    assert rows.min() == 10 and rows.max() == 4096
    assert rows[:-1].sum(dtype=np.int64) < 10_000_000 <= rows.sum(dtype=np.int64)
    inner = np.log(rows[(rows > 8) & (rows < 4096)])
    # A share of 0.01 is cut off on the long side, which moves the median and spread by less.
    assert abs(np.exp(np.median(inner)) - 400) < 12 and abs(inner.std() - 1) < 0.05
    assert np.array_equal(made.lengths, Drawn(10_000_000, 4096, seed=3).lengths)
    assert not np.array_equal(made.lengths[:9], Drawn(10_000_000, 4096, seed=4).lengths[:9])
    sample = made.sample(5)
    half = len(sample) // 2
    assert len(sample) == made.lengths[5] and made.supervised[5] == half
    assert sample.token_weights.tolist() == [0] * (len(sample) - half) + [1] * half
    assert sample.roles[-1] == ROLES.index("assistant") and sample.roles[0] == ROLES.index("user")
    assert set(Drawn(100, 4, seed=0).lengths.tolist()) == {5}
    assert Drawn(10_000_000, 64, seed=3).lengths.min() == 9


def test_steps_are_held_and_come_again(place, monkeypatch):
    folder, sets = place
    monkeypatch.setattr(mock, "HELD_TOKENS", 2 * 4 * 128)
    config = small_run(folder, "--mock-data", "--threads", "2")
    prepared = Path(sets[f"{folder}/chats.jsonl"])
    held = held_steps(config, sets, folder / "llama", 5, World())
    assert not any("prefetch" in thread.name for thread in threading.enumerate())
    before = contents(prepared)
    for suffix in before:
        Path(f"{prepared}{suffix}").rename(folder / f"away{suffix}")
    first: list[Step] = list(islice(held, 5))
    for suffix in before:
        (folder / f"away{suffix}").rename(f"{prepared}{suffix}")
    assert [step is first[k % 2] for k, step in enumerate(first)] == [True] * 5
    assert first[0] is not first[1]


def test_ranks_share_the_held_steps(place):
    folder, sets = place
    config = small_run(folder, "--mock-data")

    def edges(world: World) -> list[list[list[int]]]:
        steps = held_steps(config, sets, folder / "llama", 3, world).steps
        return [[batch.cu_seqlens.tolist() for batch in step.batches] for step in steps]

    alone = edges(World())
    halves = [edges(World(rank=rank, size=2)) for rank in range(2)]
    for whole, one, two in zip(alone, *halves, strict=True):
        assert len(one) == len(two) == 2 and sorted(whole) == sorted([*one, *two])


def test_a_mock_run_leaves_its_log_alone_and_says_it_has_nothing_to_compare(tmp_path):
    config = small_run(tmp_path, "--mock-data", "--steps", "4", "--valid_every", "2")
    before = files(tmp_path)
    ended, said = train(config)
    assert ended == "finished"
    assert {path for path in files(tmp_path) if path not in before} == {"out/mock.jsonl"}
    steps = steps_of(tmp_path / "out" / "mock.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    # Twice a pack of about 100 log-normal lengths of 400, cut to 128: full, half of it supervised.
    assert all(0.9 < step["fill"] <= 1 for step in steps)
    assert "log-normal lengths (median 400 tokens), since nothing is prepared of" in said
    assert "log.jsonl has no run to compare it with" in said and "validation" not in said


def test_after_a_run_both_speeds_are_told_and_nothing_of_it_is_touched(tmp_path):
    ended, _ = train(small_run(tmp_path, "--steps", "8"))
    assert ended == "finished"
    before = files(tmp_path)
    ended, said = train(small_run(tmp_path, "--steps", "8", "--mock-data", "--threads", "1"))
    assert ended == "finished"
    after = files(tmp_path)
    assert after.pop("out/mock.jsonl") and after == before
    assert "lengths and weights of the prepared data" in said
    real, made = (steps_of(tmp_path / "out" / f"{name}.jsonl") for name in ("log", "mock"))
    for name in ("real_tokens", "supervised_tokens", "squares", "sequences"):
        assert [step[name] for step in real] == [step[name] for step in made]
    speeds = []
    for steps in (made[2:], real[2:]):
        speeds.append(sum(s["real_tokens"] for s in steps) / sum(s["step_time_s"] for s in steps))
    assert f"mock data {speeds[0]:,.0f} real tokens/s, the run's own data {speeds[1]:,.0f}" in said
    train(small_run(tmp_path, "--steps", "3", "--mock-data"))
    assert len(steps_of(tmp_path / "out" / "mock.jsonl")) == 3  # of this mock run alone


def test_no_data_are_needed(tmp_path):
    small_run(tmp_path)
    model = ["--name", f"{tmp_path}/llama", "--out", f"{tmp_path}/out", "--dtype", "fp32"]
    sizes = ["--max_tokens", "128", "--packs_per_step", "2"]
    ended, said = train(parse_config("", [*model, *sizes, "--mock_data"]))
    assert ended == "finished" and "since nothing is prepared;" in said
    assert len(steps_of(tmp_path / "out" / "mock.jsonl")) == mock.MOCK_STEPS
    with pytest.raises(InputError, match=r"data.train or stages must be given"):
        parse_config("", [*model, "--mock_data", "false"])
    with pytest.raises(InputError, match="no such file"):
        train(parse_config("", [*model, "--mock-data", "--train", "nothing.jsonl"]))


def test_stages_are_held_as_they_come(place):
    folder, sets = place
    text = f"""
model: {{name: '{folder}/llama'}}
stream: {{max_tokens: 128, packs_per_step: 2}}
run: {{out: '{folder}/out', steps: 4}}
data: {{mock: true}}
stages:
- {{name: a, start_training_step: 1, train: '{folder}/chats.jsonl'}}
- {{name: b, start_training_step: 3, train: '{folder}/unknown.jsonl'}}
"""
    made = held_steps(parse_config(text), sets, folder / "llama", 4, World()).steps
    longest = [max(batch.max_seqlen for batch in step.batches) for step in made]
    assert longest[0] < 100 and longest[1] < 100 and longest[2:] == [128, 128]
