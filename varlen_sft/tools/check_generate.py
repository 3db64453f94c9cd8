"""Greedy tokens of Hugging Face's ``generate``, and whether a pack fed with them says the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varlen_sft.tools.check_finding import Finding, Subject, whole
from varlen_sft.tools.check_numbers import Progress

__all__ = ["generate", "teacher_forcing"]


@torch.no_grad()
def generate(
    hf: Any, prompts: Sequence[np.ndarray], tokens: int, batch: int, progress: Progress
) -> list[tuple[np.ndarray, Tensor]]:
    """Greedy continuations of ``tokens`` tokens by HF, and the top-2 gap at each of them.

    ``batch`` prompts are written at a time, padded on the left as HF wants them: writing one token
    reads all weights, for however many prompts.
    """
    hf.generation_config.eos_token_id = None  # go on after a stop token: every prompt counts alike
    written: list[tuple[np.ndarray, Tensor]] = []
    steps = iter(range(1, 2**31))
    total = -(-len(prompts) // batch) * tokens

    def tick(ids: Tensor, scores: Tensor) -> Tensor:
        progress(next(steps) / total)
        return scores

    for start in range(0, len(prompts), batch):
        written += _generate(hf, prompts[start : start + batch], tokens, tick)
    return written


def _generate(
    hf: Any, prompts: Sequence[np.ndarray], tokens: int, tick: Callable[[Tensor, Tensor], Tensor]
) -> list[tuple[np.ndarray, Tensor]]:
    from transformers import LogitsProcessorList

    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    rows = list(zip(pads, prompts, strict=True))
    out = hf.generate(
        torch.tensor([[0] * pad + prompt.tolist() for pad, prompt in rows]),
        attention_mask=torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in rows]),
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([tick]),
    )
    top = torch.stack(out.logits).topk(2).values  # (tokens, prompts, 2)
    gaps = (top[..., 0] - top[..., 1]).unbind(1)
    texts = [ids[pad:].numpy() for ids, pad in zip(out.sequences, pads, strict=True)]
    return list(zip(texts, gaps, strict=True))


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
    batch = subject.collate(samples)
    hidden = subject.model.hidden_states(batch.input_ids, batch.position_ids, batch.sequences)
    equal = ties = 0
    wrong: list[str] = []
    for index, (ids, gaps) in enumerate(written):
        end = int(batch.cu_seqlens[index + 1])
        said = subject.model.lm_head(hidden[end - tokens : end]).argmax(-1)
        wanted = torch.from_numpy(ids[-tokens:])
        differs, near = said != wanted, gaps < 2 * tolerance
        equal += int((~differs).sum())
        ties += int((differs & near).sum())
        for at in (differs & ~near).nonzero()[:1].flatten().tolist():
            wrong.append(f"prompt {index}, token {at}: {int(said[at])}, HF wrote {int(wanted[at])}")
    total = tokens * len(written)
    if low.dtype == torch.float32:
        return Finding.decided(name, wrong, f"{equal} of {total} equal, {ties} near ties")
    theirs = sum(_reproduced(low, ids, tokens) for ids, _ in written)
    detail = f"{equal} of {total} equal; HF in the same dtype: {theirs} of {total}"
    return Finding(name, None, None, "note", detail)


def _reproduced(hf: Any, ids: np.ndarray, tokens: int) -> int:
    """How many of the last tokens HF alone, fed with all before, finds the most likely."""
    said = hf(torch.from_numpy(ids[:-1]).long()[None]).logits[0, -tokens:].argmax(-1)
    return int((said == torch.from_numpy(ids[-tokens:])).sum())
