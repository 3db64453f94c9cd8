"""Every op on the CPU beside what people use instead, forward and backward.

A group's candidates are timed together, round by round; each test then hands the seconds of one
candidate to pytest-benchmark. Ours is checked against the reference before anything is timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from head_checks import head_errors, head_truth, peak_memory, refuse_worse
from op_groups import Goal, Group, installed, no_worse
from peers import HEADS, TORCH_OPTIONS, HeadInputs, HeadLoad, bare_products, head_step
from peers_ops import (
    HeadsLoad,
    attention_block_mask,
    attention_ours,
    attention_reference,
    attention_sdpa,
    check,
    find_sequences,
    position_ids,
    rope_hf,
    rope_ours,
    rope_reference,
)

from varlen_sft.tools.step_bench import DTYPES
from varlen_sft.types import LossOptions

ALL_ROWS = ("naive", "torch fused", "TRL")  # peers that score ignored rows, too
HEAD_PEERS = (*ALL_ROWS, "gathered", "gathered, chunked")
TOKENS = {"bf16": 4096, "fp32": 2048}


# ----------------------------------------------------------------- loss heads


def head_group(dtype: str, vocab: int, config: pytest.Config) -> Group:
    """Forward and backward of a SmolLM2-135M head, 40 % of the rows supervised."""
    load = HeadLoad(dtype, vocab, TOKENS[dtype])
    if config.getoption("--tiny"):
        load = HeadLoad(dtype, vocab // 64 + 1, 256, hidden=32)
    x = load.make()
    truth = head_truth(x)
    heads = {name: functools.partial(make, x) for name, make in HEADS.items()}
    made, missing = installed(heads)
    steps = {name: head_step(head, x) for name, head in made.items()}
    errors = {name: head_errors(step, x, truth) for name, step in steps.items()}
    refuse_worse(errors, DTYPES[dtype])
    best = fastest([name for name in steps if name.startswith("torch fused")], steps)
    shown = {name: best if name == "torch fused" else name for name in ("ours", *HEAD_PEERS)}
    shown = {name: of for name, of in shown.items() if of in steps}
    group = Group(
        f"Loss head {dtype}, V = {load.vocab}, C = {load.hidden}, T = {load.tokens}, "
        f"S = {len(x.scored)}",
        "bare GEMMs",
        {name: steps[of] for name, of in shown.items()} | {"bare GEMMs": bare_products(x)},
        missing={name: reason for name, reason in missing.items() if "fused" not in name},
        facts={name: dict(errors[of]) for name, of in shown.items()},
        note=f"{best}, of {len(TORCH_OPTIONS)} options: the fastest here.",
    )
    group.measure(config.getoption("--rounds"))
    for name, of in list(shown.items())[: 1 if config.getoption("--tiny") else None]:
        extra = peak_memory(of, load, torch.get_num_threads()) / 1e6
        group.facts[name]["extra peak MB"] = round(extra)
    group.goals = head_goals(group, load, x)
    return group


def fastest(names: list[str], steps: dict[str, Callable]) -> str:
    """By one run of each, after the one that its errors took."""
    seconds = {}
    for name in names:
        start = time.perf_counter()
        steps[name]()
        seconds[name] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__, default="torch fused is not in this torch")


def head_goals(group: Group, load: HeadLoad, x: HeadInputs) -> list[Goal]:
    big = load.vocab > 100_000
    limit = 1.08 if load.dtype == "fp32" else 1.12 if big else 1.25
    ours = group.facts["ours"]
    keys = [key for key in ours if "error" in key]
    errors = {name: {key: facts[key] for key in keys} for name, facts in group.facts.items()}
    peers = [name for name in HEAD_PEERS if name in group.steps]
    # A weight gradient is made in fp32 and given in its own dtype; the rest is logits.
    gradient = x.weight.numel() * (4 + x.weight.element_size())
    budget = (LossOptions().chunk_bytes + gradient + 2 * x.hidden.nbytes) / 1e6
    goals = [Goal("ours over the three bare GEMMs", group.ratio("ours", "bare GEMMs"), limit)]
    if load.dtype == "bf16" and not big:
        speed = group.ratio("gathered", "ours")
        goals.append(Goal("faster than plain gathered rows", speed, 1.4, at_least=True))
    slowest = min(group.ratio(name, "ours") for name in ALL_ROWS if name in group.steps)
    return [
        *goals,
        Goal("faster than every peer that scores all rows", slowest, 2.0, at_least=True),
        Goal("extra MB, against logits budget and weight gradient", ours["extra peak MB"], budget),
        Goal("our error over the best peer's, worst of three", no_worse(errors, peers), 1.0),
    ]


# ------------------------------------------------------------------ other ops


def rope_group(dtype: str, config: pytest.Config) -> Group:
    x = HeadsLoad(dtype, 256 if config.getoption("--tiny") else 4096).make()
    ours = rope_ours(x)
    error = check(ours, rope_reference(x), rope_reference(x, torch.float64), DTYPES[dtype])
    steps, missing = installed({"HF eager": lambda: rope_hf(x)})
    group = Group(
        f"RoPE {dtype}, T = {len(x.q)}, H = 9, K = 3, D = 64", "ours",
        {"ours": ours, "ours, hf rounding": rope_ours(x, "hf"), **steps,
         "torch ops": rope_reference(x)},
        missing, facts={"ours": {"error": error}},
    )  # fmt: skip
    group.measure(4 * config.getoption("--rounds"))
    if "HF eager" in steps:
        ratio = group.ratio("HF eager", "ours")
        group.goals = [Goal("faster than HF eager", ratio, 4.0, at_least=True)]
    return group


def attention_group(dtype: str, config: pytest.Config) -> Group:
    x = HeadsLoad(dtype, 256 if config.getoption("--tiny") else 4096).make()
    ours, high = attention_ours(x), attention_reference(x, torch.float64)
    error = check(ours, attention_reference(x), high, DTYPES[dtype])
    group = Group(
        f"Attention {dtype}, {len(x.lengths)} sequences of {min(x.lengths)} to {max(x.lengths)}, "
        f"T = {len(x.q)}, H = 9, K = 3, D = 64",
        "ours",
        {"ours": ours, "SDPA per sequence": attention_sdpa(x),
         "SDPA, T x T mask": attention_block_mask(x)},
        facts={"ours": {"error": error}},
    )  # fmt: skip
    group.measure(config.getoption("--rounds"))
    if dtype == "bf16":
        ratio = group.ratio("SDPA per sequence", "ours")
        group.goals = [Goal("faster than SDPA per sequence", ratio, 2.0, at_least=True)]
    return group


def sequences_group(config: pytest.Config) -> Group:
    ids = position_ids(5_000 if config.getoption("--tiny") else 1_000_000)
    capacity = len(ids) // 100
    steps = {
        "ours": find_sequences(ids),
        "torch ops": find_sequences(ids, "reference"),
        "ours, capacity": find_sequences(ids, capacity=capacity),
        "torch ops, capacity": find_sequences(ids, "reference", capacity),
    }
    for end in ("", ", capacity"):
        found, truth = (steps[f"{who}{end}"]() for who in ("ours", "torch ops"))
        assert torch.equal(found.cu_seqlens, truth.cu_seqlens)
        assert found.max_seqlen == truth.max_seqlen and found.num_sequences == truth.num_sequences
    group = Group(f"Sequences from position ids, T = {len(ids)}", "ours", steps)
    group.measure(4 * config.getoption("--rounds"))
    ratios = [group.ratio(f"torch ops{end}", f"ours{end}") for end in ("", ", capacity")]
    text = "faster than torch ops, with and without a capacity"
    group.goals = [Goal(text, min(ratios), 5.0, at_least=True)]
    return group


# ---------------------------------------------------------------------- tests

HEAD_NAMES = ("ours", *HEAD_PEERS, "bare GEMMs")
ROPE_NAMES = ("ours", "ours, hf rounding", "HF eager", "torch ops")
ATTENTION_NAMES = ("ours", "SDPA per sequence", "SDPA, T x T mask")
SEQUENCES_NAMES = ("ours", "torch ops", "ours, capacity", "torch ops, capacity")
MAKERS: dict[str, tuple[Callable[[pytest.Config], Group], tuple[str, ...]]] = {
    **{
        f"head {dtype} {vocab}": (functools.partial(head_group, dtype, vocab), HEAD_NAMES)
        for dtype in ("bf16", "fp32")
        for vocab in (49_152, 128_256)
    },
    **{f"rope {d}": (functools.partial(rope_group, d), ROPE_NAMES) for d in ("bf16", "fp32")},
    **{
        f"attention {d}": (functools.partial(attention_group, d), ATTENTION_NAMES)
        for d in ("bf16", "fp32")
    },
    "sequences": (sequences_group, SEQUENCES_NAMES),
}


class Replay:
    """A clock that advances by seconds that were measured before."""

    now = 0.0

    def interleaved_rounds(self) -> float:
        return self.now

    def feed(self, benchmark, seconds: list[float]) -> None:
        left: Iterator[float] = iter(seconds)
        benchmark.pedantic(lambda: self._advance(next(left)), rounds=len(seconds))

    def _advance(self, seconds: float) -> None:
        self.now += seconds


REPLAY = Replay()


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, groups: list[Group]) -> Callable[[str], Group]:
    """A group by name, measured when its first candidate is asked for; only figures are kept."""

    done: dict[str, Group | Exception] = {}

    def measure(name: str) -> Group:
        if name not in done:
            try:
                done[name] = MAKERS[name][0](request.config)
            except Exception as error:  # or each candidate would make the group fail anew
                done[name] = error
                raise
            done[name].steps = {}
            groups.append(done[name])
        if isinstance(done[name], Exception):
            pytest.skip(f"the group failed: {done[name]}")
        return done[name]

    return measure


@pytest.mark.parametrize(
    ("name", "candidate"), [(name, c) for name, (_, names) in MAKERS.items() for c in names]
)
@pytest.mark.benchmark(timer=REPLAY.interleaved_rounds)
def test_op(name: str, candidate: str, measured: Callable[[str], Group], benchmark) -> None:
    group = measured(name)
    if candidate not in group.seconds:
        pytest.skip(group.missing.get(candidate, group.note))
    benchmark.group = group.name
    benchmark.extra_info |= {"candidate": candidate, **group.row(candidate)}
    REPLAY.feed(benchmark, group.seconds[candidate])
