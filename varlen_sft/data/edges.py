"""Where each token lies in its text.

In a byte-level BPE the bytes of the tokens, put in a row, are the bytes of the text: checked for
every text, and every place is then exact, also inside a character that several tokens share. Other
tokenizers tell offsets in characters, which may overlap there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from varlen_sft.data.conversation import ConversationError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_MOST_CHARACTERS = 100_000
"""What is checked at once; it needs some 30 bytes for each."""


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

    def unit_table(self) -> np.ndarray | None:
        """(characters + 1,) where each character begins, in units; None if a unit is one."""
        if not self.in_bytes or self.text.isascii():
            return None
        codes = np.frombuffer(self.text.encode("utf-32-le"), dtype=np.uint32)
        sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF).astype(np.int64)
        return np.concatenate(([0], np.cumsum(sizes)))

    def units(self, places: Sequence[int]) -> np.ndarray:
        """Characters of the text in the units of starts and ends."""
        at = np.array(places, dtype=np.int64)
        table = self.unit_table()
        return at if table is None else table[at]


class TextEncoder:
    """Texts to tokens and their places, on all of the tokenizer's threads.

    Args:
        tokenizer_json: a ``tokenizer.json``, as text or as the bytes of the file. Truncation and
            padding, which it may ask for, are taken off: they would cut or pad every row behind our
            back.
    """

    def __init__(self, tokenizer_json: str | bytes) -> None:
        from tokenizers import Tokenizer, decoders

        data = tokenizer_json.encode() if isinstance(tokenizer_json, str) else tokenizer_json
        self.tokenizer: Tokenizer = Tokenizer.from_buffer(data)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.byte_level = isinstance(self.tokenizer.decoder, decoders.ByteLevel)
        self.token_bytes = token_bytes(self.tokenizer) if self.byte_level else []
        self._sizes = np.array([len(token) for token in self.token_bytes], dtype=np.int64)
        self._begins = np.cumsum(self._sizes) - self._sizes
        self._blob = np.frombuffer(b"".join(self.token_bytes), dtype=np.uint8)

    def encode(self, texts: Sequence[str]) -> list[Encoded | ConversationError]:
        """Each text, or the reason why its tokens cannot be placed."""
        if not self.byte_level:
            encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [self._by_offsets(t, e) for t, e in zip(texts, encodings, strict=True)]
        # The fast variant keeps no offsets, which may be trimmed and cannot split a character.
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        found: list[Encoded | ConversationError] = []
        for first, last in _groups(texts):
            found += self._all_by_bytes(texts[first:last], ids[first:last])
        return found

    def _all_by_bytes(
        self, texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> list[Encoded | ConversationError]:
        """As ``by_bytes``, for many at once: the check costs a fifth of what it costs alone."""
        encoded = [text.encode() for text in texts]
        at = np.cumsum([0, *map(len, ids)])
        flat = np.fromiter(chain.from_iterable(ids), np.int64, at[-1])
        sizes = self._sizes[flat]
        ends = np.concatenate(([0], np.cumsum(sizes)))
        begins = np.cumsum([0, *map(len, encoded)])
        spelled = np.repeat(self._begins[flat] - ends[:-1], sizes) + np.arange(ends[-1])
        if not np.array_equal(ends[at], begins) or self._blob[spelled].tobytes() != b"".join(
            encoded
        ):
            return [self.by_bytes(*pair) for pair in zip(texts, ids, strict=True)]
        starts, ends = ends[:-1], ends[1:]
        moved = np.repeat(begins[:-1], np.diff(at))
        starts, ends = starts - moved, ends - moved
        spans = zip(texts, at.tolist(), at[1:].tolist(), strict=False)
        return [Encoded(t, flat[a:b], starts[a:b], ends[a:b], True) for t, a, b in spans]

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


def _groups(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Neighbours [first, last) of so many characters at most, or one text alone."""
    first = size = 0
    for k, text in enumerate(texts):
        if k > first and size + len(text) > _MOST_CHARACTERS:
            yield first, k
            first, size = k, 0
        size += len(text)
    if texts:
        yield first, len(texts)


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
