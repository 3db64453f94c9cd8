"""Chat: a conversation becomes tokens, roles and weights, and the weights are proven right.

One joint render, one tokenisation. The trained span of an answer runs from the end of its
generation prompt through its stop token: what the model would have sampled, no more and no less.
Where a token lies in the text is not asked of the tokenizer, whose offsets may be trimmed and
cannot split a character that two tokens share. In a byte-level BPE the bytes of the tokens, put in
a row, are the bytes of the text: checked for every conversation, and every boundary is then exact.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from varlen_sft.data.formats import Conversation, ConversationError, Message
from varlen_sft.data.layout import Layout, lay_out
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from varlen_sft.data.template import ChatTemplate

_T = TypeVar("_T")
_ASSISTANT = ROLES.index("assistant")


class ChatTokenizer:
    """A tokenizer and its chat template: conversations to samples, without transformers or torch.

    Supervision: the assistant's answers weigh 1, everything else 0. Roles: the tokens of an answer
    and its stop token are ``assistant``, those of another message's content carry its role, and
    what the template wrote around them (headers, their stop tokens, newlines) is ``none``.

    Attributes:
        special_tokens: the template's token variables, such as ``special_tokens["eos_token"]``.
        straddles_cut: how often so far a text was cut at the start of an answer because a token
            would have reached over it, part header, part answer. A model that generates never has
            such a token there either, since its prompt ends at the cut.

    Args:
        tokenizer_json: the text of a ``tokenizer.json``.
        template: the chat template.

    Raises:
        ValueError: not a byte-level BPE.
    """

    def __init__(self, tokenizer_json: str, template: ChatTemplate) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(tokenizer_json)
        state = json.loads(tokenizer_json)
        decoder = (state["decoder"] or {}).get("type")
        if decoder != "ByteLevel":
            raise ValueError(f"only byte-level BPE is supported, this tokenizer decodes {decoder}")
        # Both may be stored in tokenizer.json, and would cut or pad every row behind our back.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._tokenizer_json = tokenizer_json
        self._template = template
        self.special_tokens = dict(template.special_tokens)
        self.straddles_cut = 0
        self._token_bytes = _token_bytes(tokenizer)
        self._token_sizes = np.array([len(token) for token in self._token_bytes], dtype=np.int64)
        self._control_ids = {
            token["content"]: token["id"]
            for token in state["added_tokens"]
            if token["special"] or token["content"] in self.special_tokens.values()
        }
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> ChatTokenizer:
        """Load ``tokenizer.json`` and the chat template of a model folder.

        Raises:
            InputError: a file is missing or malformed, or the tokenizer is not a byte-level BPE.
        """
        from varlen_sft.data.template import read_template

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError("no tokenizer.json in this folder", file=folder)
        template = read_template(Path(folder))
        try:
            return cls(path.read_text(encoding="utf-8"), template)
        except Exception as error:  # tokenizers raises a bare Exception, its reason is the text
            raise InputError(f"not a tokenizer that can be used: {error}", file=path) from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of the messages; ConversationError if the template refuses them."""
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 ids of the messages and the generation prompt: what a model answers to."""
        return self._ids([self.render(messages, add_generation_prompt=True)])[0].astype(np.int32)

    def encode(self, conversation: Conversation) -> Sample:
        """One conversation of L tokens; see the class for weights and roles.

        Raises:
            ConversationError: its trained spans cannot be proven right; says why.
        """
        return self.encode_many([conversation])[0]

    def encode_many(self, conversations: Iterable[Conversation]) -> list[Sample]:
        """As encode, for many on all of the tokenizer's threads; raises for the first bad one."""
        samples = []
        for outcome in self.encode_outcomes(conversations):
            if isinstance(outcome, ConversationError):
                raise outcome
            samples.append(outcome)
        return samples

    def encode_outcomes(
        self, conversations: Iterable[Conversation]
    ) -> list[Sample | ConversationError]:
        """For each conversation, in its place, a sample or the reason why there is none."""
        layouts = [_outcome(self._lay_out, conversation) for conversation in conversations]
        ids = iter(self._ids([layout.text for layout in layouts if isinstance(layout, Layout)]))
        return [
            _outcome(self._sample, layout, next(ids)) if isinstance(layout, Layout) else layout
            for layout in layouts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; ValueError for an id it does not have."""
        pieces = []
        for token in ids:
            if not 0 <= token < len(self._token_bytes):
                raise ValueError(f"ids must be in [0, {len(self._token_bytes)}), got {token}")
            pieces.append(self._token_bytes[token])
        return b"".join(pieces).decode(errors="replace")

    def fingerprint(self) -> str:
        """sha256 over all that decides text and ids: tokenizer, template, special tokens."""
        state = [self._tokenizer_json, self._template.source, self.special_tokens]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def _lay_out(self, conversation: Conversation) -> Layout:
        return lay_out(self._template, conversation.messages, self._control)

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The fast variant keeps no offsets; they are not needed here (see the top of this file).
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def _sample(self, layout: Layout, ids: np.ndarray) -> Sample:
        edges = self._edges(ids, layout.text)
        starts = [answer.start for answer in layout.answers]
        inside = ~np.isin(_in_bytes(layout.text, starts), edges)
        if inside.any():
            ids = self._cut_ids(layout.text, np.array(starts)[inside].tolist())
            edges = self._edges(ids, layout.text)
        sample = self._weigh(layout, ids, edges)
        self.straddles_cut += int(inside.sum())
        return sample

    def _cut_ids(self, text: str, cuts: Sequence[int]) -> np.ndarray:
        """Ids of a text whose pieces between the cuts (characters) are encoded apart."""
        bounds = [0, *cuts, len(text)]
        pieces = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        return np.concatenate(self._ids(pieces))

    def _edges(self, ids: np.ndarray, text: str) -> np.ndarray:
        """(L + 1,) the byte of the text where each token begins, and the end of the last one."""
        encoded = text.encode()
        decoded = b"".join([self._token_bytes[token] for token in ids.tolist()])
        if decoded != encoded:
            at = len(os.path.commonprefix([decoded, encoded]))
            raise ConversationError(
                "the tokenizer does not keep the text: expected "
                f"{encoded[at : at + 20]!r} at byte {at}, its tokens spell "
                f"{decoded[at : at + 20]!r}"
            )
        return np.concatenate([[0], np.cumsum(self._token_sizes[ids])])

    def _weigh(self, layout: Layout, ids: np.ndarray, edges: np.ndarray) -> Sample:
        weights = np.zeros(len(ids), dtype=np.float32)
        roles = np.zeros(len(ids), dtype=np.uint8)
        for start, end, role in layout.others:
            first, last = _in_bytes(layout.text, [start, end])
            # A token belongs to a message if any byte of it does.
            roles[np.searchsorted(edges, first, "right") - 1 : np.searchsorted(edges, last)] = role
        for answer in layout.answers:
            bounds = _in_bytes(layout.text, [answer.start, answer.content_end, answer.end])
            first, stop, end = np.searchsorted(edges, bounds)
            proven = (edges[[first, stop, end]] == bounds).all() and end == stop + 1
            if not proven or ids[stop] != self._control_ids[answer.stop]:
                raise ConversationError(
                    f"the stop token {answer.stop!r} of message {answer.number} is not a token of "
                    f"its own: the answer ends in {self.decode(ids[max(0, end - 2) : end])!r}"
                )
            weights[first:end] = 1.0
            roles[first:end] = _ASSISTANT
        return Sample(ids.astype(np.int32), weights, roles)


def _outcome(step: Callable[..., _T], *arguments: Any) -> _T | ConversationError:
    try:
        return step(*arguments)
    except ConversationError as error:
        return error


def _in_bytes(text: str, places: Sequence[int]) -> np.ndarray:
    """Character places as places in the UTF-8 text."""
    if text.isascii():
        return np.array(places, dtype=np.int64)
    return np.array([len(text[:place].encode()) for place in places], dtype=np.int64)


def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes each token id stands for."""
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
