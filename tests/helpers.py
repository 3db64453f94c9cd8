"""What tests share: derived tolerances, tiny Llamas, packs of random samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varlen_sft.data.batch import PackedBatch, collate
from varlen_sft.data.sample import Sample
from varlen_sft.models.config import LlamaConfig
from varlen_sft.models.llama import LlamaForSFT

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

ROPE_PARAMETERS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        "factor": 2.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
"""One of each HF type for head_dim 16 and 32 positions: sequences above 16 or 32 are long."""


def assert_within_reference_error(actual: Tensor, low: Tensor, high: Tensor) -> None:
    """Relative L2 error against fp64 at most twice that of same-dtype eager, plus one rounding.

    Args:
        actual: what is tested.
        low: the reference computed in the same dtype.
        high: the reference computed in fp64.

    For fp64 itself low and high are one, and how a draw amplifies their rounding (p - 1 for p near
    1, say) is not seen: there the package's promise of 1e-10 is the bound.
    """
    assert actual.shape == high.shape
    assert torch.isfinite(actual).all()
    norm = high.double().norm().clamp(min=1e-30)
    error = (actual.double() - high.double()).norm() / norm
    if actual.dtype == torch.float64:
        allowed = torch.tensor(1e-10)
    else:
        low_error = (low.double() - high.double()).norm() / norm
        allowed = 2 * low_error + torch.finfo(actual.dtype).eps
    assert error <= allowed, f"relative error {error:.3e} > {allowed:.3e}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error of a tensor; 0 if both are zero."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def tiny_hf_config(rope: str = "default", **changes) -> dict:
    """config.json of a Llama small enough for fp64 in milliseconds, with GQA."""
    return {
        "model_type": "llama",
        "vocab_size": 53,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": dict(ROPE_PARAMETERS[rope]),
        **changes,
    }


def tiny_model(config: dict, dtype: torch.dtype = torch.float64, seed: int = 0) -> LlamaForSFT:
    """Random weights, large enough that attention and norms matter."""
    model = LlamaForSFT(LlamaConfig.from_hf(config)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * 0.3 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def random_samples(
    lengths: Sequence[int], vocab_size: int = 53, seed: int = 0, fractional: bool = True
) -> list[Sample]:
    """Samples whose weights are 0, 1 or, with ``fractional``, something between."""
    rng = np.random.default_rng(seed)
    choices = [0.0, 1.0, 0.25] if fractional else [0.0, 1.0]
    return [
        Sample(
            rng.integers(0, vocab_size, length, dtype=np.int32),
            rng.choice(choices, length).astype(np.float32),
            np.zeros(length, dtype=np.uint8),
        )
        for length in lengths
    ]


def loss_and_gradients(model: LlamaForSFT, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """loss_sum, unnormalised, and the gradient of every parameter."""
    model.zero_grad()
    loss = model(batch).loss_sum
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def alone(model: LlamaForSFT, samples: Sequence[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums of loss and gradients over samples, each run in a pack of its own."""
    total, gradients = torch.zeros(()), {}
    for sample in samples:
        loss, grads = loss_and_gradients(model, collate([sample]))
        total = total + loss
        gradients = {name: gradients.get(name, 0) + grad for name, grad in grads.items()}
    return total, gradients


def counting_backend() -> tuple[list[Any], Callable[..., Any]]:
    """The graphs that torch.compile has made so far, and a backend that runs them eagerly."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return graphs, backend
