"""Loss heads that the benchmarks compare, each called as its users call it.

T tokens, S supervised rows, C hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varlen_sft.ops.cross_entropy import linear_cross_entropy, supervised_rows
from varlen_sft.tools import step_bench
from varlen_sft.types import IGNORE_INDEX, accumulation_dtype

CHUNK_ROWS = 512


@dataclass(frozen=True)
class HeadLoad:
    """Random rows and weights whose logits have variance one, as a trained head's roughly have."""

    dtype: str
    vocab: int
    tokens: int
    hidden: int = 576
    supervised: float = 0.4
    device: str = "cpu"
    seed: int = 0

    def make(self) -> HeadInputs:
        device, dtype = torch.device(self.device), step_bench.DTYPES[self.dtype]
        draw = torch.Generator(device).manual_seed(self.seed)
        # Drawn in place and in their own dtype: a peak of memory here would hide the head's.
        hidden = torch.empty(self.tokens, self.hidden, dtype=dtype, device=device)
        weight = torch.empty(self.vocab, self.hidden, dtype=dtype, device=device)
        hidden.normal_(generator=draw), weight.normal_(std=self.hidden**-0.5, generator=draw)
        labels = torch.randint(self.vocab, (self.tokens,), generator=draw, device=device)
        order = torch.rand(self.tokens, generator=draw, device=device).argsort()
        labels[order[round(self.supervised * self.tokens) :]] = IGNORE_INDEX
        scored = (labels != IGNORE_INDEX).nonzero().flatten()
        rows = supervised_rows(labels.cpu()).to(device)
        return HeadInputs(hidden.requires_grad_(), weight.requires_grad_(), labels, rows, scored)


class HeadInputs(NamedTuple):
    hidden: Tensor  # (T, C)
    weight: Tensor  # (V, C)
    labels: Tensor  # (T,)
    rows: Tensor  # (S rounded up,), what a batch brings along
    scored: Tensor  # (S,)


# ------------------------------------------------------------------ the heads
# Each gives the mean loss over supervised rows.


def ours(x: HeadInputs) -> Tensor:
    out = linear_cross_entropy(x.hidden, x.weight, x.labels, rows=x.rows)
    return out.loss_sum / out.weight_sum


def naive(x: HeadInputs) -> Tensor:
    return F.cross_entropy(F.linear(x.hidden, x.weight).float(), x.labels)  # fp32 as HF does it


def gathered(x: HeadInputs) -> Tensor:
    mask = x.labels != IGNORE_INDEX
    return F.cross_entropy(F.linear(x.hidden[mask], x.weight).float(), x.labels[mask])


def gathered_chunked(x: HeadInputs) -> Tensor:
    mask = x.labels != IGNORE_INDEX
    hidden, labels = x.hidden[mask], x.labels[mask]

    def part(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    chunks = zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True)
    losses = [checkpoint(part, h, x.weight, y, use_reentrant=False) for h, y in chunks]
    return torch.stack(losses).sum() / len(labels)


TORCH_OPTIONS = {
    "none": None,
    "auto": {},
    "chunks": {"batch_chunk_size": CHUNK_ROWS},
    "one chunk": {"batch_chunk_size": 2**31},
    "chunks, balanced": {"batch_chunk_size": CHUNK_ROWS, "acc_policy": "balanced"},
}
"""What ``F.linear_cross_entropy`` can be told; "auto" is its own choice for device and dtype."""


def torch_fused(name: str, x: HeadInputs) -> Callable[[HeadInputs], Tensor]:
    """torch's own head with one of ``TORCH_OPTIONS``.

    Raises:
        ModuleNotFoundError: a torch without it.
    """
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise ModuleNotFoundError(name="torch.nn.LinearCrossEntropyOptions")
    named: Any = TORCH_OPTIONS[name]
    if named is not None and "acc_policy" in named:  # which would turn fp32 sums off, unasked
        named = named | {"acc_dtype": accumulation_dtype(x.hidden.dtype)}
    options = None if named is None else nn.LinearCrossEntropyOptions(**named)
    return lambda x: F.linear_cross_entropy(x.hidden, x.weight, x.labels, options=options)


class _Trunk(nn.Module):
    """Stands where TRL expects a model: its trunk gives the rows, its head is the weight."""

    def __init__(self, x: HeadInputs) -> None:
        super().__init__()
        self.head = SimpleNamespace(weight=x.weight, bias=None)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.base_model = lambda **_: SimpleNamespace(last_hidden_state=x.hidden[None])

    def forward(self, **_: Any) -> None:
        raise NotImplementedError

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head


def trl_head(x: HeadInputs) -> Callable[[HeadInputs], Tensor]:
    """TRL's own head as its SFTTrainer installs it, metrics included (ours has them too)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.utils import add_fused_lm_head
    model: Any = _Trunk(x)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return lambda x: model(shift_labels=x.labels[None], fused_lm_head=True).loss


def liger_head(x: HeadInputs) -> Callable[[HeadInputs], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x: loss(x.weight, x.hidden, x.labels)


def compiled(head: Callable[[HeadInputs], Tensor]) -> Callable[[HeadInputs], Tensor]:
    return torch.compile(head, dynamic=False)


HEADS: dict[str, Callable[[HeadInputs], Callable[[HeadInputs], Tensor]]] = {
    "ours": lambda x: ours,
    "naive": lambda x: naive,
    **{f"torch fused, {name}": partial(torch_fused, name) for name in TORCH_OPTIONS},
    "TRL": trl_head,
    "gathered": lambda x: gathered,
    "gathered, chunked": lambda x: gathered_chunked,
}
"""Makers of heads, by the name that tables and ``--probe`` use."""


def head_step(head: Callable[[HeadInputs], Tensor], x: HeadInputs) -> Callable[[], Tensor]:
    """Forward and backward from no gradients; the loss."""

    def step() -> Tensor:
        x.hidden.grad = x.weight.grad = None
        loss = head(x)
        loss.backward()
        return loss.detach()

    return step


def bare_products(x: HeadInputs) -> Callable[[], None]:
    """The three matrix products of a head on its supervised rows, into memory that is there."""
    rows, weight = x.hidden.detach()[x.scored], x.weight.detach()
    dlogits = torch.empty(len(rows), len(weight), dtype=rows.dtype, device=rows.device).normal_()
    logits, drows, dweight = (torch.empty_like(like) for like in (dlogits, rows, weight))

    def step() -> None:
        torch.mm(rows, weight.T, out=logits)
        torch.mm(dlogits, weight, out=drows)
        torch.mm(dlogits.T, rows, out=dweight)

    return step
