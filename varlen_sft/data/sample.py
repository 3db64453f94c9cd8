"""A tokenised conversation, before it is shifted or packed. numpy only: data workers stay small."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROLES = ("none", "system", "user", "assistant", "tool")
"""Role names; a role's id in ``Sample.roles`` is its index here."""


@dataclass(frozen=True)
class Sample:
    """One conversation (or document) of L tokens.

    ``token_weights[i]`` says how much token i counts as a *target*, so it lives in label space from
    the start: the shift by one happens later, per sample, in one function (``data.batch.shift``).

    Raises:
        ValueError: lengths differ, or a weight is negative or not finite.
    """

    input_ids: np.ndarray  # (L,) int32
    token_weights: np.ndarray  # (L,) float32
    roles: np.ndarray  # (L,) uint8, an index into ROLES

    def __post_init__(self) -> None:
        lengths = {len(self.input_ids), len(self.token_weights), len(self.roles)}
        if len(lengths) != 1:
            raise ValueError(
                "input_ids, token_weights and roles must have one length, got "
                f"{len(self.input_ids)}, {len(self.token_weights)} and {len(self.roles)}"
            )
        if not (np.isfinite(self.token_weights) & (self.token_weights >= 0)).all():
            raise ValueError("token_weights must be finite and not negative")

    def __len__(self) -> int:
        return len(self.input_ids)
