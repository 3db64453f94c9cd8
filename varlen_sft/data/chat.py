"""Chat: rows become tokens, roles and weights, and the weights are proven right.

One render, one tokenisation. The trained span of an answer runs from the end of its generation
prompt through its stop token: what the model would have sampled, no more and no less. ``layout``
finds it in the text, ``edges`` in the tokens, ``masks`` weighs it, and ``crosscheck`` finds it a
second time, another way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from varlen_sft.data.control import ControlTokens
from varlen_sft.data.conversation import ConversationError, Message, Row
from varlen_sft.data.edges import Encoded, TextEncoder
from varlen_sft.data.layout import Planner
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.placed import Job
from varlen_sft.data.rows import RowEncoder, outcome
from varlen_sft.data.sample import Sample
from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from varlen_sft.data.template import ChatTemplate

_T = TypeVar("_T")
_BATCH, _AHEAD = 128, 2  # rows that the tokenizer is given at a time; batches that wait for it


class ChatTokenizer:
    """A tokenizer and its chat template: rows to samples, without transformers or torch.

    Roles: the tokens of an answer and its stop token are ``assistant``, those of another message's
    content carry its role, and what the template wrote around them (headers, their stop tokens,
    newlines) is ``none``.

    Attributes:
        special_tokens: the template's token variables, such as ``special_tokens["eos_token"]``.
        counts: what happened so far. ``straddles_cut``: texts cut at the start of an answer because
            a token would have reached over it, part header, part answer (a model that generates
            never has such a token there either, since its prompt ends at the cut).
            ``rewritten_turns``: answers whose thinking the template left out. ``spelled_control``:
            rows whose contents spell control tokens, which were kept as text.

    Args:
        tokenizer_json: a ``tokenizer.json``, as text or as the bytes of the file.
        template: the chat template.
    """

    def __init__(self, tokenizer_json: str | bytes, template: ChatTemplate) -> None:
        self._encoder = TextEncoder(tokenizer_json)
        # Not kept itself: a large one takes as much memory as what is made of it.
        data = tokenizer_json.encode() if isinstance(tokenizer_json, str) else tokenizer_json
        self._tokenizer_hash = hashlib.sha256(data).hexdigest()
        self.template = template
        self.special_tokens = dict(template.special_tokens)
        # What a model stops at is control, also where its tokenizer does not hold it as special.
        named = {**self.special_tokens, **{stop: stop for stop in template.stop_tokens}}
        self.control = ControlTokens(named, self._encoder)
        self.planner = Planner(template, self.control.pattern)
        self._rows = RowEncoder(self._encoder, self.control, self.planner, self.adds_bos())
        self.counts = self._rows.counts
        self.keep_history = self._rows.keep_history

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike[str], template: str | os.PathLike[str] | None = None
    ) -> ChatTokenizer:
        """Load ``tokenizer.json`` and the chat template of a model folder.

        Args:
            template: a Jinja file that is taken instead of the folder's own.

        Raises:
            InputError: a file is missing or malformed.
        """
        from varlen_sft.data.template_files import read_template

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError("no tokenizer.json in this folder", file=folder)
        loaded = read_template(Path(folder), None if template is None else Path(template))
        try:
            return cls(path.read_bytes(), loaded)
        except Exception as error:  # tokenizers raises a bare Exception, its reason is the text
            raise InputError(f"not a tokenizer that can be used: {error}", file=path) from None

    @property
    def straddles_cut(self) -> int:
        """See ``counts``."""
        return self.counts["straddles_cut"]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of the messages; ConversationError if the template refuses them."""
        return self.template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_prompt(self, messages: Sequence[Message]) -> np.ndarray:
        """int32 ids of the messages and the generation prompt: what a model answers to."""
        text = self.render(messages, add_generation_prompt=True)
        (encoded,) = self._encoder.encode([text])
        if isinstance(encoded, ConversationError):
            raise encoded
        return encoded.ids.astype(np.int32)

    def encode(self, row: Row, options: MaskOptions | None = None) -> Sample:
        """One row of L tokens as one sample; see ``masks.MaskOptions`` for what is trained.

        Raises:
            ConversationError: its trained spans cannot be proven right; says why.
        """
        return self.encode_many([row], options)[0]

    def encode_many(self, rows: Iterable[Row], options: MaskOptions | None = None) -> list[Sample]:
        """As encode, for many on all of the tokenizer's threads; raises for the first bad one."""
        samples: list[Sample] = []
        for made in self.encode_rows(rows, options):
            if isinstance(made, ConversationError):
                raise made
            samples += made
        return samples

    def encode_rows(
        self, rows: Iterable[Row], options: MaskOptions | None = None
    ) -> list[tuple[Sample, ...] | ConversationError]:
        """For each row, in its place, its samples or the reason why there are none.

        A row is one sample; with ``history="per_assistant"`` one for each trained answer.
        """
        options = options or MaskOptions()
        rows = list(rows)
        waiting: deque[tuple[Sequence[Row], list, Future]] = deque()
        done: list[tuple[Sample, ...] | ConversationError] = []
        # The tokenizer works without Python's lock: while it has one batch, the next is rendered.
        with ThreadPoolExecutor(1) as pool:
            for start in range(0, len(rows), _BATCH):
                batch = rows[start : start + _BATCH]
                jobs = [outcome(self._rows.jobs, row, options) for row in batch]
                texts = [j.layout.text for made in jobs if isinstance(made, list) for j in made]
                # A thread that is never asked for anything is never started.
                submit = pool.submit if len(rows) > _BATCH else _at_once
                waiting.append((batch, jobs, submit(self._encoder.encode, texts)))
                if len(waiting) > _AHEAD:
                    done += self._finished(*waiting.popleft(), options)
            while waiting:
                done += self._finished(*waiting.popleft(), options)
        return done

    def _finished(
        self,
        rows: Sequence[Row],
        jobs: Sequence[list[Job] | ConversationError],
        tokens: Future[list[Encoded | ConversationError]],
        options: MaskOptions,
    ) -> Iterator[tuple[Sample, ...] | ConversationError]:
        return self._rows.samples(rows, jobs, tokens.result(), options)

    def cross_check(
        self, rows: Iterable[Row], options: MaskOptions | None = None
    ) -> list[ConversationError | None]:
        """For each row, why its answers cannot lie where ``encode_rows`` finds them.

        Finds each answer a second time by renders of prefixes and by writing another answer in its
        place, and tokenises the text a second time with its control tokens kept apart. None where
        both ways agree, and for rows that are refused or have no template.
        """
        return [self._rows.check(row, options or MaskOptions()) for row in rows]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included; ValueError for an id it does not have."""
        ids = [int(token) for token in ids]
        size = self._encoder.tokenizer.get_vocab_size()
        for token in ids:
            if not 0 <= token < max(size, len(self._encoder.token_bytes)):
                raise ValueError(f"ids must be in [0, {size}), got {token}")
        if not self._encoder.byte_level:
            return self._encoder.tokenizer.decode(ids, skip_special_tokens=False)
        pieces = [self._encoder.token_bytes[token] for token in ids]
        return b"".join(pieces).decode(errors="replace")

    def fingerprint(self) -> str:
        """sha256 over all that decides text and ids: tokenizer, template, special tokens."""
        state = [self._tokenizer_hash, self.template.source, self.special_tokens]
        state.append(list(self.template.stop_tokens))
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def adds_bos(self) -> bool:
        """Whether the tokenizer begins a text with BOS by itself, unless it is told not to."""
        ids = self._encoder.tokenizer.encode("").ids
        bos = self.special_tokens.get("bos_token")
        return bool(ids) and bos in self.control.ids and ids[0] == self.control.ids[bos]


def _at_once(step: Callable[..., _T], *arguments: Any) -> Future[_T]:
    """What an executor gives, without one."""
    future: Future[_T] = Future()
    future.set_result(step(*arguments))
    return future
