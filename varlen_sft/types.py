"""What the ops take and give besides tensors. The letters are those of ``varlen_sft.ops``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
Numerics = Literal["fp32", "hf"]


class Sequences(NamedTuple):
    """Where the sequences of a pack begin and end.

    With a fixed capacity ``cu_seqlens`` is longer than B + 1 and its tail repeats T, which
    describes sequences of no tokens: nothing computes on them.
    """

    cu_seqlens: Tensor  # (B + 1,) int32: 0, then the end of each sequence
    max_seqlen: int  # tokens of the longest sequence, or an upper bound of it
    num_sequences: Tensor  # () int32, on the device of cu_seqlens

    def lengths(self) -> list[int]:
        """Tokens of each sequence, as Python ints. Waits for the device."""
        return self.cu_seqlens.diff().tolist()


@dataclass(frozen=True)
class LossOptions:
    """What may be done to logits and loss besides plain cross-entropy.

    Raises:
        ValueError: a value out of its range.
    """

    softcap: float = 0.0
    """Logits become softcap * tanh(logits / softcap) (Gemma 2); 0 leaves them."""
    logit_scale: float = 1.0
    """Multiplies the logits before the softcap (Cohere, Granite)."""
    label_smoothing: float = 0.0
    """Share of the target mass spread evenly over the vocabulary, in [0, 1)."""
    z_loss: float = 0.0
    """Weight of lse^2, which keeps the partition function near one (PaLM, 2204.02311)."""
    chunk_bytes: int = 2**30
    """Bytes of logits that exist at a time; more where the sum of the weight's gradient over chunks
    would take as much more."""

    def __post_init__(self) -> None:
        if self.softcap < 0 or self.z_loss < 0:
            raise ValueError(
                f"softcap and z_loss must be >= 0, got {self.softcap} and {self.z_loss}"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if not (math.isfinite(self.logit_scale) and self.logit_scale != 0):
            raise ValueError(f"logit_scale must be finite and not 0, got {self.logit_scale}")
        if self.chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes must be positive, got {self.chunk_bytes}")


class LossOutput(NamedTuple):
    """A weighted sum and its denominator, with what the same pass knew anyway.

    The four last fields are per row, fp32 (fp64 for fp64 inputs), 0 where a row is not supervised.
    Only ``loss_sum`` is differentiable.
    """

    loss_sum: Tensor  # () sum of token_weights * token_loss
    weight_sum: Tensor  # () sum of the weights of supervised rows
    token_loss: Tensor  # (T,) unweighted
    lse: Tensor  # (T,) log of the partition function
    correct: Tensor  # (T,) bool: the most likely token is the label
    entropy: Tensor  # (T,) of the predicted distribution, in nats


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: where every sum of this package is held."""
    return torch.promote_types(dtype, torch.float32)
