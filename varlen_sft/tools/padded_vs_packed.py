"""The same conversations as a padded Hugging Face batch and as our pack, measured side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from varlen_sft.tools.step_bench import check_losses, fp32_loss, interleaved, peak_memory
from varlen_sft.tools.step_candidates import CANDIDATES, Candidate, Load
from varlen_sft.tools.step_table import disturbed

__all__ = ["compare"]

LABELS = {"hf padded": "HF, padded", "ours": "varlen_sft, packed"}


def compare(
    load: Load,
    rounds: int,
    threads: int,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> dict[str, Any]:
    """Loss, tokens computed, step time and peak memory of both.

    Args:
        load: model, dtype and conversations.
        rounds: timed rounds; both run once in each, in turn.
        threads: of the processes that memory is measured in.
        progress: told the share done and what is being done.

    Returns:
        ``rows``, padded first, with loss, tokens_computed, seconds (all rounds, their median, min
        and max), real_tokens_per_second and peak_bytes; conversations, real_tokens, rounds,
        loss_difference, loss_bound, and ``disturbed``: candidates whose times spread too far.

    Raises:
        LossesDisagree: they did not compute the same loss.
    """
    steps = _Steps(progress, total=3 + 2 * (1 + rounds) + 2)
    memory = {}
    for name in LABELS:
        steps(f"peak memory: {LABELS[name]}")
        memory[name] = peak_memory(name, load, threads)["peak_bytes"]
    steps("loss in fp32")
    truth = fp32_loss(load)
    candidates: dict[str, Candidate] = {}
    losses: dict[str, float] = {}
    for name in LABELS:
        steps(f"first step: {LABELS[name]}")
        candidates[name] = CANDIDATES[name](load)
        losses[name] = candidates[name].step() or 0.0
    bound = check_losses(losses, truth, load.dtype)
    times = interleaved(candidates, rounds, warmup=0, progress=steps)
    samples = load.samples()
    real_tokens = sum(len(sample) for sample in samples)
    rows = [
        _row(name, losses[name], candidates[name].tokens, times[name], real_tokens, memory[name])
        for name in LABELS
    ]
    return {
        "rows": rows,
        "disturbed": disturbed(rows),
        "conversations": len(samples),
        "real_tokens": real_tokens,
        "rounds": rounds,
        "loss_difference": abs(losses["ours"] - losses["hf padded"]),
        "loss_bound": bound,
    }


def _row(
    name: str, loss: float, tokens: int, seconds: list[float], real_tokens: int, peak: int
) -> dict[str, Any]:
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "candidate": name,
        "label": LABELS[name],
        "loss": loss,
        "tokens_computed": tokens,
        "seconds": seconds,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "real_tokens_per_second": real_tokens / median,
        "peak_bytes": peak,
    }


class _Steps:
    """Counts what is begun, so that a bar can show it."""

    def __init__(self, progress: Callable[[float, str], None], total: int) -> None:
        self.progress, self.total, self.begun = progress, total, 0

    def __call__(self, text: str) -> None:
        self.progress(self.begun / self.total, text)
        self.begun += 1
