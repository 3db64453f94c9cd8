"""Whom a step benchmark compares: one training step each, on the same samples, for the same loss.

A step is forward and backward from gradients set to None; the optimiser is left out, it is the same
for all. T real tokens, S supervised rows, C hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from varlen_sft.data.batch import collate
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.load import tokenize_file
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.models.config import LlamaConfig
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.reference import position_ids_from_lengths
from varlen_sft.types import IGNORE_INDEX

__all__ = ["CANDIDATES", "Candidate", "Floor", "HFPacked", "HFPadded", "Load", "Ours"]
__all__ += ["chat_like_lengths", "chat_like_samples", "load_hf", "step_products"]

SIGMA = 0.8
"""Spread of the log-lengths: at a median of 350, 95 % of conversations have 70 to 1,700 tokens."""
SHORTEST = 16
TURN_TOKENS = 150


def chat_like_lengths(tokens: int, seed: int, median: int = 350, cap: int = 2048) -> list[int]:
    """Lognormal conversation lengths (sigma 0.8) of at least 16 tokens, none longer than ``cap``.

    They sum to ``tokens``; the last one is cut for that, or left out if fewer than 16 would remain.
    """
    draw = np.random.default_rng(seed)
    lengths: list[int] = []
    while (rest := tokens - sum(lengths)) >= SHORTEST:
        length = round(median * math.exp(SIGMA * draw.standard_normal()))
        lengths.append(min(max(length, SHORTEST), cap, rest))
    return lengths


def chat_like_samples(
    lengths: Sequence[int], vocab_size: int, seed: int, supervised: float = 0.4
) -> list[Sample]:
    """Random token ids in turns of about 150 tokens; the end of each turn is a supervised answer.

    The share of a turn that is answer is uniform in ``supervised`` +- 0.15; weights are 0 or 1, and
    a first token is never supervised.
    """
    draw = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        turns = max(1, round(length / TURN_TOKENS))
        edges = np.linspace(0, length, turns + 1).round().astype(int)
        weights = np.zeros(length, dtype=np.float32)
        for start, end in zip(edges, edges[1:], strict=False):
            answer = round((end - start) * draw.uniform(supervised - 0.15, supervised + 0.15))
            weights[end - min(answer, end - start - 1) : end] = 1
        roles = np.where(weights > 0, ROLES.index("assistant"), ROLES.index("user"))
        ids = draw.integers(0, vocab_size, length, dtype=np.int32)
        samples.append(Sample(ids, weights, roles.astype(np.uint8)))
    return samples


@dataclass(frozen=True)
class Load:
    """What every candidate gets: a model folder, a dtype, and about ``tokens`` tokens of samples.

    Samples are random token ids of chat-like lengths, or, with ``data``, conversations of that
    file, tokenised by the model's template. The seed draws either.
    """

    model: Path
    dtype: torch.dtype
    tokens: int
    seed: int
    data: Path | None = None

    def samples(self) -> list[Sample]:
        if self.data is not None:
            return _drawn(self.data, self.model, self.tokens, self.seed)
        vocab_size = LlamaConfig.from_folder(self.model).vocab_size
        return chat_like_samples(chat_like_lengths(self.tokens, self.seed), vocab_size, self.seed)


def _drawn(data: Path, model: Path, tokens: int, seed: int) -> list[Sample]:
    """Conversations in a random order until the next would exceed ``tokens``; one at least."""
    samples = list(tokenize_file(data, ChatTokenizer.from_folder(model)))
    drawn: list[Sample] = []
    for index in np.random.default_rng(seed).permutation(len(samples)):
        if drawn and sum(map(len, drawn)) + len(samples[index]) > tokens:
            break
        drawn.append(samples[index])
    return drawn


class Candidate(Protocol):
    """Something whose step is timed."""

    tokens: int
    """Rows that go through the layers in one step."""

    def __init__(self, load: Load) -> None: ...

    def step(self) -> float | None:
        """Forward and backward; the mean loss per supervised token, None if there is no loss."""


class HFPadded:
    """Hugging Face's Llama under SDPA, micro-batches of four padded to their longest."""

    def __init__(self, load: Load, micro_batch: int = 4) -> None:
        self.model = load_hf(load, "sdpa")
        samples = load.samples()
        self.count = sum(int((s.token_weights[1:] > 0).sum()) for s in samples)
        starts = range(0, len(samples), micro_batch)
        self.batches = [self._pad(samples[s : s + micro_batch]) for s in starts]
        self.tokens = sum(batch["input_ids"].numel() for batch in self.batches)

    def step(self) -> float:
        self.model.zero_grad(set_to_none=True)
        return sum(self._backward(self._loss(batch)) for batch in self.batches)

    @torch.no_grad()
    def loss_only(self) -> float:
        """The loss of a step without its gradients: what other candidates are judged against."""
        return sum(float(self._loss(batch)) for batch in self.batches)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        # num_items_in_batch makes this the micro-batch's sum over the count of the whole step.
        return self.model(**batch, num_items_in_batch=self.count, use_cache=False).loss

    @staticmethod
    def _backward(loss: Tensor) -> float:
        loss.backward()
        return float(loss.detach())

    @staticmethod
    def _pad(samples: Sequence[Sample]) -> dict[str, Tensor]:
        longest = max(len(sample) for sample in samples)
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in samples])
        ids, labels = torch.zeros_like(mask), torch.full_like(mask, IGNORE_INDEX)
        for row, sample in enumerate(samples):
            ids[row, : len(sample)] = torch.from_numpy(sample.input_ids)
            labels[row, : len(sample)] = torch.from_numpy(_labels(sample))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class HFPacked:
    """Hugging Face's Llama under SDPA, one row with position ids: no padding, a T x T mask."""

    def __init__(self, load: Load) -> None:
        self.model = load_hf(load, "sdpa")
        samples = load.samples()
        self.tokens = sum(len(sample) for sample in samples)
        labels = np.concatenate([_labels(sample) for sample in samples])
        self.count = int((labels != IGNORE_INDEX).sum())
        self.batch = {
            "input_ids": torch.from_numpy(np.concatenate([s.input_ids for s in samples])).long(),
            "position_ids": position_ids_from_lengths(len(sample) for sample in samples),
            "labels": torch.from_numpy(labels),
        }

    def step(self) -> float:
        self.model.zero_grad(set_to_none=True)
        batch = {name: tensor[None] for name, tensor in self.batch.items()}
        loss = self.model(**batch, num_items_in_batch=self.count, use_cache=False).loss
        loss.backward()
        return float(loss.detach())


class Ours:
    """LlamaForSFT on one pack: attention per sequence, only supervised rows meet the vocabulary."""

    def __init__(self, load: Load) -> None:
        self.model = LlamaForSFT.from_pretrained(load.model, dtype=load.dtype)
        self.batch = collate(load.samples())
        self.tokens = self.batch.real_tokens

    def step(self) -> float:
        self.model.zero_grad(set_to_none=True)
        out = self.model(self.batch)
        loss = out.loss_sum / out.weight_sum
        loss.backward()
        return float(loss.detach())


class Floor:
    """Only the matrix products of our step: no attention, no loss, nothing between them.

    Forward, input gradient and weight gradient of every linear layer (``step_products``) on random
    matrices of the model's shapes and dtype. Results go to memory that is there already, so that
    nothing is allocated either.
    """

    def __init__(self, load: Load) -> None:
        batch = collate(load.samples())
        self.tokens = batch.real_tokens
        self.shapes = step_products(
            LlamaConfig.from_folder(load.model), self.tokens, batch.supervised_tokens
        )
        self.flops = sum(3 * 2 * rows * n_in * n_out for rows, n_in, n_out in self.shapes)
        new = torch.Generator().manual_seed(load.seed)
        self.weights = [torch.randn(o, i, generator=new).to(load.dtype) for _, i, o in self.shapes]
        widths = {(rows, n) for rows, n_in, n_out in self.shapes for n in (n_in, n_out)}
        self.rows = {at: torch.randn(at, generator=new).to(load.dtype) for at in sorted(widths)}
        shapes = widths | {(n_out, n_in) for _, n_in, n_out in self.shapes}
        self.out = {at: torch.empty(at, dtype=load.dtype) for at in shapes}

    def step(self) -> None:
        for (rows, n_in, n_out), weight in zip(self.shapes, self.weights, strict=True):
            x, dy = self.rows[rows, n_in], self.rows[rows, n_out]
            torch.mm(x, weight.T, out=self.out[rows, n_out])
            torch.mm(dy, weight, out=self.out[rows, n_in])
            torch.mm(dy.T, x, out=self.out[n_out, n_in])


CANDIDATES: dict[str, type[Candidate]] = {
    "hf padded": HFPadded,
    "hf packed": HFPacked,
    "ours": Ours,
    "floor": Floor,
}
"""Candidates by the name that tables and ``--probe`` use."""


def step_products(config: LlamaConfig, rows: int, scored: int) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of every linear layer of a step, with T ``rows`` and S ``scored``.

    Of the last layer only keys and values are needed everywhere.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def rest(rows: int) -> list[tuple[int, int, int]]:
        return [(rows, q_size, hidden), (rows, hidden, 2 * inner), (rows, inner, hidden)]

    layer = [(rows, hidden, q_size + 2 * kv_size), *rest(rows)]
    last = [(rows, hidden, 2 * kv_size), (scored, hidden, q_size), *rest(scored)]
    head = (scored, hidden, config.vocab_size)
    return [*layer * (config.num_layers - 1), *last, head]


def load_hf(load: Load, attention: str) -> Any:
    """The folder's model as transformers computes it, in training mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would write into ours
    return AutoModelForCausalLM.from_pretrained(
        load.model, dtype=load.dtype, attn_implementation=attention
    ).train()


def _labels(sample: Sample) -> np.ndarray:
    """(L,) unshifted, as HF takes them. A first token has no row that could predict it."""
    labels = np.where(sample.token_weights > 0, sample.input_ids.astype(np.int64), IGNORE_INDEX)
    labels[0] = IGNORE_INDEX
    return labels
