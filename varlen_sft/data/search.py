"""Answers found by searching tokens: for rows of tokens of a chat that come without a mask.

The begin is the header that the chat template prompts with, the end the template's stop token. The
search looks at the whole row, before labels are shifted: a search among labels would miss a header
at the very beginning. A header counts only where its first token is the control token itself, not
text that spells it, and only if it ends where a token does.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from varlen_sft.data.control import ControlTokens
from varlen_sft.data.conversation import ConversationError
from varlen_sft.data.turn_text import TurnText


class AnswerSearch:
    """Finds answers in rows of token ids.

    Args:
        turns: how the chat template opens and closes turns.
        control: the tokenizer's control tokens.
        token_bytes: the bytes of each id; empty for a tokenizer that is no byte-level BPE.
    """

    def __init__(self, turns: TurnText, control: ControlTokens, token_bytes: list[bytes]) -> None:
        self._turns, self._control, self._bytes = turns, control, token_bytes

    def answers(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """The tokens [start, end) of each answer, its stop token the last of them.

        Raises:
            ConversationError: the tokenizer or the template cannot be searched for, there is no
                answer, one has no stop token, or a token reaches over the end of a header.
        """
        opening, header, stops = self._sequences()
        if int(ids.max()) >= len(self._bytes):
            raise ConversationError(f"the tokenizer has no token {int(ids.max())}")
        pieces = [self._bytes[token] for token in ids.tolist()]
        text, edges = b"".join(pieces), list(accumulate(map(len, pieces), initial=0))
        token_at = {edge: token for token, edge in enumerate(edges)}
        found = []
        for first in (ids == opening).nonzero()[0].tolist():
            if not text.startswith(header, edges[first]):
                continue
            start = token_at.get(edges[first] + len(header))
            if start is None:
                raise ConversationError(
                    f"a token reaches over the end of the header at token {first}: at inference "
                    "the prompt ends there"
                )
            found.append((start, self._end(ids, start, opening, stops)))
        if not found:
            raise ConversationError(f"no answer: no header {header.decode()!r} in the tokens")
        return found

    def _end(self, ids: np.ndarray, start: int, opening: int, stops: list[int]) -> int:
        ends = np.isin(ids[start:], stops).nonzero()[0]
        headers = (ids[start:] == opening).nonzero()[0]
        if not len(ends) or (len(headers) and headers[0] < ends[0]):
            raise ConversationError(f"the answer that begins at token {start} has no stop token")
        return start + int(ends[0]) + 1

    def _sequences(self) -> tuple[int, bytes, list[int]]:
        """The id that opens the header, the bytes of the header, the ids that stop an answer."""
        header = self._turns.header
        opening = self._control.pattern.match(header)
        if not self._bytes or opening is None:
            raise ConversationError(
                "answers can be searched for only in tokens of a byte-level BPE whose template "
                f"prompts with a control token, and it prompts with {header!r}"
            )
        stops = [self._control.ids[stop] for stop in self._turns.stops]
        return self._control.ids[opening.group()], header.encode(), stops
