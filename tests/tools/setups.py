"""Batches as people's own collators make them: right ones, for tests to plant a mistake in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varlen_sft.tools.check_mistake import ModelFacts
from varlen_sft.tools.check_setup import Mistake

PAD, BOS, EOS = 0, 1, 2
VOCAB = 53
LENGTHS = [5, 7, 4]
FACTS = ModelFacts(pads=frozenset({PAD}), stops=frozenset({EOS}), bos=BOS, query_size=64)
PAD_IS_EOS = ModelFacts(pads=frozenset({EOS}), stops=frozenset({EOS}))
Features = list[dict[str, Tensor]]


def features(lengths: Sequence[int], seed: int = 0) -> Features:
    """Samples that begin with BOS and end with EOS; about half is trained, EOS always."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=draw)
        ids[0], ids[-1] = BOS, EOS
        labels = ids.clone()
        labels[: max(1, length // 2)] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def packed(samples: Features, *, flash: bool = False) -> dict[str, Any]:
    """One row, no mask, positions that start anew, boundary labels -100."""
    lengths = [len(s["input_ids"]) for s in samples]
    batch: dict[str, Any] = {
        "input_ids": torch.cat([s["input_ids"] for s in samples])[None],
        "labels": torch.cat([s["labels"] for s in samples])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    if flash:
        edges = torch.tensor([0, *lengths]).cumsum(0).int()
        batch |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges.clone()}
        batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return batch


def padded(samples: Features, *, pad: int = PAD, left: bool = False) -> dict[str, Any]:
    """One row per sample, with a mask made of lengths."""
    longest = max(len(s["input_ids"]) for s in samples)
    fills = {"input_ids": pad, "labels": -100, "attention_mask": 0}
    rows: dict[str, list[Tensor]] = {key: [] for key in fills}
    for sample in samples:
        ones = torch.ones_like(sample["input_ids"])
        for key, values in {**sample, "attention_mask": ones}.items():
            tail = values.new_full((longest - len(values),), fills[key])
            rows[key].append(torch.cat([tail, values] if left else [values, tail]))
    return {key: torch.stack(values) for key, values in rows.items()}


def shift_labels(batch: dict[str, Any], samples: Features) -> dict[str, Any]:
    """The same batch with targets shifted per sample in place of labels."""
    targets = [torch.cat([s["labels"][1:], s["labels"].new_tensor([-100])]) for s in samples]
    rest = {key: value for key, value in batch.items() if key != "labels"}
    return {**rest, "shift_labels": torch.cat(targets)[None]}


def padded_tail(batch: dict[str, Any], tokens: int, positions: Tensor) -> dict[str, Any]:
    """A packed batch with pad tokens behind it, at the given positions."""
    fills = {"input_ids": PAD, "labels": -100}
    longer = {
        key: torch.cat([batch[key], batch[key].new_full((1, tokens), fill)], dim=1)
        for key, fill in fills.items()
    }
    return {
        **batch,
        **longer,
        "position_ids": torch.cat([batch["position_ids"], positions[None]], 1),
    }


def only(found: list[Mistake]) -> Mistake:
    assert len(found) == 1, [str(mistake) for mistake in found]
    return found[0]


def told(mistake: Mistake) -> tuple[str, int | None, int | None, bool]:
    return mistake.name, mistake.row, mistake.column, mistake.certain
