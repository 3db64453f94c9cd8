"""Documents of tokens followed by a mask, as Megatron's readers for fine-tuning take them.

A document of L tokens has 2 L entries: the tokens, then 0 or 1 for each of their *labels*. Entry i
goes with label i, which is token i + 1; the last has no label and is 0. So does
``ApertusSFTDataset`` of swiss-ai/Megatron-LM read them (its ``--ap-sft-load-loss-mask``): it shifts
the tokens to labels, over the edges of packed documents too, and takes the mask as it is. With a
mask of tokens it would train the token after each that is meant, and the first of a next document.
"""

from __future__ import annotations

import numpy as np

from varlen_sft.errors import InputError


def with_mask(lengths: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Documents in a row, each its tokens and then its mask.

    Args:
        lengths: (n,) tokens of each document, 1 or more.
        ids: (T,) of all of them.
        weights: (T,) of the tokens as targets, 0 or 1; that of a first token, which is no target,
            has no place in a mask.

    Returns:
        (2 T,), of the dtype of ids.

    Raises:
        InputError: another weight.
    """
    bad = (weights != 0) & (weights != 1)
    if bad.any():
        raise InputError(
            f"the layout tokens+mask holds weights of 0 and 1 only, a token weighs "
            f"{weights[int(bad.argmax())]:g}: take the layout sidecar"
        )
    ends = np.cumsum(lengths)
    mask = np.append(weights[1:], 0).astype(ids.dtype)
    mask[ends - 1] = 0  # what follows is the next document's
    pieces = [
        half[end - length : end]
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
        for half in (ids, mask)
    ]
    return np.concatenate(pieces) if pieces else ids


def weights_of(mask: np.ndarray) -> np.ndarray:
    """A mask of labels, (L,), as weights of the tokens: entry i becomes entry i + 1."""
    return np.append(0, mask[:-1])[: len(mask)].astype(mask.dtype)


def split_masked(document: np.ndarray) -> dict[str, np.ndarray]:
    """A document, (2 L,), as ``input_ids`` and the ``loss_mask`` of the tokens, both (L,).

    Raises:
        InputError: it is not tokens and as many entries of 0 or 1; its mask ends in 1 (and is not 1
            everywhere, which means the same either way), so that it may be one of tokens.
    """
    half = len(document) // 2
    ids, mask = document[:half], document[half:]
    if len(document) % 2 or (half and not 0 <= mask.min() <= mask.max() <= 1):
        raise InputError(
            "expected tokens and as many mask entries, 0 or 1 ('sft:' reads documents so), "
            f"got {len(document)} entries that are not"
        )
    if half and mask[-1] and not mask.all():
        raise InputError(
            "the mask ends in 1, where no label follows: 'sft:' takes entry i for token i + 1, as "
            "Megatron's readers do, and this mask may be of the tokens themselves. Shift it by "
            "one, or end it in 0 if it is not; or give the rows as JSON lines, where the loss_mask "
            "of input_ids is of tokens"
        )
    return {"input_ids": ids, "loss_mask": weights_of(mask)}
