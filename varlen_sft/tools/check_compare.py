"""Every route on the same conversations, each held to Hugging Face's model alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from varlen_sft.data.sample import Sample
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.tools.check_finding import Finding, Subject, relative_l2, whole
from varlen_sft.tools.check_impls import implementations
from varlen_sft.tools.check_routes import HFPacked, HFPadded, Ours, Result, Route
from varlen_sft.tools.check_subject import PatchedModel

__all__ = ["Alone", "Comparison", "Judge", "compare_routes", "route_findings"]

PROMPTS = 2
"""Generated answers that each route is fed with."""
Written = Sequence[tuple[np.ndarray, Tensor]]
WIDE = torch.float64
GROUPS = ("embedding", "attention", "MLP", "norms", "head")


class Alone(NamedTuple):
    """Hugging Face's model on each conversation by itself, in the dtype and the next higher."""

    low: Result
    high: Result


class Figure(NamedTuple):
    """An error, and how large it may be; None where nothing is asked."""

    error: float
    bound: float | None = None

    def share(self) -> float:
        """Of the bound; a bound of 0 is kept by 0 alone."""
        if self.bound is None or self.error == 0:
            return 0.0
        return self.error / self.bound if self.bound else math.inf


@dataclass
class Comparison:
    """One route: its figures by name, and the norms of its gradients."""

    name: str
    ours: bool
    figures: dict[str, Figure] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        figures = {name: figure._asdict() for name, figure in self.figures.items()}
        return {"name": self.name, "ours": self.ours, "figures": figures, "norms": self.norms}


def compare_routes(
    subject: Subject,
    low: Any,
    alone: Alone,
    samples: Sequence[Sample],
    written: Written,
    limits: tuple[float, float],
    progress: Callable[[float], None] = lambda share: None,
) -> list[Comparison]:
    """Log-probabilities, loss, gradients, leakage and generated tokens of every route.

    Args:
        subject: ours.
        low: Hugging Face's model in the dtype that is checked.
        alone: what it makes of ``samples`` one by one.
        samples: conversations.
        written: what Hugging Face's generate wrote after some prompts, and its top-2 gaps.
        limits: tolerances of a logit and of a -log p, as measured on every position before.

    Returns:
        The first is Hugging Face alone, whose errors make the bounds.
    """
    judge = Judge(alone, low.dtype, limits[1])
    made = [judge.alone()]
    routes = list(_routes(subject, low))
    shortest = sorted(samples, key=len)[:2]
    for done, (route, ours) in enumerate(routes, start=1):
        comparison = judge.compare(route.name, ours, route.run(samples))
        comparison.figures["leakage"] = Figure(route.leak(shortest), 0.0)
        wrong = generated(route, written[:PROMPTS], limits[0])
        is_fp32 = low.dtype == torch.float32  # below it Hugging Face does not repeat itself
        comparison.figures["generated"] = Figure(wrong, 0.0 if is_fp32 else None)
        made.append(comparison)
        progress(done / len(routes))
    return made


def _routes(subject: Subject, low: Any) -> Iterator[tuple[Route, bool]]:
    yield HFPadded(low), False
    yield HFPacked(low), False
    device = next(subject.model.parameters()).device
    kind = "LlamaForSFT" if isinstance(subject.model, LlamaForSFT) else "patched"
    for label, impls in implementations(device).items():
        yield Ours(f"{kind}: {label}", subject.model, impls, subject.collate), True
    if isinstance(subject.model, LlamaForSFT):
        patched = PatchedModel(copy.deepcopy(low))
        yield Ours("patched", patched, {}, subject.collate), True


# ------------------------------------------------------------------- figures


class Judge:
    """Errors against the higher precision; each may be twice what it is for Hugging Face alone,
    plus one rounding. ``log_probability`` is that bound for one token."""

    def __init__(self, alone: Alone, dtype: torch.dtype, log_probability: float) -> None:
        self.low, self.high = alone
        eps = torch.finfo(dtype).eps
        self.rows = torch.cat(self.high.rows)
        theirs = (torch.cat(self.low.rows) - self.rows).abs()
        # A sum's errors may cancel by luck: the bound is made of what they are without it.
        spread = float(theirs.sum() / self.high.loss.abs().clamp(min=1e-30))
        self.norms = _norms(self.high.gradients)
        self.bounds = {
            "log-probability": log_probability,
            "loss": 2 * spread + eps,
        }
        for name, error in self.gradients(self.low).items():
            self.bounds[name] = 2 * error + eps

    def alone(self) -> Comparison:
        """Hugging Face alone itself, which is not judged."""
        made = self.compare("Hugging Face, alone", False, self.low)
        made.figures = {name: Figure(figure.error) for name, figure in made.figures.items()}
        return made

    def compare(self, name: str, ours: bool, result: Result) -> Comparison:
        errors = {
            "log-probability": float((torch.cat(result.rows) - self.rows).abs().max()),
            "loss": relative_l2(result.loss, self.high.loss),
            **self.gradients(result),
        }
        figures = {key: Figure(error, self.bounds[key]) for key, error in errors.items()}
        return Comparison(name, ours, figures, _norms(result.gradients))

    def gradients(self, result: Result) -> dict[str, float]:
        """Relative L2 error of each part of the model; a missing gradient is all error."""
        squares = dict.fromkeys(self.norms, 0.0)
        for name, exact in self.high.gradients.items():
            found = result.gradients.get(name)
            difference = exact if found is None else found - exact  # in the wider dtype
            squares[group_of(name)] += float(torch.linalg.vector_norm(difference)) ** 2
        return {
            f"gradient of {group}": math.sqrt(square) / self.norms[group]
            for group, square in squares.items()
        }


def group_of(name: str) -> str:
    """Which part of the model a parameter of HF's belongs to."""
    if "norm" in name:
        return "norms"
    parts = {"embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention"}
    return next((group for part, group in parts.items() if part in name), "MLP")


def _norms(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Of each part of the model that has gradients, in the order of ``GROUPS``."""
    squares = dict.fromkeys(GROUPS, 0.0)
    for name, grad in gradients.items():
        squares[group_of(name)] += float(torch.linalg.vector_norm(grad, dtype=WIDE)) ** 2
    return {group: math.sqrt(square) for group, square in squares.items() if square}


@torch.no_grad()
def generated(route: Route, written: Written, tolerance: float) -> float:
    """Share of generated tokens that the route would not write, near ties left out."""
    wrong = total = 0
    logits = route.logits([whole(ids) for ids, _ in written]) if written else []
    for (ids, gaps), made in zip(written, logits, strict=True):
        wanted = torch.from_numpy(ids[-len(gaps) :]).long()
        differs = (made[-len(gaps) :].argmax(-1) != wanted) & (gaps >= 2 * tolerance)
        wrong, total = wrong + int(differs.sum()), total + len(gaps)
    return wrong / total if total else 0.0


# ------------------------------------------------------------------ findings


def route_findings(comparisons: Sequence[Comparison], rope_note: str = "") -> list[Finding]:
    """A verdict on each route of ours; what is found of Hugging Face's is noted.

    Args:
        comparisons: Hugging Face alone first.
        rope_note: why Hugging Face's own may differ from alone, if that is known.
    """
    return [_finding(c, rope_note) for c in comparisons[1:]]


def _finding(comparison: Comparison, rope_note: str) -> Finding:
    worst = max(comparison.figures, key=lambda name: _order(comparison.figures[name]))
    figure = comparison.figures[worst]
    name = f"{comparison.name}: as alone"
    bound = 0.0 if figure.bound is None else figure.bound
    detail = f"nearest to its bound: {worst}"
    if comparison.ours:
        return Finding.measured(name, figure.error, bound, detail)
    if figure.share() <= 1:
        return Finding(name, figure.error, bound, "note", detail)
    over = [name for name, f in comparison.figures.items() if not f.share() <= 1]
    return Finding(
        name, figure.error, bound, "note",
        f"it is not: {', '.join(over)}{f' ({rope_note})' if rope_note else ''}",
    )  # fmt: skip


def _order(figure: Figure) -> float:
    share = figure.share()
    return math.inf if math.isnan(share) else share
