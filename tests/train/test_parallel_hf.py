"""Patched Hugging Face models, whole and with LoRA, train the same on one rank and on two."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests.train.ranks import on_ranks
from tests.train.runs import EPS, stream
from varlen_sft.train.distributed import world
from varlen_sft.train.loop import Loop
from varlen_sft.train.optimizer import MasterAdamW
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.parallel import Parallel, blocks, evaluate_steps, shard
from varlen_sft.train.setup_model import PatchedForSFT

pytest.importorskip("peft")


def train(strategy: str, accumulate: int, lora: bool, compiled: bool = False) -> dict[str, Any]:
    """Losses and norms of four steps in fp64, the last layer pruned."""
    import varlen_sft
    from tests.integrations.families import tiny_hf

    with world(timeout_s=30) as here:
        torch.manual_seed(0)
        model = tiny_hf("llama3", torch.float64)
        model = with_lora(model) if lora else model
        varlen_sft.patch(model, prune_last_layer=True)
        module = PatchedForSFT(model)
        for block in blocks(module) if compiled else ():
            block.forward = torch.compile(block.forward, backend="eager", dynamic=True)
        if strategy == "fsdp":
            shard(module, here)
        optimizer = MasterAdamW(module, eps=EPS)
        parallel, data = Parallel(module, here, strategy), stream(here, accumulate)
        loop = Loop(parallel, optimizer, TrainOptions(max_steps=4, lr=1e-2), capacity=128)
        records: list[Any] = []
        loop.run(data, on_step=records.append)
        return {
            "numbers": [number for r in records for number in (r.loss, r.grad_norm)],
            "valid": evaluate_steps(parallel, [data.step(0)]),
            "trained": optimizer.names,
        }


def with_lora(model: Any) -> Any:
    import peft

    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that PEFT asks transformers for
        return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)


@pytest.mark.filterwarnings("default")  # of the compiler
@pytest.mark.parametrize(
    ("strategy", "lora", "compiled"),
    [("ddp", False, False), ("fsdp", False, False), ("fsdp", True, False), ("fsdp", True, True)],
)
def test_two_ranks_are_one(strategy, lora, compiled):
    one = train("ddp", 4, lora)
    assert len(one["numbers"]) == 8
    assert all(("lora" in name) == lora for name in one["trained"])
    for other in on_ranks(2, train, strategy, 2, lora, compiled):
        assert other["numbers"] == pytest.approx(one["numbers"], rel=1e-10)
        assert other["valid"] == pytest.approx(one["valid"], rel=1e-10)
        assert other["trained"] == one["trained"]
