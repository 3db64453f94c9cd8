"""Losses and gradients of Hugging Face models that tests compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import relative_error
from tests.integrations.families import VOCAB
from varlen_sft import reference
from varlen_sft.types import IGNORE_INDEX


def error(actual: Tensor, expected: Tensor) -> float:
    return relative_error(actual.detach(), expected.detach())


def padded(rows: int = 3, length: int = 20) -> dict[str, Any]:
    """Rows of unlike lengths, padded at the end, labels not shifted."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([length, 7, 15])[:rows, None]
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, :4] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def shifted(given: dict[str, Any]) -> Tensor:
    labels = given.get("shift_labels")
    if labels is not None:
        return labels.flatten()
    return nn.functional.pad(given["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def by_the_book(model: Any, given: dict[str, Any], weights: Tensor | None = None) -> Tensor:
    """The weighted sum over the model's own logits, by the specification."""
    inputs = {k: v for k, v in given.items() if k not in ("labels", "shift_labels")}
    logits = model(**inputs).logits.flatten(0, 1)
    return reference.masked_cross_entropy(logits, shifted(given), token_weights=weights).loss_sum


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name in expected:
        assert error(actual[name], expected[name]) < bound, name
