"""Rows of token ids made elsewhere, with labels or a mask that say what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from varlen_sft.data.conversation import ConversationError, Tokens, kind_of

MASKS = ("labels", "loss_mask", "assistant_masks")
MAX_ID = 2**31 - 1
_UNMASKED = {"pretrain": "trains all tokens", "search": "finds the answers itself"}


def read_tokens(
    row: Mapping[str, Any], mode: str | None = None, mask_token_ids: Sequence[int] = ()
) -> Tokens:
    """Tokens of a row of ``input_ids``.

    Masks lie in token space, entry i speaks of token i as a target: ``labels`` as Hugging Face has
    them, ``labels[i] == input_ids[i]`` or -100, not shifted; ``loss_mask``, numbers that weigh the
    tokens; ``assistant_masks``, 0 or 1. Of several masks, all must train the same tokens, and the
    weights are their product. Never trained are ``mask_spans``, ``[start, end)`` pairs, and the ids
    in ``mask_token_ids``, of the row or the argument: image tokens, for example.

    A row is one sample: ``attention_mask`` must be all 1, ``position_ids`` 0 to L - 1, and
    ``seq_lengths`` the one length L, where they are given.

    Args:
        row: the row.
        mode: ``"pretrain"`` trains every token, ``"search"`` the answers that the tokenizer finds;
            otherwise there must be a mask.
        mask_token_ids: see above.

    Raises:
        ConversationError: none of the masks, masks that contradict, other lengths or types, ids
            that are no int32, labels that look shifted, a row that is padded or a pack.
    """
    ids = _integers("input_ids", row["input_ids"])
    if not len(ids):
        raise ConversationError("'input_ids' is empty")
    if int(ids.max()) > MAX_ID:
        raise ConversationError(f"token {int(ids.argmax())} has the id {ids.max()} > {MAX_ID}")
    _check_whole(row, len(ids))
    weights = _weights(row, ids, mode)
    for start, end in _spans(row.get("mask_spans"), len(ids)):
        weights[start:end] = 0
    for never in (row.get("mask_token_ids", []), list(mask_token_ids)):
        weights[np.isin(ids, _integers("mask_token_ids", never))] = 0
    return Tokens(ids.astype(np.int32), weights, mode == "search")


def _weights(row: Mapping[str, Any], ids: np.ndarray, mode: str | None) -> np.ndarray:
    given = [name for name in MASKS if row.get(name) is not None]
    if mode in _UNMASKED:
        if given:
            raise ConversationError(
                f"the row has {given[0]!r}, and the source is '{mode}:', which {_UNMASKED[mode]}"
            )
        return np.ones(len(ids), dtype=np.float32)
    if not given:
        raise ConversationError(
            "input_ids without labels, loss_mask or assistant_masks, so what is trained is not "
            "known ('pretrain:' before the source trains every token, 'search:' what lies between "
            "the headers of answers and their stop tokens)"
        )
    masks = [_READERS[name](name, row[name], ids) for name in given]
    for name, mask in zip(given[1:], masks[1:], strict=True):
        differ = (mask != 0) != (masks[0] != 0)
        if differ.any():
            raise ConversationError(
                f"{given[0]!r} and {name!r} disagree on whether token {int(differ.argmax())} is "
                "trained"
            )
    return np.prod(masks, axis=0, dtype=np.float32)


def _labels(name: str, value: object, ids: np.ndarray) -> np.ndarray:
    labels = _integers(name, value)
    _check_length(name, labels, ids)
    trained = labels != -100
    wrong = trained & (labels != ids)
    if not wrong.any():
        return trained.astype(np.float32)
    shifted = trained[:-1] & (labels[:-1] != ids[1:])
    if not shifted.any() and len(ids) > 1:
        raise ConversationError(
            "the labels look already shifted, labels[i] == input_ids[i + 1]; expected Hugging "
            "Face's convention, labels[i] == input_ids[i] or -100"
        )
    at = int(wrong.argmax())
    raise ConversationError(
        f"labels[{at}] must be input_ids[{at}] = {ids[at]} or -100, got {labels[at]}"
    )


def _loss_mask(name: str, value: object, ids: np.ndarray) -> np.ndarray:
    mask = _array(name, value, "biuf", "numbers")
    _check_length(name, mask, ids)
    return mask.astype(np.float32)


def _binary_mask(name: str, value: object, ids: np.ndarray) -> np.ndarray:
    mask = _loss_mask(name, value, ids)
    bad = (mask != 0) & (mask != 1)
    if bad.any():
        at = int(bad.argmax())
        raise ConversationError(f"{name}[{at}] must be 0 or 1, got {mask[at]:g}")
    return mask


_READERS = {"labels": _labels, "loss_mask": _loss_mask, "assistant_masks": _binary_mask}


def _check_length(name: str, mask: np.ndarray, ids: np.ndarray) -> None:
    if len(mask) != len(ids):
        raise ConversationError(f"{len(ids)} input_ids, but {len(mask)} {name}")


def _check_whole(row: Mapping[str, Any], length: int) -> None:
    """A padded row or a pack would train across samples, or on padding."""
    expected = {
        "attention_mask": (np.ones(length), "all 1: take the padding off the row"),
        "position_ids": (np.arange(length), "0 to L - 1: a row is one sample, not a pack"),
        "seq_lengths": (np.array([length]), "the one length L: a row is one sample, not a pack"),
    }
    for name, (wanted, words) in expected.items():
        if row.get(name) is not None and not np.array_equal(_integers(name, row[name]), wanted):
            raise ConversationError(f"{name} must be {words}")


def _spans(value: object, length: int) -> Iterable[tuple[int, int]]:
    if value is None:
        return
    if not isinstance(value, (list, tuple)):
        raise ConversationError(f"'mask_spans' must be a list of pairs, got {kind_of(value)}")
    for number, pair in enumerate(value, 1):
        span = _integers(f"span {number} of mask_spans", pair)
        if len(span) != 2 or not 0 <= span[0] <= span[1] <= length:
            raise ConversationError(
                f"span {number} of mask_spans must be a [start, end) in {length} tokens, got "
                f"{span.tolist()}"
            )
        yield int(span[0]), int(span[1])


def _integers(name: str, value: object) -> np.ndarray:
    return _array(name, value, "iu", "integers").astype(np.int64)


def _array(name: str, value: object, kinds: str, words: str) -> np.ndarray:
    """(N,) of a list or an array whose dtype is of one of numpy's kinds."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise ConversationError(f"{name!r} must be a list of {words}, got {kind_of(value)}")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists of different lengths; integers beyond 64 bits
        array = np.asarray(None)
    if array.shape == (0,):
        return np.zeros(0)
    if array.ndim != 1 or array.dtype.kind not in kinds:
        found = "" if array.ndim == 0 else f", got {array.dtype} of shape {array.shape}"
        raise ConversationError(f"{name!r} must be a flat list of {words}{found}")
    if array.dtype.kind == "u" and int(array.max()) > np.iinfo(np.int64).max:
        raise ConversationError(f"{name!r} has an entry beyond 64 bits, {array.max()}")
    return array
