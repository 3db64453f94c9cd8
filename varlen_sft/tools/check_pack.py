"""Is the pack itself right? Edges, positions, labels, pad tail, weights and the RoPE table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varlen_sft.data.batch import PackedBatch
from varlen_sft.data.sample import Sample
from varlen_sft.tools.check_finding import Finding, Subject
from varlen_sft.tools.check_subject import hf_names, rotary_tables
from varlen_sft.types import IGNORE_INDEX
from varlen_sft.words import listed

__all__ = ["check_pack", "check_rope", "check_weights"]

PAD = 37


def check_pack(subject: Subject, samples: Sequence[Sample]) -> list[Finding]:
    """What collate made of the samples, value by value."""
    batch = subject.collate(samples)
    padded = subject.collate(samples, pad_to=sum(len(s) - 1 for s in samples) + PAD)
    return [
        Finding.decided(
            "positions restart in every conversation",
            list(_position_faults(batch, samples)),
            f"{len(samples)} conversations, each from 0",
        ),
        Finding.decided(
            "every row learns the next token of its own conversation",
            list(_label_faults(batch, samples)),
            f"{batch.supervised_tokens:,} of {batch.real_tokens:,} rows have a target",
        ),
        Finding.decided(
            "the pad tail costs nothing",
            list(_tail_faults(padded, batch)),
            f"{PAD} tokens in sequences no longer than the longest conversation",
        ),
    ]


def _rows(samples: Sequence[Sample]) -> Iterator[tuple[int, int, Sample]]:
    """(conversation, first row, sample)."""
    start = 0
    for index, sample in enumerate(samples):
        yield index, start, sample
        start += len(sample) - 1


def _position_faults(batch: PackedBatch, samples: Sequence[Sample]) -> Iterator[str]:
    for index, start, sample in _rows(samples):
        got = batch.position_ids[start : start + len(sample) - 1]
        wrong = (got != torch.arange(len(got))).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            yield (
                f"positions are not reset: row {start + row} is token {row} of conversation "
                f"{index}, its position is {int(got[row])}"
            )


def _label_faults(batch: PackedBatch, samples: Sequence[Sample]) -> Iterator[str]:
    total = sum(len(sample) - 1 for sample in samples)
    if len(batch.labels) > total:
        yield (
            f"a boundary label is trained: there are {len(batch.labels) - total} rows more than "
            "tokens that have a next token in their own conversation"
        )
        return
    for index, start, sample in _rows(samples):
        rows = len(sample) - 1
        got = batch.labels[start : start + rows].numpy()
        wanted = np.where(sample.token_weights[1:] > 0, sample.input_ids[1:], IGNORE_INDEX)
        if (got != wanted).any():
            yield _name_label_fault(got, wanted, index, start, sample)


def _name_label_fault(
    got: np.ndarray, wanted: np.ndarray, index: int, start: int, sample: Sample
) -> str:
    row = int((got != wanted).argmax())
    trained = got != IGNORE_INDEX
    where = f"row {start + row} (conversation {index}, token {row})"
    tokens = sample.input_ids
    for shift in (0, 2):
        at = np.arange(len(got)) + shift
        inside = trained & (at < len(tokens))
        if inside.any() and (got[inside] == tokens[at[inside]]).all():
            return f"the label shift is off by one: {where} learns the token {shift} places on"
    return f"{where} learns {got[row]}, its next token is {wanted[row]}"


def _tail_faults(padded: PackedBatch, plain: PackedBatch) -> Iterator[str]:
    lengths = padded.cu_seqlens.diff()
    tail = lengths[len(plain.cu_seqlens) - 1 :]
    needed = -(-PAD // plain.max_seqlen)
    if len(tail) > needed:
        zero = bool((padded.position_ids[-PAD:] == 0).all())
        why = ": its position ids are all 0" if zero else ""
        yield f"a pad tail of {PAD} tokens became {len(tail)} sequences, {needed} would do{why}"
    if padded.max_seqlen > plain.max_seqlen:
        yield f"the pad tail raises max_seqlen from {plain.max_seqlen} to {padded.max_seqlen}"
    if bool((padded.labels[-PAD:] != IGNORE_INDEX).any()):
        yield "tokens of the pad tail have targets"


# ------------------------------------------------------------------- weights


def check_weights(subject: Subject, hf: Any) -> Finding:
    """Every weight is transformers' own, bit for bit; swapped heads are named."""
    theirs = hf.state_dict()
    faults = []
    for name, pieces in hf_names(subject.model).items():
        parameter = subject.model.get_parameter(name).detach()
        parts = parameter.split([rows for _, rows in pieces])
        for (key, _), part in zip(pieces, parts, strict=True):
            if not torch.equal(part, theirs[key]):
                faults.append(_name_weight_fault(key, part, theirs[key], subject))
    count = sum(p.numel() for p in subject.model.parameters())
    return Finding.decided("weights are those of transformers", faults, f"{count:,} bit for bit")


def _name_weight_fault(key: str, ours: Tensor, theirs: Tensor, subject: Subject) -> str:
    if any(p in key for p in ("q_proj", "k_proj", "v_proj")):
        head_dim = next(iter(rotary_tables(subject.model).values())).head_dim
        heads, others = ours.split(head_dim), theirs.split(head_dim)
        for at, head in enumerate(heads):
            found = [i for i, other in enumerate(others) if torch.equal(head, other)]
            if found and at not in found:
                return f"attention heads are permuted: {key}, head {at} holds head {found[0]}"
    return f"{key} differs"


# ---------------------------------------------------------------------- RoPE


def check_rope(subject: Subject, hf: Any) -> Finding:
    """The angles of a long sequence against transformers' rotary embedding, bit for bit."""
    from varlen_sft.ops.sequences import sequences_from_lengths

    rotary, faults, types, lengths = hf.base_model.rotary_emb, [], [], []
    for kind, table in rotary_tables(subject.model).items():
        length = min(1024, table.rope_parameters["max_position_embeddings"])
        ids = torch.arange(length)
        cos, sin = rotary(torch.zeros(1), ids[None], *([] if kind is None else [kind]))
        rotation = table(ids, sequences_from_lengths([length]))
        half = rotation.cos.shape[1]
        ours = (rotation.cos[rotation.position_ids], rotation.sin[rotation.position_ids])
        if not all(torch.equal(a, b[0, :, :half]) for a, b in zip(ours, (cos, sin), strict=True)):
            wanted = getattr(rotary, "inv_freq" if kind is None else f"{kind}_inv_freq")
            faults.append(_name_rope_fault(ours, wanted))
        types.append(table.rope_parameters["rope_type"])
        lengths.append(length)
    name = f"RoPE angles of {max(lengths)} positions are those of transformers"
    return Finding.decided(name, faults, f"rope_type {listed(types)}, bit for bit")


def _name_rope_fault(ours: tuple[Tensor, Tensor], wanted: Tensor) -> str:
    """The frequencies that our table must have been made of, read off position 1."""
    got = torch.atan2(ours[1][1], ours[0][1])
    if torch.allclose(got, wanted.bfloat16().float(), rtol=1e-5, atol=1e-9):
        return "inv_freq was rounded to bf16 before the angles were made"
    slopes = got.log().diff(), wanted.log().diff()
    if got.numel() > 2 and slopes[0].std() < 1e-3 * slopes[0].abs().mean():
        dims = 2 * got.numel()
        base, right = (float(torch.exp(-s.mean() * dims / 2)) for s in slopes)
        return f"the RoPE base is {base:,.0f}, the model's is {right:,.0f}"
    worst = int((got - wanted).abs().argmax())
    return (
        f"frequency {worst} is {float(got[worst]):.6g}, the model's is {float(wanted[worst]):.6g}"
    )
