"""Control tokens, and texts that spell one without meaning it.

What a template writes is control; what came with the data is text, whatever it looks like. A user
who types ``<|im_end|>`` ends nothing. In an answer the tokens that are not special, such as the
markers of thinking and tool calls, stay tokens: a model writes them itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from varlen_sft.data.conversation import Conversation, ConversationError, strings_in
from varlen_sft.data.edges import Encoded, TextEncoder, without_added_tokens
from varlen_sft.data.placed import Layout
from varlen_sft.data.spans import Spans

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Spelled:
    """Content that spells a control token, from message ``number``."""

    number: int
    token: str
    in_answer: bool

    def error(self) -> ConversationError:
        return ConversationError(
            f"the content of message {self.number} spells the control token {self.token!r}"
        )


class ControlTokens:
    """The added tokens of a tokenizer.

    Attributes:
        ids: token ids by their text.
        special: the texts of those that no user and no model writes as text.
        pattern: finds special ones, the longest first.
    """

    def __init__(self, special_tokens: Mapping[str, str], encoder: TextEncoder) -> None:
        added = encoder.tokenizer.get_added_tokens_decoder()
        self._encoder = encoder
        self.ids = {token.content: id for id, token in added.items()}
        named = set(special_tokens.values())
        self.special = {t.content for t in added.values() if t.special or t.content in named}
        self.pattern = _longest_first(self.special)
        self._any = _longest_first(self.ids)
        self._plain = _longest_first(set(self.ids) - self.special)
        self._eats = {t.content for t in added.values() if t.lstrip or t.rstrip or t.single_word}
        size = 1 + max([*self.ids.values(), encoder.tokenizer.get_vocab_size() - 1])
        self.flags = np.zeros((2, size), dtype=bool)  # added at all, special
        self.flags[0, list(self.ids.values())] = True
        self.flags[1, [self.ids[text] for text in self.special]] = True
        self._texts = {id: text for text, id in self.ids.items()}
        self._without: Tokenizer | None = None

    def spelled(self, spans: Spans) -> Iterator[tuple[int, Spelled]]:
        """Control tokens that have a character of what the data wrote, each with its row."""
        at = self.flags[0, spans.ids].nonzero()[0]
        owned = spans.owned
        if not len(at) or not len(owned.start):
            return
        # The last owned string that begins before the token ends; strings do not overlap.
        near = np.searchsorted(owned.start, spans.ends[at]) - 1
        hit = (near >= 0) & (owned.end[near] > spans.starts[at])
        if not hit.any():
            return
        answers = set(zip(spans.answers.row.tolist(), spans.answers.number.tolist(), strict=True))
        for token, k in zip(spans.ids[at[hit]].tolist(), near[hit].tolist(), strict=True):
            row, number, text = int(owned.row[k]), int(owned.number[k]), self._texts[token]
            in_answer = (row, number) in answers
            if not in_answer or text in self.special:
                yield row, Spelled(number, text, in_answer)

    def check_settings(self, conversation: Conversation) -> None:
        """Raise ConversationError if what is not marked spells a control token.

        That is tools, template variables, other fields of messages, and of tool calls all but the
        values of their arguments: in a render they cannot be told from the template's own text.
        """
        for name in ("tools", "template_kwargs"):
            if not (given := getattr(conversation, name)):
                continue
            for text in strings_in(given):
                if found := self._any.search(text):
                    raise ConversationError(f"{name} spell the control token {found.group()!r}")
        for number, message in enumerate(conversation.messages, 1):
            if not message.extra and not message.tool_calls:
                continue
            unmarked = [*strings_in(message.extra), *_unmarked(message.tool_calls)]
            pattern = self.pattern if message.role == "assistant" else self._any
            if found := pattern.search("\n".join(unmarked)):
                raise ConversationError(
                    f"a field or an argument's name of message {number} spells the control token "
                    f"{found.group()!r}"
                )

    def encode_as_text(self, layout: Layout, cuts: Sequence[int] = ()) -> Encoded:
        """The tokens of a render in which only what the template wrote can be control.

        Args:
            layout: the render and what of it came with the data.
            cuts: characters that no token may reach over.

        Raises:
            ConversationError: this tokenizer cannot do it exactly.
        """
        if not self._encoder.byte_level:
            raise ConversationError("only a byte-level BPE can keep control tokens apart from text")
        controls = list(self._controls(layout))
        pieces: list[str | int] = []
        for (start, end), next_start in _between(controls, cuts, len(layout.text)):
            text = layout.text[start:end]
            if text in self._eats:
                raise ConversationError(f"the control token {text!r} takes in what is beside it")
            if end > start:
                pieces.append(self.ids[text])
            if next_start > end:
                pieces.append(layout.text[end:next_start])
        ids = iter(self._plain_ids([piece for piece in pieces if isinstance(piece, str)]))
        parts = [[piece] if isinstance(piece, int) else next(ids) for piece in pieces]
        encoded = self._encoder.by_bytes(layout.text, [token for part in parts for token in part])
        if isinstance(encoded, ConversationError):
            raise encoded
        return encoded

    def _controls(self, layout: Layout) -> Iterator[tuple[int, int]]:
        """Where the template wrote added tokens, and answers wrote such that are not special."""
        answers = {answer.number for answer in layout.answers}
        at = 0
        for start, end, number in (*layout.owned, (len(layout.text), len(layout.text), 0)):
            yield from (m.span() for m in self._any.finditer(layout.text, at, start))
            if number in answers:
                yield from (m.span() for m in self._plain.finditer(layout.text, start, end))
            at = end

    def plain_ids(self, text: str) -> list[int]:
        """The ids of a text without a control token, whatever it spells.

        Raises:
            ConversationError: this tokenizer cannot do it exactly.
        """
        (encoded,) = self._encoder.encode([text])
        if isinstance(encoded, ConversationError):
            raise encoded
        if not self.flags[0, encoded.ids].any():
            return encoded.ids.tolist()
        if not self._encoder.byte_level:
            raise ConversationError("only a byte-level BPE can keep control tokens apart from text")
        return self._plain_ids([text])[0]

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids from a clone of the tokenizer that knows no added token."""
        if self._without is None:
            self._without = without_added_tokens(self._encoder.tokenizer)
        encodings = self._without.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [encoding.ids for encoding in encodings]
        for ids in found:
            if self.flags[0, ids].any():
                raise ConversationError("the tokenizer makes a control token of plain text")
        return found


def _unmarked(value: Any, in_arguments: bool = False) -> Iterator[str]:
    """The strings of tool calls, without the values of arguments."""
    if isinstance(value, str):
        if not in_arguments:
            yield value
    elif isinstance(value, Mapping):
        yield from value
        for key, item in value.items():
            yield from _unmarked(item, in_arguments or key == "arguments")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _unmarked(item, in_arguments)


def _between(
    controls: Sequence[tuple[int, int]], cuts: Sequence[int], length: int
) -> Iterator[tuple[tuple[int, int], int]]:
    """Each control token, or an empty span at a cut, and where the next one begins."""
    spans = sorted({(0, 0), *controls, *((cut, cut) for cut in cuts)})
    for span, (start, _) in zip(spans, [*spans[1:], (length, length)], strict=True):
        yield span, start


def _longest_first(texts: set[str] | Mapping[str, int]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
