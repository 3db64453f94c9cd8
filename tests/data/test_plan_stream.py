"""A plan beside the stream that it foretells: the same prepared set, every step of an epoch run."""

from __future__ import annotations

import json
from dataclasses import astuple

import numpy as np
import pytest

from tests.data.sizes import TINY, TINY_HF
from varlen_sft import cli
from varlen_sft.data.costs import training_flops
from varlen_sft.data.plan import Plan, PlanOptions, Spread, make_plan
from varlen_sft.data.sample import Sample
from varlen_sft.data.store import Store
from varlen_sft.data.store_write import write_store
from varlen_sft.data.stream import OrderOptions, PackStream, StreamOptions

MAX_TOKENS = 64


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """300 samples of 1 to 64 rows, any of which may have a label, the first tokens too."""
    rng = np.random.default_rng(0)
    samples = []
    for rows in np.clip(rng.lognormal(2.5, 0.9, 300).astype(int), 1, MAX_TOKENS):
        weights = rng.choice([0, 0, 0.5, 1], rows + 1).astype(np.float32)
        weights[-1] = 1
        samples.append(
            Sample(np.arange(rows + 1, dtype=np.int32), weights, np.zeros(rows + 1, np.uint8))
        )
    prefix = tmp_path_factory.mktemp("set") / "chats"
    write_store(prefix, samples)
    return prefix


def run(prefix, options: PlanOptions, order: dict) -> dict[str, np.ndarray]:
    """What all ranks meet in the first epoch: (steps, A, R) tokens, labels, squares, sequences."""
    found = []
    for rank in range(options.ranks):
        place = StreamOptions(
            rank=rank, ranks=options.ranks, accumulate=options.accumulate, workers=0
        )
        stream = PackStream([Store(prefix)], OrderOptions(**order), place)
        steps = []
        for step in stream:
            cells = []
            for batch, ids in zip(step.batches, step.samples, strict=True):
                lengths = np.diff(batch.cu_seqlens.numpy()).astype(np.int64) * (len(ids) > 0)
                cells.append([lengths.sum(), batch.supervised_tokens, np.square(lengths).sum()])
            steps.append([len(step.packs), cells])
            if step.last:
                break
        found.append([cells for _, cells in steps])
        packs = [count for count, _ in steps]
    tokens, labels, squares = np.moveaxis(np.array(found), (0, -1), (3, 0))
    return {"packs": np.array(packs), "tokens": tokens, "labels": labels, "squares": squares}


def check(plan: Plan, met: dict[str, np.ndarray], sizes) -> None:
    steps, packs = len(met["packs"]), plan.options.step_packs
    assert (plan.steps, plan.packing.packs) == (steps, met["packs"].sum())
    assert plan.last_step_packs == met["packs"][-1]
    assert (plan.tokens, plan.supervised) == (met["tokens"].sum(), met["labels"].sum())
    assert plan.step_tokens == Spread.of(met["tokens"].sum(axis=(1, 2)))
    assert plan.step_supervised == Spread.of(met["labels"].sum(axis=(1, 2)))
    costs = met["tokens"] if sizes is None else sizes.a * met["tokens"] + met["squares"]
    costs = costs[met["packs"] == packs]
    uneven = costs.max(axis=-1) / costs.mean(axis=-1)
    assert astuple(plan.imbalance) == pytest.approx(astuple(Spread.of(uneven)), rel=1e-12)
    assert plan.waiting == pytest.approx(
        1 - costs.sum() / plan.options.ranks / costs.max(axis=-1).sum(), abs=1e-12
    )
    if sizes is not None:
        totals = (int(met[name].sum()) for name in ("tokens", "squares", "labels"))
        assert plan.flops == training_flops(sizes, *totals)


@pytest.mark.parametrize("sizes", [None, TINY])
@pytest.mark.parametrize("method", ["planned", "streaming", "next-fit", "none"])
@pytest.mark.parametrize(
    ("ranks", "accumulate", "packs", "balance"),
    [(1, 1, 1, "window"), (2, 2, 8, "window"), (3, 1, 3, "step"), (2, 3, 6, "none")],
)
def test_a_plan_is_what_the_stream_does(prefix, sizes, method, ranks, accumulate, packs, balance):
    order = {
        "max_tokens": MAX_TOKENS, "packs_per_step": packs, "method": method, "window": 5,
        "balance": balance, "balance_steps": 4, "seed": 3,
    }  # fmt: skip
    options = PlanOptions(ranks=ranks, accumulate=accumulate, **order)
    store = Store(prefix)
    plan = make_plan(store.lengths - 1, store.supervised, options, sizes)
    check(plan, run(prefix, options, order | {"cost_a": sizes and sizes.a}), sizes)


@pytest.mark.parametrize("method", ["planned", "streaming"])
def test_the_command_says_the_same(prefix, method, tmp_path, capsys):
    """With defaults of both sides, and a model's folder."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_HF))
    words = ["--max-tokens", "64", "--ranks", "2", "--accumulate", "2", "--packing", method]
    words += ["--model", str(tmp_path), "--json", str(tmp_path / "plan.json"), "--epochs", "2.5"]
    assert cli.main(["plan", str(prefix), *words]) == 0
    told = json.loads((tmp_path / "plan.json").read_text())
    options = PlanOptions(max_tokens=64, ranks=2, accumulate=2, method=method)
    order = {"max_tokens": 64, "packs_per_step": 4, "method": method, "cost_a": TINY.a}
    met = run(prefix, options, order)
    steps = len(met["packs"])
    assert (told["steps"], told["packing"]["packs"]) == (steps, met["packs"].sum())
    assert told["step_tokens"]["mean"] == met["tokens"].sum() / steps
    assert told["step_supervised"]["most"] == met["labels"].sum(axis=(1, 2)).max()
    assert told["steps_wanted"] == -(-5 * steps // 2)
    assert f"steps                {steps} per epoch" in capsys.readouterr().out
