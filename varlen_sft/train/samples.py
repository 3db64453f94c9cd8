"""Answers to held-out conversations, beside those that were held out: how a run is seen to learn.

A prompt is cut out of the prepared set itself: all tokens of a conversation before its last answer.
So it is what the template wrote for that row, with the row's own variables, generation prompt
included, and the model is asked for exactly what it is trained to say there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.store import Store
from varlen_sft.data.template_files import stop_ids
from varlen_sft.errors import InputError
from varlen_sft.train.distributed import World
from varlen_sft.train.greedy import Prompt, greedy

if TYPE_CHECKING:
    from varlen_sft.train.config import LogConfig
    from varlen_sft.train.journal import Journal

__all__ = ["Question", "Samples", "questions"]

_ASSISTANT = ROLES.index("assistant")
_LOOKED_AT = 256
"""Samples of a source, from its first, among which conversations are looked for."""
_SHORT = 40  # characters of a text in a line


class Question(NamedTuple):
    """A conversation up to its last answer."""

    source: str
    """As the configuration names it."""
    sample: int
    """Of the prepared set, from 1."""
    prompt: tuple[int, ...]
    asked: tuple[int, ...]
    """The last thing that anybody says in the prompt."""
    answer: tuple[int, ...]
    """Through its stop token."""


def questions(stores: Mapping[str, Store], count: int) -> list[Question]:
    """The first conversations of all sources in turn; fewer where there are no more.

    Args:
        stores: by source, as the configuration names it. Of each at most the first 256 samples are
            looked at, for one with an answer and something before it.
    """
    each = [_of_store(source, store) for source, store in stores.items()]
    found = chain.from_iterable(zip_longest(*each))
    return list(islice((question for question in found if question is not None), count))


def _of_store(source: str, store: Store) -> Iterator[Question]:
    for at in range(min(_LOOKED_AT, len(store))):
        question = _question(source, at + 1, store.sample(at))
        if question is not None:
            yield question


def _question(source: str, number: int, sample: Sample) -> Question | None:
    begins = np.flatnonzero(np.diff(sample.roles)) + 1
    runs = list(zip([0, *begins], [*begins, len(sample)], strict=True))
    answers = [k for k, (start, _) in enumerate(runs) if sample.roles[start] == _ASSISTANT]
    if not answers or not answers[-1]:
        return None
    start, end = runs[answers[-1]]
    said = [run for run in runs[: answers[-1]] if sample.roles[run[0]]] or runs[:1]
    ids = sample.input_ids.tolist()
    parts = ((0, start), said[-1], (start, end))
    return Question(source, number, *(tuple(ids[a:b]) for a, b in parts))


class Samples:
    """Asks the model of a run, on all of its ranks, and tells what it says.

    Args:
        options: how many, and how long.
        stores: of held-out conversations, by source.
        folder: of the model, with its tokenizer.
        world: the ranks.

    Raises:
        InputError: the tokenizer cannot be read.
    """

    def __init__(
        self, options: LogConfig, stores: Mapping[str, Store], folder: Path, world: World
    ) -> None:
        self._options, self._world = options, world
        self._why_not = ""
        self.questions = questions(stores, options.samples)
        tokenizer = folder / "tokenizer.json"
        if options.samples and stores and not self.questions:
            self._why_not = "no held-out sample is a conversation"
        elif self.questions and not tokenizer.is_file():
            self._why_not = f"{folder} has no tokenizer.json"
            self.questions = []
        stops = stop_ids(folder) if self.questions else []
        self._prompts = [
            Prompt(q.prompt, frozenset({*stops, q.answer[-1]})) for q in self.questions
        ]
        read = self.questions and world.is_first
        self._text = _Text(tokenizer) if read else None

    def tell(self, model: nn.Module, step: int, journal: Journal) -> None:
        """Let the model answer; all ranks call it. An event of the log, and a line for people."""
        if self._why_not:
            journal.say(f"nothing is generated at validations: {self._why_not}")
            self._why_not = ""
        if not self._prompts:
            return
        began = time.perf_counter()
        said = greedy(model, self._prompts, self._options.sample_tokens, self._world)
        if self._text is None:
            return
        made = [
            self._facts(q, ids, self._text) for q, ids in zip(self.questions, said, strict=True)
        ]
        journal.event("samples", step=step, seconds=time.perf_counter() - began, samples=made)
        journal.say(f"step {step}: {_line(made)}")

    def _facts(self, question: Question, said: Sequence[int], text: _Text) -> dict[str, Any]:
        return {
            "source": question.source,
            "sample": question.sample,
            "prompt": text(question.prompt),
            "asked": text(question.asked),
            "answer": text(question.answer),
            "said": text(said),
            "exact": tuple(said) == question.answer,
        }


class _Text:
    """Tokens as text, special ones as they are written, ids without a token as such."""

    def __init__(self, tokenizer_json: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        except Exception as error:  # tokenizers raises a bare Exception, its reason is the text
            raise InputError(f"cannot be read: {error}", file=tokenizer_json) from None

    def __call__(self, ids: Sequence[int]) -> str:
        known = groupby(ids, lambda token: self._tokenizer.id_to_token(token) is not None)
        return "".join(self._piece(is_known, list(run)) for is_known, run in known)

    def _piece(self, is_known: bool, ids: list[int]) -> str:
        if not is_known:
            return "".join(f"<token {token}>" for token in ids)
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _line(made: Sequence[Mapping[str, Any]]) -> str:
    exact, first = sum(one["exact"] for one in made), made[0]
    asked, said, answer = (_short(first[name]) for name in ("asked", "said", "answer"))
    return (
        f"{exact} of {len(made)} held-out answers word for word; "
        f"to {asked} it says {said}, held out is {answer}"
    )


def _short(text: str) -> str:
    """Quoted, on one line, from its beginning."""
    cut = text if len(text) <= _SHORT else text[: _SHORT - 1] + "\u2026"
    return '"' + "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut) + '"'
