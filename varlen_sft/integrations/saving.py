"""What pruning the last layer spares, counted from a model's config. Nothing is measured here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from varlen_sft.integrations.families import family_of

__all__ = ["Saving", "saving"]


@dataclass(frozen=True)
class Saving:
    """Floating-point operations of a forward pass, per token of a pack.

    The backward has twice as many of each kind, so that the share is also that of a step.
    """

    supervised: float  # share of the rows that are
    length: int  # tokens of a sequence
    flops: float  # with the head on supervised rows only and no layer pruned
    spared: float  # of these, by pruning the last layer

    @property
    def share(self) -> float:
        return self.spared / self.flops

    def __str__(self) -> str:
        return (
            f"spares {self.share:.1%} of the FLOPs of a step "
            f"(sequences of {self.length} tokens, {self.supervised:.0%} of them supervised)"
        )


def saving(config: Any, *, supervised: float = 0.4, length: int = 1024) -> Saving:
    """Count matrix products and attention scores of a model of a supported family.

    Queries, output projection and MLP of the last layer are spared for every row that is not
    supervised; so are the scores of those queries. The supervised rows are taken to end each
    sequence, as one answer does.

    Args:
        config: HF's, as of ``AutoConfig``.
        supervised: S / T, in (0, 1].
        length: tokens of a sequence.

    Raises:
        ValueError: a family that is not supported, or a number out of its range.
    """
    if not 0 < supervised <= 1:
        raise ValueError(f"supervised must be in (0, 1], got {supervised}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    windows = _windows(config)
    hidden, width = config.hidden_size, config.num_attention_heads * _head_dim(config)
    kv_width = config.num_key_value_heads * _head_dim(config)
    by_row = 2 * hidden * (2 * width + 3 * config.intermediate_size)  # q, o; gate, up, down
    layers = config.num_hidden_layers * (by_row + 4 * hidden * kv_width)
    scores = sum(_scores(width, length, window, length) for window in windows)
    head = 2 * hidden * config.vocab_size * supervised
    idle = round((1 - supervised) * length)
    spared = (1 - supervised) * by_row + _scores(width, idle, windows[-1], length)
    return Saving(supervised, length, layers + scores + head, spared)


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def _windows(config: Any) -> list[int | None]:
    """Keys that a query of each layer sees at most."""
    count, owner = config.num_hidden_layers, family_of(config).window
    if owner is None:
        return [None] * count
    if owner == "config":
        return [config.sliding_window] * count
    sliding = (kind == "sliding_attention" for kind in config.layer_types[:count])
    return [config.sliding_window if is_sliding else None for is_sliding in sliding]


def _scores(width: int, queries: int, window: int | None, length: int) -> float:
    """Of the first ``queries`` rows of a sequence: q k and p v, per token of the sequence."""
    full = queries if window is None else min(queries, window)
    keys = full * (full + 1) / 2 + (queries - full) * (window or 0)
    return 4 * width * keys / length
