"""Whom the whole-step GPU benchmark compares: one training step each, of the same random weights.

All but the floor share the parameters of two models, one in Hugging Face's matrices and one in
ours: eight copies would leave the padded ones no room. No step reads its loss, so that the host
runs ahead of the device as it does in training. T rows, S supervised rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch as swapped

import torch
from dropin_candidates import features, pad
from gpu_step_models import sharing
from torch import Tensor

import varlen_sft
from varlen_sft.data.batch import PackedBatch
from varlen_sft.data.sample import Sample
from varlen_sft.models.config import LlamaConfig
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.reference import position_ids_from_lengths
from varlen_sft.tools.step_candidates import step_products
from varlen_sft.types import IGNORE_INDEX


class HF:
    """A model that takes batches as transformers does; their losses add up to the step's mean.

    Gradients are dropped at the end, as all others need the room.
    """

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Any]]) -> None:
        self.model = model
        self.batches = [_on_device(batch, model.device) for batch in batches]
        self.count = sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in batches)
        self.tokens = sum(batch["input_ids"].numel() for batch in batches)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        return self.model(**batch, num_items_in_batch=self.count).loss

    def __call__(self) -> Tensor:
        """The loss, () on the device."""
        self.model.zero_grad(set_to_none=True)  # a step that ran out of memory left some
        losses = []
        for batch in self.batches:
            loss = self.loss(batch)
            loss.backward()
            losses.append(loss.detach())
        self.model.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    @torch.no_grad()
    def loss_only(self) -> float:
        return sum(float(self.loss(batch)) for batch in self.batches)


def _on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    # Nothing is decoded; with a cache HF would not look for edges in position ids.
    return moved | {"use_cache": False}


def hf_padded(model: Any, samples: Sequence[Sample], micro_batch: int = 4) -> HF:
    return HF(model, _padded(samples, micro_batch))


def _padded(samples: Sequence[Sample], micro_batch: int) -> list[dict[str, Tensor]]:
    """Micro-batches in the order drawn, each padded to its longest."""
    rows = features(samples)
    return [pad(rows[s : s + micro_batch]) for s in range(0, len(rows), micro_batch)]


def hf_packed(model: Any, samples: Sequence[Sample]) -> HF:
    """All samples in one row with position ids: no padding, a T x T mask."""
    rows = features(samples)
    batch = {
        key: torch.tensor([token for row in rows for token in row[key]])[None]
        for key in ("input_ids", "labels")
    }
    positions = position_ids_from_lengths(len(sample) for sample in samples)
    return HF(model, [batch | {"position_ids": positions[None]}])


def patched(model: Any, samples: Sequence[Sample]) -> HF:
    """One line and our collator."""
    model = sharing(model)
    varlen_sft.patch(model)
    return HF(model, [varlen_sft.Collator()(samples)])


class Liger(HF):
    """Padded, with Liger's kernels. What it puts into transformers' module is there while this one
    runs: the others call by the same names."""

    def __init__(self, model: Any, samples: Sequence[Sample], micro_batch: int = 4) -> None:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        from transformers.models.llama import modeling_llama

        super().__init__(sharing(model), _padded(samples, micro_batch))
        self.module, before = modeling_llama, dict(vars(modeling_llama))
        try:
            apply_liger_kernel_to_llama(model=self.model)
        finally:
            after = dict(vars(modeling_llama))
            vars(modeling_llama).update(before)
        self.names = {name: after[name] for name in before if after[name] is not before[name]}

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        with swapped.multiple(self.module, **self.names):
            return super().loss(batch)


class Ours:
    """LlamaForSFT on one pack; compiled as ``model.compile`` of a training run does it."""

    def __init__(self, model: LlamaForSFT, batch: PackedBatch, *, compiled: bool = False) -> None:
        self.model, self.batch = sharing(model), batch.to(model.lm_head.weight.device)
        self.tokens = batch.real_tokens
        for block in self.model.layers if compiled else ():
            block.forward = torch.compile(block.forward, dynamic=True)

    def __call__(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        out = self.model(self.batch)
        loss = out.loss_sum / out.weight_sum
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()


class Floor:
    """Only the matrix products of our step, forward and backward, on random matrices.

    Matrices of one shape are one matrix: beside T rows it is of no account where they lie.
    """

    def __init__(self, config: LlamaConfig, batch: PackedBatch, like: Tensor) -> None:
        self.tokens = batch.real_tokens
        self.products = step_products(config, self.tokens, batch.supervised_tokens)
        self.flops = sum(3 * 2 * rows * n_in * n_out for rows, n_in, n_out in self.products)
        shapes = {(n_out, n_in) for _, n_in, n_out in self.products}
        shapes |= {(rows, n) for rows, n_in, n_out in self.products for n in (n_in, n_out)}
        self.of = {at: torch.randn(at, dtype=like.dtype, device=like.device) for at in shapes}

    def __call__(self) -> None:
        for rows, n_in, n_out in self.products:
            x, dy, weight = self.of[rows, n_in], self.of[rows, n_out], self.of[n_out, n_in]
            x @ weight.T
            dy @ weight
            dy.T @ x
