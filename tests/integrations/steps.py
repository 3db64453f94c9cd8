"""One optimiser step of a trainer against the samples run alone by HF itself, in fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import random_samples, relative_error
from varlen_sft import Sample

ROOT = Path(__file__).parents[2]

LENGTHS = (5, 34, 2, 17, 18, 41, 9, 3)  # the third and the last train nothing, see eight_samples

QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "dataloader_pin_memory": False,
    "num_train_epochs": 1,
}
"""Arguments of a trainer that leaves nothing behind."""

ONE_STEP: dict[str, Any] = QUIET | {
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
"""So that weights before minus weights after are the gradient."""


def eight_samples(*, fractional: bool) -> list[Sample]:
    """Samples of very unlike numbers of targets; two have none."""
    samples = random_samples(LENGTHS, seed=3, fractional=fractional)
    for index in (2, 7):
        samples[index].token_weights[:] = 0
    return samples


def alone(model: nn.Module, samples: Sequence[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted mean loss over all samples, each run by itself, and its gradients.

    From the logits of a model that is not patched: HF's own loss would be taken in fp32.
    """
    model.zero_grad()
    total = sum(float(sample.token_weights[1:].sum()) for sample in samples)
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids).long()
        logits = model(input_ids=ids[None]).logits[0, :-1]
        weights = torch.from_numpy(sample.token_weights[1:]).to(logits.dtype)
        loss = loss + (F.cross_entropy(logits, ids[1:], reduction="none") * weights).sum() / total
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_step(
    before: dict[str, Tensor], after: dict[str, Tensor], gradients: dict[str, Tensor]
) -> None:
    """Every parameter moved by its gradient, to 1e-6."""
    assert before.keys() == after.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(before[name] - after[name], gradient) < 1e-6, name


def run_ranks(script: Path, *arguments: str, timeout: int = 180) -> None:
    """Two processes of a script, joined by gloo; the errors of the first that fails."""
    address = ("127.0.0.1", str(_free_port()))
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=os.environ | _rank_variables(rank, *address),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


def _rank_variables(rank: int, address: str, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
