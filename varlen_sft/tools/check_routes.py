"""Ways to compute the loss of conversations: Hugging Face padded and packed, and ours by each
implementation that runs here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_sft.data.batch import PackedBatch, collate, shift
from varlen_sft.data.sample import Sample
from varlen_sft.tools.check_impls import chosen
from varlen_sft.tools.check_subject import Packing, hf_names

__all__ = ["HFAlone", "HFPacked", "HFPadded", "Ours", "Result", "Route"]

Gradients = dict[str, Tensor]


@dataclass
class Result:
    """What a route made of conversations."""

    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    rows: list[Tensor] = field(default_factory=list)
    """-log p of every supervised token, conversation by conversation."""
    gradients: Gradients = field(default_factory=dict)

    def add(self, losses: Tensor, samples: Sequence[Sample]) -> None:
        """Per-row losses of conversations that lie one after another, (sum of L - 1,)."""
        parts = losses.detach().split([len(sample) - 1 for sample in samples])
        for part, sample in zip(parts, samples, strict=True):
            self.rows.append(part[torch.from_numpy(sample.token_weights[1:] > 0)].double())

    def __add__(self, other: Result) -> Result:
        """Of the conversations of both; the gradients of ``other`` become the sums."""
        for name, gradient in self.gradients.items():
            other.gradients[name] = other.gradients[name].add_(gradient)
        return Result(self.loss + other.loss, self.rows + other.rows, other.gradients)


class Route:
    """One way to compute; a subclass says how. ``group`` conversations go into one call."""

    name: str
    group: int = 5

    def loss(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """The weighted sum, differentiable, and the loss of every row (sum of L - 1,)."""
        raise NotImplementedError

    def logits(self, samples: Sequence[Sample]) -> list[Tensor]:
        """(L - 1, V) of each conversation."""
        raise NotImplementedError

    def embedding(self) -> nn.Module:
        raise NotImplementedError

    def places(self, samples: Sequence[Sample]) -> list[slice]:
        """Where each conversation's rows are in the embedding's output, batch axes flattened."""
        raise NotImplementedError

    def gradients(self) -> Gradients:
        """Those of the parameters, under HF's names; taken off."""
        raise NotImplementedError

    def active(self) -> AbstractContextManager[None]:
        """Around all that it computes, backward passes included."""
        return nullcontext()

    def run(
        self, samples: Sequence[Sample], progress: Callable[[float], None] = lambda share: None
    ) -> Result:
        """Loss, rows and gradients of all conversations."""
        result = Result()
        self.gradients()
        for start in range(0, len(samples), self.group):
            part = samples[start : start + self.group]
            with self.active():
                loss, rows = self.loss(part)
                loss.backward()
            result.loss += loss.detach()
            result.add(rows, part)
            progress(min(1.0, (start + self.group) / len(samples)))
        result.gradients = self.gradients()
        return result

    def leak(self, samples: Sequence[Sample]) -> float:
        """The largest gradient of the last conversation's loss on an embedding of another's."""
        *others, last = samples
        silent = [replace(s, token_weights=s.token_weights * 0) for s in others]
        seen: list[Tensor] = []

        def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen.append(output.detach().requires_grad_())
            return seen[0]

        handle = self.embedding().register_forward_hook(cut)
        try:
            with self.active():
                (grad,) = torch.autograd.grad(self.loss([*silent, last])[0], seen[0])
        finally:
            handle.remove()
        grad = grad.flatten(0, -2)
        grad[self.places(samples)[-1]] = 0
        return float(grad.abs().max())


# -------------------------------------------------------------- Hugging Face


class _HF(Route):
    def __init__(self, hf: Any) -> None:
        self.hf = hf

    def embedding(self) -> nn.Module:
        return self.hf.base_model.embed_tokens

    def gradients(self) -> Gradients:
        found = {name: p.grad for name, p in self.hf.named_parameters() if p.grad is not None}
        self.hf.zero_grad(set_to_none=True)
        return found

    def loss(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        logits = torch.cat(self.logits(samples))
        targets = [tuple(torch.from_numpy(x) for x in shift(s)[1:]) for s in samples]
        labels, weights = (torch.cat(parts) for parts in zip(*targets, strict=True))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = F.cross_entropy(wide, labels, reduction="none", ignore_index=-100)
        return (rows * weights).sum(), rows


class HFAlone(_HF):
    """The model on each conversation by itself: what all others are held to."""

    name, group = "Hugging Face, alone", 1

    def logits(self, samples: Sequence[Sample]) -> list[Tensor]:
        rows = [torch.from_numpy(shift(s)[0])[None] for s in samples]
        return [self.hf(ids, use_cache=False).logits[0] for ids in rows]


class HFPadded(_HF):
    """Rows padded on the right, with a mask."""

    name = "Hugging Face, padded"

    def logits(self, samples: Sequence[Sample]) -> list[Tensor]:
        rows = [torch.from_numpy(shift(s)[0]) for s in samples]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        logits = self.hf(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [logits[i, : len(row)] for i, row in enumerate(rows)]

    def places(self, samples: Sequence[Sample]) -> list[slice]:
        longest = max(len(s) for s in samples) - 1
        return [slice(i * longest, i * longest + len(s) - 1) for i, s in enumerate(samples)]


class HFPacked(_HF):
    """One row with position ids that start anew, and neither mask nor cache."""

    name = "Hugging Face, packed by position_ids"

    def logits(self, samples: Sequence[Sample]) -> list[Tensor]:
        batch = collate(samples)
        ids, positions = batch.input_ids[None], batch.position_ids[None]
        logits = self.hf(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        return list(logits.split([len(s) - 1 for s in samples]))

    def places(self, samples: Sequence[Sample]) -> list[slice]:
        return _packed_places(samples)


def _packed_places(samples: Sequence[Sample]) -> list[slice]:
    ends = torch.tensor([len(s) - 1 for s in samples]).cumsum(0).tolist()
    return [slice(end - len(s) + 1, end) for end, s in zip(ends, samples, strict=True)]


# ---------------------------------------------------------------------- ours


class Ours(Route):
    """A pack by our ops, each in the implementation that is named."""

    group = 2**31  # all in one pack

    def __init__(
        self,
        name: str,
        model: Packing,
        impls: dict[str, str],
        collate: Callable[..., PackedBatch] = collate,
    ) -> None:
        self.name, self.model, self.impls, self.collate = name, model, impls, collate

    def active(self) -> AbstractContextManager[None]:
        return chosen(self.impls)

    def embedding(self) -> nn.Module:
        return self.model.embed_tokens

    def places(self, samples: Sequence[Sample]) -> list[slice]:
        return _packed_places(samples)

    def loss(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        output = self.model(self.collate(samples))
        total = sum(len(s) - 1 for s in samples)
        return output.loss_sum, output.token_loss[:total]

    def logits(self, samples: Sequence[Sample]) -> list[Tensor]:
        batch = self.collate(samples)
        with self.active():
            hidden = self.model.hidden_states(batch.input_ids, batch.position_ids, batch.sequences)
        return [self.model.lm_head(hidden[place]) for place in self.places(samples)]

    def gradients(self) -> Gradients:
        found: Gradients = {}
        for name, pieces in hf_names(self.model).items():
            grad = self.model.get_parameter(name).grad
            if grad is not None:
                parts = grad.split([rows for _, rows in pieces])
                found.update(zip((key for key, _ in pieces), parts, strict=True))
        self.model.zero_grad(set_to_none=True)
        return found
