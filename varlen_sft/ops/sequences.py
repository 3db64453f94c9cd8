"""Where sequences begin and end: from lengths, which are the truth, or from position ids."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from varlen_sft import reference
from varlen_sft.ops.backends import resolve
from varlen_sft.ops.checks import INTEGERS, require_dtype, require_shape
from varlen_sft.types import Sequences

__all__ = [
    "Sequences",
    "cu_seqlens_from_position_ids",
    "sequences_from_lengths",
    "sequences_from_position_ids",
]


def sequences_from_lengths(lengths: Iterable[int]) -> Sequences:
    """Sequences of a pack from the lengths of its samples, on the CPU.

    Args:
        lengths: tokens of each sequence, each at least 1.

    Returns:
        ``cu_seqlens`` (B + 1,) int32, ``max_seqlen`` (a Python int) and ``num_sequences`` () int32.

    Raises:
        ValueError: a length below 1, or 2^31 tokens or more.
    """
    lengths = [int(length) for length in lengths]
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths must be at least 1, got {length} at index {index}")
    if sum(lengths) >= 2**31:
        raise ValueError(f"lengths must sum to less than 2^31 tokens, got {sum(lengths)}")
    return reference.sequences_from_lengths(lengths)


def sequences_from_position_ids(
    position_ids: Tensor,  # (T,) int32 or int64
    *,
    capacity: int | None = None,
    max_seqlen: int | None = None,
    impl: str | None = None,
) -> Sequences:
    """Sequences of a batch that was made elsewhere.

    A new sequence starts where ``position_ids[i] != position_ids[i-1] + 1``. The rule cannot see an
    edge where a chunk happens to continue its predecessor's count; build from lengths where you
    can.

    Args:
        position_ids: position of each token in its sequence.
        capacity: the most sequences there can be. ``cu_seqlens`` then has capacity + 1 entries,
            padded with T, and nothing waits for the device. Without it the result has the true
            size, which costs one wait on a device.
        max_seqlen: an upper bound that the caller knows. Without it the true length is used, or,
            with ``capacity`` on a device, T.
        impl: None, "cuda", "cpp" or "reference".

    Raises:
        TypeError: position_ids are not int32 or int64.
        ValueError: not one axis, 2^31 tokens or more, more sequences than ``capacity``, or a
            sequence longer than ``max_seqlen``. On a device the two last are asserted there
            instead.
    """
    require_dtype("position_ids", position_ids, INTEGERS)
    require_shape("position_ids", position_ids, "T", None)
    total = position_ids.shape[0]
    if total >= 2**31:
        raise ValueError(f"position_ids must have less than 2^31 tokens, got {total}")
    impl = resolve("sequences", impl, position_ids.device)
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    if capacity is None:
        sequences = _of_true_size(position_ids, impl)
        if max_seqlen is None:
            return sequences
        _check(sequences.max_seqlen <= max_seqlen, max_seqlen, sequences.max_seqlen)
        return sequences._replace(max_seqlen=max_seqlen)

    cu_seqlens, count, longest = torch.ops.varlen_sft.sequences(position_ids, capacity, impl)
    if position_ids.device.type == "cpu":
        if int(count) > capacity:
            raise ValueError(f"capacity must hold every sequence, got {capacity} for {int(count)}")
        _check(max_seqlen is None or int(longest) <= max_seqlen, max_seqlen, int(longest))
        return Sequences(cu_seqlens, int(longest) if max_seqlen is None else max_seqlen, count)
    torch._assert_async(count <= capacity, "position_ids hold more sequences than capacity")
    if max_seqlen is not None:
        torch._assert_async(longest <= max_seqlen, "a sequence is longer than max_seqlen")
    return Sequences(cu_seqlens, total if max_seqlen is None else max_seqlen, count)


def cu_seqlens_from_position_ids(position_ids: Tensor) -> tuple[Tensor, int]:
    """What ``flash_attn_varlen_func`` takes: ``cu_seqlens`` (B + 1,) int32 and ``max_seqlen``.

    Waits for the device once. Same rule and errors as ``sequences_from_position_ids``.
    """
    sequences = sequences_from_position_ids(position_ids)
    return sequences.cu_seqlens, sequences.max_seqlen


def _check(fits: bool, bound: int | None, longest: int) -> None:
    if not fits:
        raise ValueError(
            f"max_seqlen must be at least the longest sequence, {longest}, got {bound}"
        )


def _of_true_size(position_ids: Tensor, impl: str) -> Sequences:
    if impl == "reference":
        return reference.sequences_from_position_ids(position_ids)
    # Enough for chats, in a fraction of the memory of the ids; shorter sequences take a second run.
    capacity = position_ids.shape[0] // 32 + 1
    cu_seqlens, count, longest = torch.ops.varlen_sft.sequences(position_ids, capacity, impl)
    found, max_seqlen = torch.stack([count, longest]).tolist()  # the one wait
    if found > capacity:
        cu_seqlens = torch.ops.varlen_sft.sequences(position_ids, found, impl)[0]
    return Sequences(cu_seqlens[: found + 1].clone(), max_seqlen, count)


@torch.library.custom_op("varlen_sft::sequences", mutates_args=())
def _sequences(position_ids: Tensor, capacity: int, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """cu_seqlens (capacity + 1,), and of all sequences, also where it cannot hold them, the count
    () and the longest length (): no data-dependent shape."""
    if impl == "reference":
        return _sequences_in_torch(position_ids, capacity)
    cu_seqlens, count, longest = _empty_sequences(position_ids, capacity)
    # A strided view is copied: it is read once, and nothing that makes packs makes one.
    torch.ops.varlen_sft_c.sequences(cu_seqlens, count, longest, position_ids.contiguous())
    return cu_seqlens, count, longest


def _sequences_in_torch(position_ids: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    total = position_ids.shape[0]
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[1:] = position_ids[1:] != position_ids[:-1] + 1
    size = max(total, capacity) + 1
    # Tokens that start nothing are written to a slot that is cut off.
    slot = torch.where(starts, starts.cumsum(0) - 1, size)
    edges = position_ids.new_full((size + 1,), total, dtype=torch.int64)
    edges = edges.scatter_(0, slot, torch.arange(total, device=position_ids.device))[:size]
    longest = edges.diff().max()
    return edges[: capacity + 1].int(), starts.sum().int(), longest.int()


def _empty_sequences(position_ids: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    def new(*shape: int) -> Tensor:
        return position_ids.new_empty(shape, dtype=torch.int32)

    return new(capacity + 1), new(), new()


@_sequences.register_fake
def _(position_ids, capacity, impl):
    return _empty_sequences(position_ids, capacity)
