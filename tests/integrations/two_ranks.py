"""What each of two processes does for test_trainer.py and test_recipes.py. Not a test itself.

python two_ranks.py OUT MODEL_FOLDER CHATS: steps of Trainer under DDP, a step of the Accelerate
recipe under FSDP2, and that recipe from chats to checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

from tests.integrations.families import tiny_hf
from tests.integrations.steps import ONE_STEP, ROOT, eight_samples, weights_of
from varlen_sft import Collator, patch
from varlen_sft.integrations import WeightedTrainerMixin, keep_exact

Result = dict[str, Any]


class WeightedTrainer(WeightedTrainerMixin, transformers.Trainer):
    pass


def ddp_step(out: str, kind: type[transformers.Trainer], *, fractional: bool) -> Result:
    """Two micro-batches of two samples on each rank."""
    model = tiny_hf("llama3", attention="sdpa")
    patch(model)
    before = weights_of(model)
    trainer = kind(
        model,
        transformers.TrainingArguments(
            out, per_device_train_batch_size=2, gradient_accumulation_steps=2, **ONE_STEP
        ),
        train_dataset=eight_samples(fractional=fractional),
        data_collator=Collator(pad_multiple=8),
    )
    trainer.train()
    kind_of_model = type(trainer.model_wrapped).__name__
    loss, steps = trainer.state.log_history[0]["loss"], trainer.state.global_step
    after = weights_of(model)
    return {"before": before, "after": after, "loss": loss, "steps": steps, "model": kind_of_model}


def trl_step(out: str) -> Result:
    """One micro-batch of four samples on each rank: TRL logs means of micro-batches' means."""
    from tests.integrations.trl_runs import sft_trainer
    from varlen_sft.integrations.trl import SFTTrainer

    SFTTrainer._send_telemetry = lambda self: None
    model = tiny_hf("llama3", attention="sdpa")
    patch(model)
    before = weights_of(model)
    trainer = sft_trainer(SFTTrainer, model, Path(out), Collator(), per_device_train_batch_size=4)
    trainer.train()
    return {"before": before, "after": weights_of(model), "log": trainer.state.log_history[0]}


def pretend_that_accelerate_shards_on_cpus() -> None:
    """It does on accelerators alone, with the same code that works for a gloo group on CPUs."""
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


def fsdp2_step(train_step: Callable[..., float]) -> Result:
    """A step of the recipe over the same samples, two micro-batches of two on each rank."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    model = tiny_hf("llama3", attention="sdpa")
    patch(model)
    before = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    collator = Collator(fractional_weights=True)
    loader = DataLoader(eight_samples(fractional=True), batch_size=2, collate_fn=collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    kinds = {type(p).__name__ for p in model.parameters()}
    loss = train_step(accelerator, model, optimizer, list(loader))
    after = {name: p.full_tensor() for name, p in weights_of(model).items()}
    return {"before": before, "after": after, "loss": loss, "kinds": kinds}


def fsdp2_mixed(train_step: Callable[..., float]) -> tuple[str, Result]:
    """bf16 by Accelerate's own policy: what is said of it, and the loss after ``keep_exact``."""
    made: list[Any] = []
    for exact in (False, True):
        pretend_that_accelerate_shards_on_cpus()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
        accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
        model = tiny_hf("llama3", torch.float32, attention="sdpa")
        patch(model)
        if exact:
            keep_exact(accelerator)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        collator = Collator(fractional_weights=True)
        loader = DataLoader(eight_samples(fractional=True), batch_size=2, collate_fn=collator)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        packs = list(loader)
        try:
            dtype = model(**packs[0], num_items_in_batch=torch.tensor(9.0)).loss.dtype
            loss = train_step(accelerator, model, optimizer, packs)
        except TypeError as error:
            made.append(str(error))
            continue
        kinds = {type(p).__name__ for p in model.parameters()}
        made.append({"loss": loss, "dtype": dtype, "kinds": kinds})
    return made[0], made[1]


def main(out: Path, folder: str, chats: str) -> None:
    sys.path.append(str(ROOT / "examples"))
    import accelerate_fsdp2

    results: Result = {
        "Trainer": ddp_step(str(out), transformers.Trainer, fractional=False),
        "WeightedTrainer": ddp_step(str(out), WeightedTrainer, fractional=True),
        "SFTTrainer": trl_step(str(out)),
    }
    pretend_that_accelerate_shards_on_cpus()
    results["fsdp2"] = fsdp2_step(accelerate_fsdp2.train_step)
    results["fsdp2 mixed"] = fsdp2_mixed(accelerate_fsdp2.train_step)
    for dtype in (torch.float32, torch.bfloat16):
        pretend_that_accelerate_shards_on_cpus()
        results[dtype] = accelerate_fsdp2.main(
            folder, chats, str(out / str(dtype)), batch_size=2, lr=0.01, epochs=2, dtype=dtype
        )
    if torch.distributed.get_rank() == 0:
        torch.save(results, out / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
