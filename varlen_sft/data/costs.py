"""What a pack costs: work in proportion to its tokens, and to the squares of its samples' lengths.

One token of a layer takes part in 2 FLOPs per weight of its matrices: 2CHD for the queries and as
much for the output, 2CKD for keys and for values, 6CI for the three matrices of the MLP. One pair
of a query and a key it sees takes 4HD: 2D per head for the score, 2D to add up the value. A causal
sample of l tokens has l (l + 1) / 2 pairs. So a layer's forward pass takes

    4CD (H + K) T + 6CI T + 2HD sum(l^2 + l),

and the head 2CV per row whose loss is wanted. The backward pass makes two products where the
forward pass made one, 3 times as much in all. What an implementation computes again is not counted,
nor are norms, activations and look-ups.

Sources: Kaplan et al. 2020 (arXiv:2001.08361, section 2.1, 2 FLOPs per weight and token, backward
twice the forward); Narayanan et al. 2021 (arXiv:2104.04473, appendix, attention and head written
out); Dao 2023 (arXiv:2307.08691, section 4.1, half of the square for a causal mask).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from varlen_sft.data.packs import Packs
from varlen_sft.errors import InputError

__all__ = ["Flops", "ModelSizes", "pack_costs", "training_flops"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "olmo2")
"""model_type of models whose layers have the matrices above, and no others."""

BACKWARD = 3  # forward and backward together, in forward passes


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a Llama that decide its cost; a ``LlamaConfig`` has them under these names."""

    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # I
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        """From anything that has the sizes as attributes."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> ModelSizes:
        """From the config.json of a HF folder, of any family whose layers have these matrices.

        Raises:
            InputError: no such file, not JSON, another family, sliding windows, or a size that is
                missing.
        """
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            family = config["model_type"]
            if family not in FAMILIES:
                raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, is {family!r}")
            if config.get("sliding_window") and config.get("use_sliding_window", True):
                raise ValueError("costs of sliding windows are not known here")
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=hidden,
                intermediate_size=config["intermediate_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
            )
        except KeyError as error:
            raise InputError(f"{error} is missing", file=path) from None
        except (OSError, TypeError, ValueError) as error:
            raise InputError(f"cannot be read: {error}", file=path) from None

    @property
    def per_token(self) -> int:
        """FLOPs of all layers' matrices for one token, forward."""
        attention = 4 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 6 * self.hidden_size * self.intermediate_size)

    @property
    def per_square(self) -> int:
        """FLOPs of all layers' attention for each unit of l^2 + l, forward."""
        return self.num_layers * 2 * self.num_heads * self.head_dim

    @property
    def a(self) -> int:
        """The a of cost = a T + sum l^2: what a token costs in units of ``per_square``, rounded.

        (2 C (H + K) + 3 C I / D) / H + 1. Llama 3.2 1B: 29697; Llama 3.1 8B: 53249.
        """
        return round(self.per_token / self.per_square) + 1


@dataclass(frozen=True)
class Flops:
    """Model FLOPs of training, forward and backward."""

    layers: int  # matrices of the layers: in proportion to tokens
    attention: int  # in proportion to sum l^2 + l
    head: int  # in proportion to supervised tokens

    total = property(lambda self: self.layers + self.attention + self.head)

    def to_dict(self) -> Mapping[str, int]:
        return asdict(self) | {"total": self.total}


def training_flops(sizes: ModelSizes, tokens: int, squares: int, supervised: int) -> Flops:
    """FLOPs of one forward and backward pass.

    Args:
        tokens: T, rows of the packs.
        squares: sum over the samples of l^2, of the same rows.
        supervised: S, the rows whose loss is computed; the head runs on no others.
    """
    return Flops(
        layers=BACKWARD * sizes.per_token * tokens,
        attention=BACKWARD * sizes.per_square * (squares + tokens),
        head=BACKWARD * 2 * sizes.hidden_size * sizes.vocab_size * supervised,
    )


def pack_costs(packs: Packs, lengths: np.ndarray, a: int) -> np.ndarray:
    """(P,) int64: a T + sum l^2 of each pack, exact.

    Args:
        lengths: (N,) integers, by sample id.
        a: see ``ModelSizes.a``.
    """
    return a * packs.sums(lengths) + packs.sums(lengths, power=2)
