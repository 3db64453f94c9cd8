"""Runs of Hugging Face models that tests compare: each sample alone, and all in one pack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.helpers import relative_error
from tests.integrations.families import alone_inputs

Result = dict[str, Tensor]
"""Logits (T, V), the summed loss, and the gradient of each parameter by its name."""


def alone(model: PreTrainedModel, packed: dict[str, Any]) -> Result:
    """The samples one by one; losses and gradients summed, logits one after another."""
    model.zero_grad()
    logits, total = [], torch.zeros(())
    for sample in alone_inputs(packed):
        out = model(input_ids=sample["input_ids"]).logits[0]
        loss = _loss(out, sample["shift_labels"][0])
        loss.backward()
        logits.append(out.detach())
        total = total + loss.detach()
    return _result(model, torch.cat(logits), total)


def together(model: PreTrainedModel, packed: dict[str, Any], **call: Any) -> Result:
    """All samples in one call; ``call`` changes its keywords."""
    model.zero_grad()
    given = {k: v for k, v in {**packed, **call}.items() if k != "shift_labels" and v is not None}
    out = model(**given).logits[0]
    loss = _loss(out, packed["shift_labels"][0])
    loss.backward()
    return _result(model, out.detach(), loss.detach())


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits.to(dtype), labels, reduction="sum")


def _result(model: PreTrainedModel, logits: Tensor, loss: Tensor) -> Result:
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits, "loss": loss, **grads}


def assert_close(actual: Result, expected: Result, bound: float) -> None:
    """Relative L2 per tensor."""
    assert actual.keys() == expected.keys()
    for name in actual:
        error = relative_error(actual[name], expected[name])
        assert error <= bound, f"{name}: {error:.3e} > {bound:.0e}"


def assert_same_bits(actual: Result, expected: Result) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name
