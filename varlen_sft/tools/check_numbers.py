"""Does the pack compute what Hugging Face computes for each conversation alone?

Every bound is derived: our error against the next higher precision (fp64 for fp32, fp32 for bf16)
may be twice that of transformers' own model in the same dtype, plus one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_sft.data.sample import Sample
from varlen_sft.models.llama import Residual
from varlen_sft.tools.check_finding import Finding, Subject

__all__ = ["HIGHER", "Numbers", "Progress", "captured", "compare_forward", "forward_findings"]

HIGHER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
NEAR_TIES = 1e-3
"""At most this share of positions may be too close to call."""
Progress = Callable[[float], None]


@contextmanager
def captured(parts: dict[str, torch.nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Outputs of named modules in the last forward, (rows, C)."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Residual):
                output = output.value()
            first = output[0] if isinstance(output, tuple) else output
            seen[name] = first.detach().reshape(-1, first.shape[-1])

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in parts.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def layer_modules(model: Any) -> dict[str, torch.nn.Module]:
    """Embedding, every layer and the last norm, under the same names for HF's model and ours."""
    body = getattr(model, "base_model", model)
    layers = {f"layer {i}": layer for i, layer in enumerate(body.layers)}
    return {"embedding": body.embed_tokens, **layers, "norm": body.norm}


@dataclass
class Numbers:
    """Errors of our packed forward and of HF's own, conversation by conversation."""

    dtype: torch.dtype
    layers: dict[str, list[float]] = field(default_factory=dict)  # squared: ours, HF's, the norm
    ours: list[np.ndarray] = field(default_factory=list)  # max abs logit error of every position
    hf: list[np.ndarray] = field(default_factory=list)
    hf_log_probability: float = 0.0  # largest error of HF's own, of the tokens that come next
    largest_logit: float = 0.0
    disagreements: list[tuple[int, int, float]] = field(default_factory=list)  # gap in HF's logits
    hf_misses: int = 0  # the higher precision's most likely token is not among HF's most likely
    our_misses: int = 0  # and not among ours

    @property
    def positions(self) -> int:
        return sum(len(errors) for errors in self.ours)

    @property
    def tolerance(self) -> float:
        """For a logit: twice HF's worst error, and one rounding of the largest logit."""
        worst = max(float(errors.max()) for errors in self.hf)
        return 2 * worst + torch.finfo(self.dtype).eps * self.largest_logit

    @property
    def log_probability_tolerance(self) -> float:
        """The same for the -log p of a token, by HF's worst of all positions: that of the few that
        are supervised would be chance."""
        return 2 * self.hf_log_probability + torch.finfo(self.dtype).eps * self.largest_logit

    @property
    def most_misses(self) -> float:
        """For ours: twice HF's, and three standard deviations of the difference of two such counts
        of rare events (Poisson: the variance of a - 2 b, with a mean of 2 n and of n, is 6 n)."""
        return 2 * self.hf_misses + 3 * math.sqrt(6 * max(1, self.hf_misses))

    def layer_errors(self) -> list[dict[str, Any]]:
        """Relative L2 error after each layer, ours and HF's, and the bound on ours."""
        rows = []
        for name, (ours, hf, norm) in self.layers.items():
            error, theirs = (ours / norm) ** 0.5, (hf / norm) ** 0.5
            bound = 2 * theirs + torch.finfo(self.dtype).eps
            rows.append({"name": name, "ours": error, "hf": theirs, "bound": bound})
        return rows

    def add_layer(self, name: str, ours: Tensor, low: Tensor, high: Tensor) -> None:
        sums = self.layers.setdefault(name, [0.0, 0.0, 0.0])
        high = high.double()
        for at, value in enumerate((ours.double() - high, low.double() - high, high)):
            sums[at] += float(value.square().sum())

    def add_targets(self, low: Tensor, high: Tensor, tokens: Tensor) -> None:
        """HF's own logits (L - 1, V), and the tokens (L - 1,) that come next."""
        wide = torch.promote_types(low.dtype, torch.float32)
        theirs = F.cross_entropy(low.to(wide), tokens, reduction="none")
        error = (theirs - F.cross_entropy(high, tokens, reduction="none")).abs().max()
        self.hf_log_probability = max(self.hf_log_probability, float(error))

    def add_logits(self, conversation: int, ours: Tensor, low: Tensor, high: Tensor) -> None:
        # A subtraction widens as it reads.
        self.ours.append((ours - high).abs_().amax(-1).double().numpy())
        self.hf.append((low - high).abs_().amax(-1).double().numpy())
        self.largest_logit = max(self.largest_logit, float(high.abs().max()))
        top, said, truth = low.topk(2), ours.argmax(-1), high.argmax(-1)
        theirs = top.indices[:, 0]
        for position in (said != theirs).nonzero().flatten().tolist():
            gap = float(top.values[position, 0] - top.values[position, 1])
            self.disagreements.append((conversation, position, gap))
        self.hf_misses += _misses(low, truth)
        self.our_misses += _misses(ours, truth)


def _misses(logits: Tensor, tokens: Tensor) -> int:
    """Positions where a token is not the most likely one. With few bits, and all the more under a
    softcap, several tokens share that place, and which of them is taken says nothing."""
    own = logits.gather(-1, tokens[:, None])[:, 0]
    return int((~(own >= logits.amax(-1))).sum())


@torch.no_grad()
def compare_forward(
    numbers: Numbers,
    subject: Subject,
    low: Any,
    high: Any,
    samples: Sequence[Sample],
    progress: Progress,
) -> None:
    """Our pack of all samples against HF alone, in the same dtype (low) and a higher one."""
    batch = subject.collate(samples)
    with captured(layer_modules(subject.model)) as ours:
        hidden = subject.model.hidden_states(batch.input_ids, batch.position_ids, batch.sequences)
        start = 0
        for index, sample in enumerate(samples):
            ids = torch.from_numpy(sample.input_ids[:-1]).long()
            part = slice(start, start + len(ids))
            start += len(ids)
            with captured(layer_modules(low)) as a, captured(layer_modules(high)) as b:
                low_logits, high_logits = low(ids[None]).logits[0], high(ids[None]).logits[0]
            for name in a:
                numbers.add_layer(name, ours[name][part], a[name], b[name])
            logits = subject.model.lm_head(hidden[part])
            numbers.add_logits(index, logits, low_logits, high_logits)
            targets = torch.from_numpy(sample.input_ids[1:]).long()
            numbers.add_targets(low_logits, high_logits, targets)
            progress((index + 1) / len(samples))


def forward_findings(numbers: Numbers) -> list[Finding]:
    """Logits within tolerance, top-1 equal but for near ties, and where a difference begins."""
    worst = max(float(errors.max()) for errors in numbers.ours)
    where = _first_layer(numbers)
    logits = Finding.measured(
        "logits of every position are those of HF alone", worst, numbers.tolerance, where
    )
    return [logits, _top_finding(numbers, where)]


def _top_finding(numbers: Numbers, where: str) -> Finding:
    name = "the most likely next token is that of HF alone"
    wrong = [d for d in numbers.disagreements if not d[2] < 2 * numbers.tolerance]
    if wrong:
        conversation, position, gap = wrong[0]
        detail = (
            f"conversation {conversation}, token {position}: HF's top-2 gap is {gap:.3g}, no near "
            f"tie; {len(wrong)} of {numbers.positions:,} positions. {where}"
        )
        return Finding(name, len(wrong) / numbers.positions, 0.0, "fail", detail)
    ties, detail = len(numbers.disagreements), f"{numbers.positions:,} positions"
    if numbers.dtype == torch.float32:
        share = ties / numbers.positions
        return Finding.measured(name, share, NEAR_TIES, f"{detail}, {ties} near ties")
    # Two roundings differ in more than a tie or two: the higher precision judges both instead.
    detail += (
        f"; it is not the higher precision's in {numbers.our_misses}, HF's in {numbers.hf_misses}"
    )
    allowed = max(NEAR_TIES, numbers.most_misses / numbers.positions)
    return Finding.measured(name, numbers.our_misses / numbers.positions, allowed, detail)


def _first_layer(numbers: Numbers) -> str:
    for row in numbers.layer_errors():
        if not row["ours"] <= row["bound"]:
            return f"first difference after {row['name']}: {row['ours']:.2e} > {row['bound']:.2e}"
    return "no layer differs"
