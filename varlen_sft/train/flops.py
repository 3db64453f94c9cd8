"""The work of a step, for TFLOP/s and MFU: what has to be computed, and what a naive count says.

``data.costs`` has the formulas of layers, attention and head. A step for a loss needs less: of the
last layer keys and values of every row, and all else of the S supervised rows alone, whose queries
see fewer pairs than all queries do. What an implementation computes beyond that, or again, is not
counted, so that only speed raises the figure. Matrices without a gradient of their own cost two
passes instead of three, and layers below all that is trained cost one.

The naive count takes every row of a full pack for a real one, with the whole square of it:
packing short conversations then seems to raise TFLOP/s, which is the count's doing.

Source of peaks: NVIDIA's data sheets and architecture papers, dense bf16 with sums in fp32; of MFU:
Chowdhery et al. 2022 (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from varlen_sft.data.costs import BACKWARD, ModelSizes
from varlen_sft.errors import InputError
from varlen_sft.train.parallel import blocks

if TYPE_CHECKING:
    from pathlib import Path

    from varlen_sft.train.config import TrainConfig
    from varlen_sft.train.distributed import World

__all__ = ["Rates", "StepWork", "Trained", "naive_flops", "peak_tflops", "step_flops", "work_of"]

_PEAKS = {
    r"A[18]00-(SXM4|PCIE)-[48]0GB|A[18]00 80GB PCIe": 312.0,
    r"A30": 165.0,
    r"A40": 149.7,
    r"A10": 125.0,
    r"L4": 121.0,
    r"L40": 181.0,
    r"L40S": 362.0,
    r"H20": 148.0,
    r"H[18]00 PCIe": 756.0,
    r"H[12]00 NVL": 835.0,
    r"H[18]00 80GB HBM3|H200|GH200 .*": 989.0,
    r"B200": 2250.0,
    r"GB200": 2500.0,
    r"RTX A6000": 154.8,
    r"RTX 6000 Ada Generation": 364.2,
    r"GeForce RTX 3090": 71.0,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 5090": 209.5,
}
"""TFLOP/s of a device by its name as CUDA tells it, without NVIDIA's. A part of one (MIG), laptops'
and other variants match nothing."""


@dataclass(frozen=True)
class Trained:
    """Which gradients a step makes, as shares of the model."""

    weights: float = 1.0  # of the layers' matrices, those with a gradient of their own
    reached: float = 1.0  # of the layers, those that a gradient runs through
    head: bool = True  # the head's matrix has a gradient of its own

    @classmethod
    def of(cls, model: nn.Module) -> Trained:
        """From what requires a gradient, with LoRA's matrices beside those that they change.

        Raises:
            ValueError: the model has no list of layers.
        """
        layers = list(blocks(model))
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = {n: p for n, p in model.named_parameters() if id(p) not in inside}
        matrices = [p for layer in layers for p in layer.parameters() if p.ndim > 1]
        trained = sum(p.numel() for p in matrices if p.requires_grad)
        embedding = any(p.requires_grad for n, p in outside.items() if "embed" in n)
        first = 0 if embedding else _first_trained(layers)
        # A tied head has no name of its own: it is the embedding.
        heads = {n for n in outside if "lm_head" in n} or {n for n in outside if "embed" in n}
        return cls(
            weights=trained / sum(p.numel() for p in matrices),
            reached=1 - first / len(layers),
            head=any(outside[n].requires_grad for n in heads),
        )


def step_flops(
    sizes: Any,
    tokens: int,
    squares: int,
    supervised: int,
    *,
    pairs: int | None = None,
    trained: Trained | None = None,
) -> int:
    """FLOPs that one step has to compute, forward and backward, of all ranks and micro-batches.

    Args:
        sizes: anything with the names of ``ModelSizes``, such as a ``LlamaConfig``.
        tokens: T, rows of the packs, without pads.
        squares: sum over the sequences of l^2, of the same rows.
        supervised: S, rows with a label.
        pairs: sum over the supervised rows of the keys that each one sees, its position + 1. None:
            as if supervised rows lay evenly, (squares + T) / 2 * S / T.
        trained: which gradients are made; all if None.
    """
    of, made = ModelSizes.of(sizes), trained or Trained()
    if pairs is None:
        pairs = round((squares + tokens) / 2 * supervised / tokens) if tokens else 0
    hidden, kv_width = of.hidden_size, of.num_kv_heads * of.head_dim
    by_row = of.per_token // of.num_layers  # FLOPs of the matrices of a layer
    keys = 4 * hidden * kv_width
    matrices = (of.num_layers - 1) * by_row * tokens + keys * tokens + (by_row - keys) * supervised
    by_pair = 2 * of.per_square // of.num_layers
    attention = (of.num_layers - 1) * by_pair * (squares + tokens) // 2 + by_pair * pairs
    head = 2 * hidden * of.vocab_size * supervised
    passed = matrices * (1 + made.reached + made.weights) + attention * (1 + 2 * made.reached)
    return round(passed + head * (1 + (made.reached > 0) + made.head))


def naive_flops(sizes: Any, packs: int, max_tokens: int) -> int:
    """FLOPs of one step as they are often counted: every pack full, its square whole, all rows.

    Args:
        sizes: see ``step_flops``.
        packs: of the step, on all ranks.
        max_tokens: rows that each can hold.
    """
    of, tokens = ModelSizes.of(sizes), packs * max_tokens
    attention = 2 * of.per_square * max_tokens * tokens  # 4HD for each pair, of T^2 pairs
    head = 2 * of.hidden_size * of.vocab_size * tokens
    return BACKWARD * (of.per_token * tokens + attention + head)


def peak_tflops(device: str) -> float | None:
    """Dense bf16 TFLOP/s of one device by its data sheet; None where it is not known.

    Args:
        device: its name, as of ``torch.cuda.get_device_name``.
    """
    name = device.removeprefix("NVIDIA ").strip()
    if "MIG" in name.split():
        return None
    found = [peak for pattern, peak in _PEAKS.items() if re.fullmatch(pattern, name)]
    return found[0] if found else None


class Rates(NamedTuple):
    """Of all ranks together; None where something is not known."""

    tflops: float | None = None
    naive_tflops: float | None = None
    mfu: float | None = None  # share of the peak that tflops is


@dataclass(frozen=True)
class StepWork:
    """What the steps of a run compute, and what its devices could."""

    sizes: ModelSizes
    max_tokens: int  # of a pack
    trained: Trained = Trained()
    peak: float | None = None  # TFLOP/s of all ranks together

    def rates(
        self, seconds: float, *, tokens: int, squares: int, supervised: int, pairs: int, packs: int
    ) -> Rates:
        """Of a step that took so long; its numbers are those of ``step_flops``, of all ranks."""
        needed = step_flops(
            self.sizes, tokens, squares, supervised, pairs=pairs, trained=self.trained
        )
        tflops = needed / seconds / 1e12
        naive = naive_flops(self.sizes, packs, self.max_tokens) / seconds / 1e12
        return Rates(tflops, naive, None if self.peak is None else tflops / self.peak)


def work_of(config: TrainConfig, folder: Path, model: nn.Module, here: World) -> StepWork | None:
    """Of a run; None for a model whose layers hold other matrices, or windows.

    Args:
        config: ``log.peak_tflops`` is taken before any table.
        folder: of the model, with its config.json.
        model: with what is frozen frozen.
    """
    try:
        sizes = ModelSizes.from_folder(folder)
    except InputError:
        return None
    peak = config.log.peak_tflops
    if peak is None and here.device.type == "cuda" and config.model.dtype == "bf16":
        peak = peak_tflops(torch.cuda.get_device_name(here.device))
    return StepWork(
        sizes,
        config.stream.max_tokens,
        Trained.of(model),
        None if peak is None else peak * here.size,
    )


def _first_trained(layers: Iterable[nn.Module]) -> int:
    """Layers below the first that is trained; all of them if none is."""
    count = 0
    for layer in layers:
        if any(p.requires_grad for p in layer.parameters()):
            break
        count += 1
    return count
