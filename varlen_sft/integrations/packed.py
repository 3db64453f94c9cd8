"""What one call of a Hugging Face model says about its pack, read once and handed to every layer.

HF's names (``cu_seq_lens_q``, ``max_length_q``, ``shift_labels``) end here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from varlen_sft.data.batch import PackedBatch
from varlen_sft.integrations.exact import require_exact
from varlen_sft.ops.checks import INTEGERS, require_dtype, require_shape
from varlen_sft.ops.sequences import sequences_from_position_ids
from varlen_sft.types import Sequences

__all__ = ["FLASH_KEYS", "ROWS", "Packed", "require_that"]

FLASH_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keywords by which HF's FlashAttention learns of packs; all four or none."""

ROWS = "rows"
"""Our own keyword for the supervised rows, (S,) int64, padded with -1."""


class Packed:
    """The pack of one call, without a batch axis.

    No tuple and no dataclass: FSDP's mixed precision casts what it finds in those, and would round
    the weights with the hidden states.

    Args:
        sequences: where the sequences begin and end.
        position_ids: (T,) int64 or int32.
        rows: (S,) int64, supervised rows, padded with -1.
        labels: (T,) int64, the target of each row, already shifted.
        token_weights: (T,) fp32.
    """

    def __init__(
        self,
        sequences: Sequences,
        position_ids: Tensor,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> None:
        self.sequences, self.position_ids = sequences, position_ids
        self.rows, self.labels, self.token_weights = rows, labels, token_weights

    @classmethod
    def from_batch(cls, batch: PackedBatch) -> Packed:
        """Of a batch that our own ``collate`` made."""
        return cls(
            batch.sequences, batch.position_ids, batch.rows, batch.labels, batch.token_weights
        )

    @classmethod
    def from_call(cls, kwargs: Mapping[str, Any]) -> Packed | None:
        """Of the keywords of a call of ``model(...)``; None if they speak of no pack.

        In this order: our own ``packed=``; the four flash keywords; ``position_ids`` (1, T) that
        start anew somewhere, if there is neither mask nor cache. The last waits for the device
        once. Position ids that are missing beside flash keywords come from the lengths. Edges that
        lie on a device are checked there, by an assertion that nothing waits for.

        Raises:
            TypeError: ``max_length_q`` is no Python int, or a tensor has a wrong dtype.
            ValueError: keywords that contradict each other, more than one row, a mask with zeros
                (or one of four axes) beside a pack, a cache beside a pack.
        """
        packed = kwargs.get("packed")
        if packed is None:
            packed = _from_flash(kwargs) or _from_position_ids(kwargs)
        elif not isinstance(packed, cls):
            raise TypeError(f"packed must be a Packed, got {type(packed).__name__}")
        if packed is not None:
            _check_beside(kwargs, packed.position_ids.shape[0])
        return packed

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """The same on another device, as layers spread over several need it."""
        if self.position_ids.device == torch.device(device):
            return self

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if torch.is_tensor(value) else value

        others = (self.position_ids, self.rows, self.labels, self.token_weights)
        return Packed(Sequences(*map(move, self.sequences)), *map(move, others))


def _from_flash(kwargs: Mapping[str, Any]) -> Packed | None:
    given = [key for key in FLASH_KEYS if kwargs.get(key) is not None]
    if not given:
        return None
    missing = [key for key in FLASH_KEYS if key not in given]
    if missing:
        raise ValueError(f"{', '.join(given)} must come with {', '.join(missing)}")
    edges, total = _edges(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]), _total(kwargs)
    longest = _longest(kwargs)
    _require_cover(edges, longest, total)
    count = torch.full((), edges.shape[0] - 1, dtype=torch.int32, device=edges.device)
    position_ids = kwargs.get("position_ids")
    ids = _positions(edges, total) if position_ids is None else _row("position_ids", position_ids)
    return Packed(Sequences(edges, longest, count), ids, *_targets(kwargs))


def _longest(kwargs: Mapping[str, Any]) -> int:
    for key in FLASH_KEYS[2:]:
        if not isinstance(kwargs[key], int):
            raise TypeError(f"{key} must be a Python int, got {type(kwargs[key]).__name__}")
    longest, longest_k = kwargs["max_length_q"], kwargs["max_length_k"]
    if longest != longest_k:
        raise ValueError(f"max_length_q and max_length_k must be equal, got {longest}, {longest_k}")
    return longest


def _require_cover(edges: Tensor, longest: int, total: int) -> None:
    """Edges rise from 0 to T, and no sequence is longer than it is said."""
    lengths = edges.diff()
    rises = (edges[0] == 0) & (edges[-1] == total) & (lengths >= 0).all()
    require_that(rises, f"cu_seq_lens_q must rise from 0 to T={total}", edges.tolist)
    covers = lengths.max() <= longest
    message = "max_length_q must be the longest sequence of cu_seq_lens_q, or more"
    require_that(covers, message, lambda: f"{longest} for {lengths.tolist()}")


def require_that(fits: Tensor, message: str, got: Callable[[], object]) -> None:
    """ValueError where the host knows ``fits``, () bool; elsewhere an assertion on the device, for
    which nothing waits."""
    if not _on_host(fits):
        torch._assert_async(fits, message)
    elif not fits:
        raise ValueError(f"{message}, got {got()}")


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _edges(q: Tensor, k: Tensor) -> Tensor:
    for key, value in (("cu_seq_lens_q", q), ("cu_seq_lens_k", k)):
        require_dtype(key, value, (torch.int32,))
        require_shape(key, value, "B+1", None if value is q else q.shape[0])
    if q is not k:
        message = "cu_seq_lens_q and cu_seq_lens_k must be equal"
        require_that((q == k).all(), message, lambda: f"{q.tolist()} and {k.tolist()}")
    return q


def _positions(edges: Tensor, total: int) -> Tensor:
    """0, 1, 2, ... anew in every sequence; output_size spares a wait for the device."""
    lengths = edges.diff().long()
    starts = edges[:-1].long().repeat_interleave(lengths, output_size=total)
    return torch.arange(total, device=edges.device) - starts


def _from_position_ids(kwargs: Mapping[str, Any]) -> Packed | None:
    position_ids = kwargs.get("position_ids")
    others = (kwargs.get("attention_mask"), kwargs.get("past_key_values"))
    if position_ids is None or any(other is not None for other in others):
        return None
    if position_ids.dim() != 2 or position_ids.shape[0] != 1 or _batch_size(kwargs) != 1:
        return None
    sequences = sequences_from_position_ids(position_ids[0])
    if sequences.cu_seqlens.shape[0] == 2:
        return None
    return Packed(sequences, position_ids[0], *_targets(kwargs))


def _targets(kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Supervised rows, labels and weights, as far as they are there."""
    labels, weights = kwargs.get("shift_labels"), kwargs.get("shift_weights")
    if torch.is_tensor(weights):
        require_exact("shift_weights", weights)
    return (
        kwargs.get(ROWS),
        None if labels is None else _row("shift_labels", labels),
        None if weights is None else _row("shift_weights", weights, (torch.float32,)),
    )


def _row(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...] = INTEGERS) -> Tensor:
    require_dtype(name, value, dtypes)
    require_shape(name, value, "rows T", 1, None)
    return value[0]


def _input(kwargs: Mapping[str, Any]) -> Tensor | None:
    ids = kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def _batch_size(kwargs: Mapping[str, Any]) -> int:
    inputs = _input(kwargs)
    return 1 if inputs is None else inputs.shape[0]


def _total(kwargs: Mapping[str, Any]) -> int:
    inputs = _input(kwargs)
    if inputs is None:
        raise ValueError("input_ids or inputs_embeds must come with the edges of a pack")
    return inputs.shape[1]


def _check_beside(kwargs: Mapping[str, Any], total: int) -> None:
    """What else the call says must fit one row of T tokens that nothing precedes."""
    inputs = _input(kwargs)
    if inputs is not None and tuple(inputs.shape[:2]) != (1, total):
        raise ValueError(
            f"a pack is one row: input_ids must have shape (1, T={total}), "
            f"got {tuple(inputs.shape[:2])}"
        )
    if kwargs.get("past_key_values") is not None:
        raise ValueError("past_key_values must be None beside a pack: it cannot be decoded from")
    mask = kwargs.get("attention_mask")
    if mask is None:
        return
    if not torch.is_tensor(mask) or mask.shape != (1, total):
        got = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise ValueError(f"attention_mask beside a pack must be None or (1, T={total}), got {got}")
    if not bool(mask.all()):
        raise ValueError(
            "attention_mask must not have zeros beside a pack: a pack holds no padding that a "
            "mask could hide (pad tokens at its end are a sequence of their own)"
        )
