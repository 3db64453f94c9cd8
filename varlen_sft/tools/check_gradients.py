"""Loss and gradients of a pack against the conversations alone, and what must not change them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from varlen_sft.data.batch import PackedBatch
from varlen_sft.data.sample import Sample
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.tools.check_compare import Alone
from varlen_sft.tools.check_finding import Finding, Subject, relative_l2
from varlen_sft.tools.check_routes import Ours, Result
from varlen_sft.tools.check_subject import Packing

__all__ = ["check_gradients", "check_invariance", "check_isolation", "check_mean_loss"]

PROMISE = 1e-5
"""Relative error that the package promises in fp32, see DESIGN.md."""


def check_gradients(
    subject: Subject, alone: Alone, samples: Sequence[Sample], others: Sequence[Result] = ()
) -> list[Finding]:
    """The pack's loss and every gradient against sums over HF's model run alone.

    Args:
        subject: ours.
        alone: HF's model on each of ``samples`` by itself.
        samples: conversations.
        others: what HF's own batches make of them in the same dtype. Below fp32 a tensor's error is
            chance, and one run of HF's no measure of it: a gradient may be twice as far off as in
            the worst of HF's own.
    """
    exact = alone.high.gradients
    packed = Ours("", subject.model, {}, subject.collate).run(samples)
    eps = torch.finfo(next(iter(alone.low.gradients.values())).dtype).eps
    runs = [alone.low, *others]
    errors = {key: _excess(key, packed, runs, exact[key], eps) for key in exact}
    nearest = max(errors, key=lambda key: errors[key])
    _, worst, bound = errors[nearest]
    loss_bound = 2 * relative_l2(alone.low.loss, alone.high.loss) + eps
    return [
        Finding.measured(
            "the pack's loss is the sum over conversations alone",
            relative_l2(packed.loss, alone.high.loss),
            loss_bound,
            f"{len(samples)} conversations, {float(alone.high.loss):.6f}",
        ),
        Finding.measured(
            "every gradient is the sum over conversations alone",
            worst,
            bound,
            f"{len(exact)} tensors, the nearest to its bound is {nearest}",
        ),
    ]


def _excess(
    key: str, ours: Result, runs: Sequence[Result], exact: Tensor, eps: float
) -> tuple[float, float, float]:
    """(error / bound, error, bound) of one gradient; ``runs`` are HF's."""
    error = relative_l2(ours.gradients[key], exact)
    bound = 2 * max(relative_l2(run.gradients[key], exact) for run in runs) + eps
    return error / bound, error, bound


# ----------------------------------------------------------------- isolation


def check_isolation(subject: Subject, samples: Sequence[Sample]) -> list[Finding]:
    """Neighbours, order and pad tail change nothing, and no gradient crosses an edge."""
    return [_neighbours(subject, samples), _crossing(subject, samples[:3])]


@torch.no_grad()
def _losses(subject: Subject, samples: Sequence[Sample], **pad: int) -> list[Tensor]:
    """Per-row losses of each conversation of a pack."""
    rows = subject.model(subject.collate(samples, **pad)).token_loss
    lengths = [len(sample) - 1 for sample in samples]
    return list(rows[: sum(lengths)].split(lengths))


def _neighbours(subject: Subject, samples: Sequence[Sample]) -> Finding:
    base = _losses(subject, samples)
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    shuffled = _losses(subject, [samples[i] for i in order])
    corrupt = [replace(s, input_ids=s.input_ids[::-1].copy()) for s in samples]
    mixed = [s if i % 2 else corrupt[i] for i, s in enumerate(samples)]
    changed = _losses(subject, mixed)
    padded = _losses(subject, samples, pad_to=sum(len(b) for b in base) + 37)
    scale = torch.cat(base).double().norm()
    errors = {
        "another order": [shuffled[at] - base[i] for at, i in enumerate(order)],
        "corrupted neighbours": [changed[i] - base[i] for i in range(1, len(base), 2)],
        "a pad tail": [after - before for after, before in zip(padded, base, strict=True)],
    }
    worst = {name: float(torch.cat(e).double().norm() / scale) for name, e in errors.items()}
    name = max(worst, key=lambda key: worst[key])
    dtype = next(subject.model.parameters()).dtype
    bound = PROMISE if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    return Finding.measured(
        "order, neighbours and a pad tail change nothing", worst[name], bound, f"worst: {name}"
    )


def _crossing(subject: Subject, samples: Sequence[Sample]) -> Finding:
    """d loss of one conversation / d embeddings of the others, which has to be exactly 0."""
    worst, where = 0.0, ""
    for keep in range(len(samples)):
        silent = [
            s if i == keep else replace(s, token_weights=s.token_weights * 0)
            for i, s in enumerate(samples)
        ]
        batch = subject.collate(silent)
        grad = _embedding_gradient(subject.model, batch)
        start = sum(len(s) - 1 for s in samples[:keep])
        mask = torch.ones(len(grad), dtype=torch.bool)
        mask[start : start + len(samples[keep]) - 1] = False
        if float(grad[mask].abs().amax() if mask.any() else 0) > worst:
            worst = float(grad[mask].abs().amax())
            row = int((grad.abs().amax(-1) * mask).argmax())
            where = f"attention reaches across samples: conversation {keep} moves row {row}"
    name = "no gradient crosses an edge"
    return Finding.measured(name, worst, 0.0, where or "exactly 0 in every direction")


def _embedding_gradient(model: Packing, batch: PackedBatch) -> Tensor:
    leaf = model.embed_tokens(batch.input_ids).detach().requires_grad_()
    handle = model.embed_tokens.register_forward_hook(lambda *args: leaf.view_as(args[-1]))
    try:
        (grad,) = torch.autograd.grad(model(batch).loss_sum, leaf)
    finally:
        handle.remove()
    return grad


# -------------------------------------------------------------- accumulation


@torch.no_grad()
def check_mean_loss(subject: Subject, samples: Sequence[Sample]) -> Finding:
    """Two unequal micro-batches give the loss of one batch: a sum over a sum."""
    parts = [samples[:1], samples[1:]]
    outputs = [subject.model(subject.collate(part)) for part in parts]
    got = float(subject.mean_loss(outputs))
    wanted = float(sum(o.loss_sum for o in outputs) / sum(o.weight_sum for o in outputs))
    of_means = float(sum(o.loss_sum / o.weight_sum for o in outputs) / len(outputs))
    error, detail = (
        abs(got - wanted) / abs(wanted),
        f"{wanted:.6f} over {len(samples)} conversations",
    )
    if error > PROMISE and abs(got - of_means) <= PROMISE * abs(of_means):
        detail = f"it is the mean of the micro-batches' means, {of_means:.6f}, not {wanted:.6f}"
    return Finding.measured("micro-batches add up to one batch", error, PROMISE, detail)


# ---------------------------------------------------------------- invariance


@torch.no_grad()
def check_invariance(subject: Subject, samples: Sequence[Sample]) -> Finding:
    """An observation: is a conversation bit-equal alone and packed, and if not, from where on?"""
    from varlen_sft.tools.check_numbers import captured

    name = "a conversation's losses are bit-equal alone and packed"
    parts = _op_outputs(subject.model)
    with captured(parts) as packed:
        together = _losses(subject, samples)
    whole = dict(packed)
    with captured(parts) as alone:
        one = _losses(subject, samples[:1])[0]
    if torch.equal(one, together[0]):
        return Finding(name, None, None, "note", "yes, on this machine and these lengths")
    rows = len(one)
    for op in parts:
        if len(alone[op]) != rows:  # a pruned last layer has supervised rows only
            continue
        if not torch.equal(whole[op][:rows], alone[op]):
            return Finding(name, None, None, "note", f"no: {op} is the first to differ")
    return Finding(name, None, None, "note", "no: the loss head is the first to differ")


LLAMA_PARTS = (
    "input_layernorm", "self_attn.qkv_proj", "self_attn", "post_attention_layernorm",
    "mlp.gate_up_proj", "mlp.down_proj",
)  # fmt: skip


def _op_outputs(model: Packing) -> dict[str, torch.nn.Module]:
    """Modules in the order they run, so that the first to differ is the cause."""
    parts: dict[str, torch.nn.Module] = {"embedding": model.embed_tokens}
    names = LLAMA_PARTS if isinstance(model, LlamaForSFT) else ("self_attn", "mlp")
    for i, layer in enumerate(model.layers):
        for name in names:
            parts[f"layer {i} {name}"] = layer.get_submodule(name)
    return {**parts, "norm": model.norm}
