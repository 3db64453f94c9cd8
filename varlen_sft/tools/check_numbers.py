"""Does the pack compute what Hugging Face computes for each conversation alone?

Every bound is derived: our error against the next higher precision (fp64 for fp32, fp32 for bf16)
may be twice that of transformers' own model in the same dtype, plus one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varlen_sft.data.batch import PackedBatch
from varlen_sft.data.sample import Sample
from varlen_sft.models.llama import Residual
from varlen_sft.tools.check_finding import Finding, Subject, whole

__all__ = ["HIGHER", "Numbers", "compare_forward", "generate", "teacher_forcing"]

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
    largest_logit: float = 0.0
    disagreements: list[tuple[int, int, float]] = field(default_factory=list)  # gap in HF's logits
    hf_disagreements: int = 0  # of HF in this dtype against HF in the higher one
    our_disagreements: int = 0  # of ours against HF in the higher one

    @property
    def positions(self) -> int:
        return sum(len(errors) for errors in self.ours)

    @property
    def tolerance(self) -> float:
        """For a logit: twice HF's worst error, and one rounding of the largest logit."""
        worst = max(float(errors.max()) for errors in self.hf)
        return 2 * worst + torch.finfo(self.dtype).eps * self.largest_logit

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
        self.hf_disagreements += int((theirs != truth).sum())
        self.our_disagreements += int((said != truth).sum())


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
            progress((index + 1) / len(samples))


def forward_findings(numbers: Numbers) -> list[Finding]:
    """Logits within tolerance, top-1 equal but for near ties, and where a difference begins."""
    worst = max(float(errors.max()) for errors in numbers.ours)
    where = _first_layer(numbers)
    logits = Finding.measured(
        "logits of every position are those of HF alone", worst, numbers.tolerance, where
    )
    ties = [d for d in numbers.disagreements if d[2] < 2 * numbers.tolerance]
    wrong = [d for d in numbers.disagreements if d[2] >= 2 * numbers.tolerance]
    share, allowed = len(ties) / numbers.positions, NEAR_TIES
    if _is_low(numbers):  # two roundings differ: both are judged by the higher precision instead
        share = numbers.our_disagreements / numbers.positions
        allowed = max(NEAR_TIES, 2 * numbers.hf_disagreements / numbers.positions)
    name = "the most likely next token is that of HF alone"
    if wrong:
        conversation, position, gap = wrong[0]
        detail = (
            f"conversation {conversation}, token {position}: HF's top-2 gap is {gap:.3g}, no near "
            f"tie; {len(wrong)} of {numbers.positions:,} positions. {where}"
        )
        return [logits, Finding(name, len(wrong) / numbers.positions, 0.0, "fail", detail)]
    detail = f"{numbers.positions:,} positions, {len(ties)} near ties"
    return [logits, Finding.measured(name, share, allowed, detail)]


def _is_low(numbers: Numbers) -> bool:
    """Below fp32 HF itself disagrees with the higher precision in more than a near tie or two."""
    return numbers.dtype != torch.float32


def _first_layer(numbers: Numbers) -> str:
    for row in numbers.layer_errors():
        if not row["ours"] <= row["bound"]:
            return f"first difference after {row['name']}: {row['ours']:.2e} > {row['bound']:.2e}"
    return "no layer differs"


# ---------------------------------------------------------------- generation


@torch.no_grad()
def generate(
    hf: Any, prompts: Sequence[np.ndarray], tokens: int, batch: int, progress: Progress
) -> list[tuple[np.ndarray, Tensor]]:
    """Greedy continuations of ``tokens`` tokens by HF, and the top-2 gap at each of them.

    ``batch`` prompts are written at a time, padded on the left as HF wants them: writing one token
    reads all weights, for however many prompts.
    """
    from transformers import LogitsProcessorList

    hf.generation_config.eos_token_id = None  # go on after a stop token: every prompt counts alike
    written: list[tuple[np.ndarray, Tensor]] = []
    steps = iter(range(1, 2**31))
    total = -(-len(prompts) // batch) * tokens

    def tick(ids: Tensor, scores: Tensor) -> Tensor:
        progress(next(steps) / total)
        return scores

    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(p)) + p.tolist() for p in part])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
        out = hf.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([tick]),
        )
        top = torch.stack(out.logits).topk(2).values
        for row, prompt in enumerate(part):
            text = out.sequences[row, longest - len(prompt) :].numpy()
            written.append((text, top[:, row, 0] - top[:, row, 1]))
    return written


@torch.no_grad()
def teacher_forcing(
    subject: Subject,
    low: Any,
    written: Sequence[tuple[np.ndarray, Tensor]],
    tokens: int,
    tolerance: float,
) -> Finding:
    """Fed with what HF wrote, does the pack write the same at every position?"""
    name = f"{tokens} greedy tokens of HF for {len(written)} prompts are reproduced"
    samples = [whole(ids) for ids, _ in written]
    batch: PackedBatch = subject.collate(samples)
    logits = subject.model.hidden_states(batch.input_ids, batch.position_ids, batch.sequences)
    equal = theirs = ties = 0
    wrong: list[str] = []
    for index, (ids, gaps) in enumerate(written):
        end = int(batch.cu_seqlens[index + 1])
        said = subject.model.lm_head(logits[end - tokens : end]).argmax(-1)
        wanted = torch.from_numpy(ids[-tokens:])
        same = said == wanted
        equal += int(same.sum())
        near = ~same & (gaps < 2 * tolerance)
        ties += int(near.sum())
        if bool((~same & ~near).any()):
            at = int((~same & ~near).nonzero()[0])
            wrong.append(f"prompt {index}, token {at}: {int(said[at])}, HF wrote {int(wanted[at])}")
        if low.dtype != torch.float32:
            forced = low(torch.from_numpy(ids[:-1]).long()[None]).logits[0, -tokens:]
            theirs += int((forced.argmax(-1) == wanted).sum())
    total = tokens * len(written)
    if low.dtype == torch.float32:
        return Finding.decided(name, wrong, f"{equal} of {total} equal, {ties} near ties")
    detail = f"{equal} of {total} equal; HF in the same dtype: {theirs} of {total}"
    return Finding(name, None, None, "note", detail)
