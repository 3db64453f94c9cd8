"""What benchmarks/traffic.py counts: the same work done by our kernels and by Liger's.

Import it under TRITON_INTERPRET=1: Triton asks for that when a kernel is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction, cross_entropy_forward
from liger_kernel.ops.rope import LigerRopeFunction
from torch import Tensor
from traffic_liger import liger_on_cuda

from varlen_sft import reference
from varlen_sft.ops.cross_entropy import (
    linear_cross_entropy,
    masked_cross_entropy,
    supervised_rows,
)
from varlen_sft.ops.cross_entropy_triton import score_rows_triton
from varlen_sft.ops.rope import apply_rope
from varlen_sft.tools.traffic import Traffic, count, cross_entropy_least, rope_least
from varlen_sft.types import LossOptions

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 8, 128  # heads of Llama 3 8B
VOCABULARY, HIDDEN = 49152, 576  # SmolLM2-135M
ROWS, SUPERVISED = 40, 16  # 40 %, as in chats
LINEAR_TOKENS, LINEAR_SUPERVISED = 512, 256
LAYOUTS = {
    "own": "q and k in buffers of their own, (B, S, H, D) in memory",
    "fused qkv": "views of one (B, S, H+2K, D) buffer, transposed as HF does",
    "heads first": "transposed views of (B, H, S, D) in memory",
}


@dataclass
class Row:
    """A line of the table; bytes."""

    op: str
    case: str
    who: str
    kernel: int
    sectors: int
    copies: int
    gemms: int
    least: int
    details: dict[str, Any]

    @property
    def times_least(self) -> float:
        return (self.kernel + self.copies + self.gemms) / self.least


def row(op: str, case: str, who: str, traffic: Traffic, least: int) -> Row:
    if not traffic.kernels:
        sys.exit(f"No table: {op}, {who}, ran no Triton kernel.")
    details = {
        "kernels": {name: asdict(kernel) for name, kernel in traffic.kernels.items()},
        "torch": dict(traffic.torch.most_common()),
        "gemms": dict(traffic.gemms),
    }
    return Row(op, case, who, traffic.kernel_bytes, traffic.sector_bytes, traffic.torch_bytes,
               traffic.gemm_bytes, least, details)  # fmt: skip


def agree(what: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """A candidate that computes something else is not to be compared: relative L2 in 16 bits."""
    for x, y in zip(got, expected, strict=True):
        error = float((x.double() - y.double()).norm() / y.double().norm())
        if not error < 0.02:
            sys.exit(f"No table: {what} is {error:.1%} off the reference.")


# ------------------------------------------------------------------------ RoPE


def rope_views(layout: str) -> tuple[Tensor, Tensor]:
    """q (1, H, S, D) and k (1, K, S, D) in fp16, as HF hands them to its rotation."""
    made = {
        "own": lambda n: torch.randn(1, TOKENS, n, HEAD_DIM).half().transpose(1, 2),
        "heads first": lambda n: torch.randn(1, n, TOKENS, HEAD_DIM).half(),
    }
    if layout in made:
        return made[layout](HEADS), made[layout](KV_HEADS)
    fused = torch.randn(1, TOKENS, HEADS + 2 * KV_HEADS, HEAD_DIM).half().transpose(1, 2)
    return fused[:, :HEADS], fused[:, HEADS : HEADS + KV_HEADS]


def rope_rows(layout: str) -> Iterator[Row]:
    """Forward and backward of both, on the same values and strides."""
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    cos, sin = reference.rope_table(parameters, HEAD_DIM, TOKENS)
    ids = torch.arange(TOKENS)
    hf_tables = [torch.cat((x, x), -1)[None].half() for x in (cos, sin)]

    def flat(x):
        return x.transpose(1, 2).flatten(0, 1)

    def ours(q, k):
        return apply_rope(flat(q), flat(k), cos, sin, ids, impl="triton")

    def liger(q, k):
        q, k = LigerRopeFunction.apply(q, k, *hf_tables)
        return flat(q), flat(k)

    passes: dict[str, list[Row]] = {"forward": [], "backward": []}
    for who, rotate, size, id_bytes in (("ours", ours, 4, 8), ("Liger", liger, 2, 0)):
        inputs, grads = rope_views(layout), tuple(flat(x) for x in rope_views(layout))
        expected = reference.apply_rope(*(flat(x).double() for x in inputs), cos, sin, ids)
        least = rope_least(*grads, row=size * HEAD_DIM, ids=id_bytes)
        (forward, backward), out, _ = forward_and_backward(rotate, inputs, grads)
        agree(f"RoPE, {who}", out, expected)
        passes["forward"].append(row("RoPE", f"{layout}, forward", who, forward, least))
        passes["backward"].append(row("RoPE", f"{layout}, backward", who, backward, least))
    for rows in passes.values():
        yield from rows


def forward_and_backward(
    call: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[tuple[Traffic, Traffic], list[Tensor], tuple[Tensor, ...]]:
    """Traffic of both passes, results and gradients. Leaves keep the strides of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with count() as forward:
        out = call(*leaves)
    kept = [x.detach().clone() for x in out]
    with count() as backward:
        # Not .backward(): it would copy strided gradients into leaves of its own liking.
        gradients = torch.autograd.grad(out, leaves, grads)
    return (forward, backward), kept, gradients


# --------------------------------------------------------------- cross-entropy


def row_kernel_rows(smoothing: float) -> Iterator[Row]:
    """Logits in, gradients in their place: what the linear head does to every chunk."""
    labels, values, least = scored_logits()
    weights = torch.ones(ROWS)
    loss, dlogits = exact_loss(values, labels, smoothing)

    def ours(logits: Tensor) -> tuple[Tensor, Tensor]:
        scored = score_rows_triton(
            logits, labels, weights, [0.0, 1.0, smoothing, 0.0], write_grad=True
        )
        factors[0] = scored.factor  # the head multiplies smaller matrices by it
        return scored.loss.sum(), logits

    def liger(logits: Tensor) -> tuple[Tensor, Tensor]:
        words = (None, -100, 0.0, smoothing, "sum", None, False)
        return cross_entropy_forward(logits.requires_grad_(), labels, *words)[0], logits

    case = f"in place, label smoothing {smoothing:g}" if smoothing else "in place"
    for who, kernel in (("ours", ours), ("Liger", liger)):
        factors: list[Tensor | None] = [None]
        logits = values.clone()
        with count() as traffic:
            total, gradient = kernel(logits)
        scaled = gradient if factors[0] is None else gradient.double() * factors[0][:, None]
        agree(f"row kernel, {who}", (total.detach(), scaled.detach()), (loss, dlogits))
        yield row("row kernel", case, who, traffic, least)


def cross_entropy_rows(incoming: float) -> Iterator[Row]:
    """Loss and gradient of logits, which autograd scales by an incoming gradient."""
    labels, values, least = scored_logits()
    loss, dlogits = exact_loss(values, labels)

    def ours(logits: Tensor) -> tuple[Tensor]:
        return (masked_cross_entropy(logits, labels, impl="triton").loss_sum,)

    def liger(logits: Tensor) -> tuple[Tensor]:
        words = (None, -100, 0.0, 0.0, "sum", None, False)
        return LigerCrossEntropyFunction.apply(logits, labels, *words)[:1]

    for who, head, dtype in (("ours", ours, torch.float32), ("Liger", liger, torch.bfloat16)):
        grads = (torch.tensor(incoming, dtype=dtype),)
        both, out, gradients = forward_and_backward(head, (values.clone(),), grads)
        # The interpreter cannot multiply in bf16, as Liger does to a gradient by the incoming one.
        known = 1 if who == "Liger" and incoming != 1 else 2
        got, expected = (*out, *gradients), (loss, incoming * dlogits)
        agree(f"cross-entropy, {who}", got[:known], expected[:known])
        yield row("cross-entropy", f"incoming gradient {incoming:g}", who, both[0] + both[1], least)


def scored_logits() -> tuple[Tensor, Tensor, int]:
    """Labels, logits, and the least bytes of loss and gradient."""
    values = torch.randn(ROWS, VOCABULARY).bfloat16()
    least = cross_entropy_least(values, SUPERVISED, gradient=True)
    return random_labels(ROWS, SUPERVISED), values, least


def exact_loss(values: Tensor, labels: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sum of losses and its gradient, in fp64."""
    exact = values.double().requires_grad_()
    options = LossOptions(label_smoothing=smoothing)
    loss = reference.masked_cross_entropy(exact, labels, options=options).loss_sum
    return loss.detach(), torch.autograd.grad(loss, exact)[0]


def linear_rows() -> Iterator[Row]:
    """The head with its matrix products: hidden states in, gradients of them and the weight out."""
    labels = random_labels(LINEAR_TOKENS, LINEAR_SUPERVISED)
    hidden = torch.randn(LINEAR_TOKENS, HIDDEN).bfloat16()
    weight = (torch.randn(VOCABULARY, HIDDEN) / 8).bfloat16()
    rows, liger_head = supervised_rows(labels), liger_on_cuda()

    def ours(x, w):
        return (linear_cross_entropy(x, w, labels, rows=rows, impl="triton").loss_sum,)

    def liger(x, w):
        words = (None, None, -100, 0.0, 0.0, "sum")
        return liger_head.LigerFusedLinearCrossEntropyFunction.apply(x, w, labels, *words)[:1]

    exact = reference.linear_cross_entropy(hidden.float(), weight.float(), labels).loss_sum
    moved = LINEAR_SUPERVISED + LINEAR_TOKENS + 2 * VOCABULARY
    least = moved * HIDDEN * hidden.element_size() + 12 * LINEAR_TOKENS
    for who, head in (("ours", ours), ("Liger", liger)):
        both, out, _ = forward_and_backward(head, (hidden, weight), (torch.tensor(1.0),))
        agree(f"linear cross-entropy, {who}", out, (exact,))
        case = f"{LINEAR_TOKENS} tokens, {LINEAR_SUPERVISED} supervised"
        yield row("linear cross-entropy", case, who, both[0] + both[1], least)


def random_labels(rows: int, supervised: int) -> Tensor:
    labels = torch.full((rows,), -100)
    chosen = torch.randperm(rows)[:supervised]
    labels[chosen] = torch.randint(VOCABULARY, (supervised,))
    return labels


def cases() -> list[Callable[[], Iterator[Row]]]:
    """Each yields rows of the table, ours and Liger's."""
    rope = [partial(rope_rows, layout) for layout in LAYOUTS]
    kernel = [partial(row_kernel_rows, smoothing) for smoothing in (0.0, 0.1)]
    losses = [partial(cross_entropy_rows, incoming) for incoming in (1.0, 0.5)]
    return [*rope, *kernel, *losses, linear_rows]
