"""Where each token lies in its text.

In a byte-level BPE the bytes of the tokens, put in a row, are the bytes of the text: checked for
every text, and every place is then exact, also inside a character that several tokens share. Other
tokenizers tell offsets in characters, which may overlap there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from varlen_sft.data.conversation import ConversationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text.

    Args:
        ids: (L,) int64.
        starts, ends: (L,) int64, bytes of the UTF-8 text if ``in_bytes``, characters otherwise.
    """

    text: str
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    in_bytes: bool

    def units(self, places: Sequence[int]) -> np.ndarray:
        """Characters of the text in the units of starts and ends."""
        at = np.array(places, dtype=np.int64)
        if not self.in_bytes or self.text.isascii():
            return at
        codes = np.frombuffer(self.text.encode("utf-32-le"), dtype=np.uint32)
        sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF).astype(np.int64)
        return np.concatenate(([0], np.cumsum(sizes)))[at]

    def overlapping(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For spans [first, last) in units, the tokens [a, b) that have any of them."""
        return np.searchsorted(self.ends, first, "right"), np.searchsorted(self.starts, last)


class TextEncoder:
    """Texts to tokens and their places, on all of the tokenizer's threads.

    Args:
        tokenizer_json: the text of a ``tokenizer.json``. Truncation and padding, which it may ask
            for, are taken off: they would cut or pad every row behind our back.
    """

    def __init__(self, tokenizer_json: str) -> None:
        from tokenizers import Tokenizer, decoders

        self.tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.byte_level = isinstance(self.tokenizer.decoder, decoders.ByteLevel)
        self.token_bytes = token_bytes(self.tokenizer) if self.byte_level else []
        self._sizes = np.array([len(token) for token in self.token_bytes], dtype=np.int64)

    def encode(self, texts: Sequence[str]) -> list[Encoded | ConversationError]:
        """Each text, or the reason why its tokens cannot be placed."""
        if not self.byte_level:
            encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [self._by_offsets(t, e) for t, e in zip(texts, encodings, strict=True)]
        # The fast variant keeps no offsets, which may be trimmed and cannot split a character.
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            self.by_bytes(text, encoding.ids)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def by_bytes(self, text: str, ids: Sequence[int]) -> Encoded | ConversationError:
        """Place the tokens of a byte-level BPE, whose bytes have to be those of the text."""
        encoded = text.encode()
        decoded = b"".join(map(self.token_bytes.__getitem__, ids))
        if decoded != encoded:
            at = len(os.path.commonprefix([decoded, encoded]))
            return ConversationError(
                "the tokenizer does not keep the text: expected "
                f"{encoded[at : at + 20]!r} at byte {at}, its tokens spell "
                f"{decoded[at : at + 20]!r}"
            )
        array = np.array(ids, dtype=np.int64)
        sizes = self._sizes[array]
        ends = np.cumsum(sizes)
        return Encoded(text, array, ends - sizes, ends, True)

    def _by_offsets(self, text: str, encoding: object) -> Encoded | ConversationError:
        ids = np.array(encoding.ids, dtype=np.int64)  # type: ignore[attr-defined]
        offsets = np.array(encoding.offsets, dtype=np.int64)  # type: ignore[attr-defined]
        starts, ends = offsets.reshape(-1, 2).T
        gaps = np.append(starts, len(text)) > np.insert(np.maximum.accumulate(ends), 0, 0)
        for at in gaps.nonzero()[0].tolist():
            left = text[ends[at - 1] if at else 0 : starts[at] if at < len(starts) else len(text)]
            if left.strip():
                return ConversationError(f"the tokenizer leaves out {left[:20]!r}")
        if (np.diff(starts) < 0).any() or (np.diff(ends) < 0).any():
            return ConversationError("the tokenizer's offsets do not rise")
        return Encoded(text, ids, starts, ends, False)


def without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of the same model, which it shares, that takes added tokens for text."""
    from tokenizers import Tokenizer

    clone = Tokenizer(tokenizer.model)
    for name in ("normalizer", "pre_tokenizer"):
        if (part := getattr(tokenizer, name)) is not None:
            setattr(clone, name, part)
    return clone


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes each token id of a byte-level BPE stands for."""
    alphabet = _byte_alphabet()
    added = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = tokenizer.get_vocab()
    table = [b"\xff"] * (max(vocabulary.values()) + 1)  # never UTF-8: an id without a token
    for piece, token in vocabulary.items():
        if token in added:
            table[token] = added[token].encode()
        elif all(character in alphabet for character in piece):
            table[token] = bytes(alphabet[character] for character in piece)
    return table


def _byte_alphabet() -> dict[str, int]:
    """How a byte-level BPE writes bytes: printable as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + k): byte for k, byte in enumerate(moved)
    }
