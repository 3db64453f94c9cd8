"""States that tests save, and what a folder of checkpoints holds."""

from __future__ import annotations

import torch

from tests.helpers import random_samples, tiny_hf_config, tiny_model
from tests.train.runs import stream
from varlen_sft.data.batch import collate
from varlen_sft.train.checkpoint import Checkpointer, ModelState, RandomState, RunIds
from varlen_sft.train.distributed import World
from varlen_sft.train.optimizer import MasterAdamW
from varlen_sft.train.state import TrainState


def made(seed: int = 0, dtype: torch.dtype = torch.bfloat16, updates: int = 1, **config):
    """Objects of a run, by name."""
    model = tiny_model(tiny_hf_config(tie_word_embeddings=True, **config), dtype, seed)
    optimizer = MasterAdamW(model)
    for _ in range(updates):
        model(collate(random_samples([9, 5, 7], seed=seed))).loss_sum.backward()
        optimizer.step(1e-2, 1.0)
    return {"model": ModelState(model), "optimizer": optimizer, "run": TrainState(step=updates),
            "random": RandomState(), "ids": RunIds(), "stream": stream(World(), 4)}  # fmt: skip


def tensors(state) -> dict[str, torch.Tensor]:
    found = dict(state["model"].state_dict())
    for kind, values in state["optimizer"].state_dict().items():
        found |= {f"{kind}": values} if isinstance(values, torch.Tensor) else {
            f"{kind} {name}": value for name, value in values.items()
        }  # fmt: skip
    return found


def saved(folder, state=None, *steps: int, **options):
    """Checkpoints of a state; the path of the last."""
    with Checkpointer(folder, **options) as checkpoints:
        for step in steps or (1,):
            checkpoints.save(state or made(), step)
    return folder / f"step-{(steps or (1,))[-1]:08}"


def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


class Tensors(dict):
    state_dict, load_state_dict = dict.copy, dict.update
