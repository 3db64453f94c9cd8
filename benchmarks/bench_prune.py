"""A pruned last layer against a whole one: one block of SmolLM2-135M's sizes, loss and backward.

One layer and a small vocabulary, so that nothing else hides what pruning costs or spares. Whole and
pruned steps take turns in one process; the loss of both is compared first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
import script
import torch
from rich.table import Table

CONFIG = {
    "model_type": "llama",
    "vocab_size": 2000,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
SLOWER = 1.02  # the noise of a quiet machine

# Tokens of a pack, of a sample at most, and of a turn (None: one answer, at the end of a sample).
PACKS = {
    "one answer": (2048, 1024, None),
    "turns of 100": (2048, 1024, 100),
    "turns of 400": (2048, 1024, 400),
    "one sample, turns of 500": (6144, 6145, 500),
    "a short pack": (128, 129, None),
}
SHARES = (0.1, 0.4, 0.75)


def batch(tokens: int, longest: int, turn: int | None, share: float) -> Any:
    """A pack of samples of which so large a share is supervised, at the end of every turn."""
    from varlen_sft import Sample
    from varlen_sft.data.batch import collate

    draw, samples = np.random.default_rng(0), []
    while tokens > 0:
        drawn = longest if longest > 1024 else int(draw.lognormal(5.8, 0.6)) + 8
        length = min(drawn, longest, max(tokens + 1, 8))
        at = np.arange(length) % (turn or length)
        weights = (at >= (1 - share) * (turn or length)).astype(np.float32)
        ids = draw.integers(0, CONFIG["vocab_size"], length, dtype=np.int32)
        samples.append(Sample(ids, weights, np.zeros(length, np.uint8)))
        tokens -= length - 1
    return collate(samples)


def step(model: Any, pack: Any, prune: bool) -> tuple[float, float]:
    """Seconds of a step, and its loss."""
    model.prune_last_layer = prune
    model.zero_grad()
    start = time.perf_counter()
    output = model(pack)
    (output.loss_sum / output.weight_sum).backward()
    return time.perf_counter() - start, float(output.loss_sum.detach())


def compared(model: Any, pack: Any, rounds: int) -> dict[str, Any]:
    """Medians of both, and the median of their ratio round by round."""
    from varlen_sft.ops.last_layer import last_rows

    losses = [step(model, pack, prune)[1] for prune in (False, True)]
    if abs(losses[0] - losses[1]) > 1e-2 * abs(losses[0]):
        raise AssertionError(f"losses differ: {losses}")
    times: list[list[float]] = [[], []]
    for i in range(rounds):
        for prune in (False, True) if i % 2 else (True, False):
            times[prune].append(step(model, pack, prune)[0])
    last = last_rows(pack.rows, len(pack.input_ids), pack.sequences)
    runs = None if last is None else last.runs
    total = len(pack.input_ids)
    return {
        "supervised": pack.supervised_tokens / total,
        "queries": (total if runs is None else len(runs.rows)) / total,
        "keys": (total if runs is None or runs.k_rows is None else len(runs.k_rows)) / total,
        "whole_ms": 1e3 * statistics.median(times[0]),
        "pruned_ms": 1e3 * statistics.median(times[1]),
        "ratio": statistics.median(b / a for a, b in zip(*times, strict=True)),
    }


def table(results: dict[str, dict[str, Any]], dtype: str) -> Table:
    shown = Table("pack", title=f"The last layer, {dtype}", title_justify="left")
    for name in ("supervised", "queries", "keys", "whole ms", "pruned ms", "ratio"):
        shown.add_column(name, justify="right")
    for name, row in results.items():
        shares = (f"{row[key]:.0%}" for key in ("supervised", "queries", "keys"))
        times = (f"{row['whole_ms']:.1f}", f"{row['pruned_ms']:.1f}", f"{row['ratio']:.3f}")
        shown.add_row(name, *shares, *times)
    worst = max(row["ratio"] for row in results.values())
    shown.caption = script.goal(worst <= SLOWER, f"at most {worst:.3f} of a whole layer's time")
    shown.caption_justify = "left"
    return shown


def main() -> int:
    from varlen_sft.models.config import LlamaConfig
    from varlen_sft.models.llama import LlamaForSFT
    from varlen_sft.tools.environment import environment
    from varlen_sft.train.memory import keep_freed_memory

    options: argparse.ArgumentParser = script.parser(str(__doc__), __file__)
    options.add_argument("--rounds", type=int, default=9, help="(default: 9)")
    args = options.parse_args()
    keep_freed_memory()
    console, results = script.console(), {}
    for dtype in ("bfloat16", "float32"):
        torch.manual_seed(0)
        model = LlamaForSFT(LlamaConfig.from_hf(CONFIG)).to(getattr(torch, dtype))
        results[dtype] = {
            f"{name}, {share:.0%}": compared(model, batch(*pack, share), args.rounds)
            for name, pack in PACKS.items()
            for share in SHARES
        }
        console.print(table(results[dtype], dtype))
    return script.finish(console, args.json, environment(), results)


if __name__ == "__main__":
    sys.exit(main())
