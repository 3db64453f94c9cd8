"""Which tokens are trained, and how much: weights in label space, from proven places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from varlen_sft.data.control import ControlTokens
from varlen_sft.data.conversation import Conversation, ConversationError
from varlen_sft.data.edges import Encoded
from varlen_sft.data.layout import Layout
from varlen_sft.data.sample import ROLES, Sample

SupervisionMode = Literal["assistant", "last_assistant", "all", "roles"]
History = Literal["as_rendered", "preserve", "per_assistant"]
OnControl = Literal["error", "text"]

_ASSISTANT = ROLES.index("assistant")


@dataclass(frozen=True)
class MaskOptions:
    """What is trained.

    Args:
        supervision_mode: ``assistant``, every answer with its stop token; ``last_assistant``, the
            last one; ``all``, every token, headers too; ``roles``, the contents of messages of
            ``roles`` (answers with their stop tokens).
        roles: of the messages that ``supervision_mode="roles"`` trains.
        history: where a template writes earlier answers otherwise than they were said (without
            their thinking): ``as_rendered`` trains what it writes, if that can be said at all;
            ``preserve`` asks the template to keep them, if it can; ``per_assistant`` makes a row of
            each answer, trained once, with the history that it would have seen.
        prompt_weight: weight of every token that is no answer; 0 trains answers alone.
        equal_sample_weight: the weights of each row sum to 1.
        mask_special_tokens: special tokens weigh 0, stop tokens of trained answers apart.
        on_control: an answer that spells a header or a stop token is an ``error``, or ``text``.

    Raises:
        ValueError: an unknown word, a role that does not exist, a negative weight.
    """

    supervision_mode: SupervisionMode = "assistant"
    roles: tuple[str, ...] = ()
    history: History = "as_rendered"
    prompt_weight: float = 0.0
    equal_sample_weight: bool = False
    mask_special_tokens: bool = False
    on_control: OnControl = "error"

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if unknown := [role for role in self.roles if role not in ROLES[1:]]:
            raise ValueError(f"roles must be of {ROLES[1:]}, got {unknown[0]!r}")
        if (self.supervision_mode == "roles") != bool(self.roles):
            raise ValueError('roles must be given with supervision_mode="roles", and only then')
        if not 0 <= self.prompt_weight < float("inf"):
            raise ValueError(f"prompt_weight must be finite and >= 0, got {self.prompt_weight}")


_KNOWN = {
    "supervision_mode": get_args(SupervisionMode),
    "history": get_args(History),
    "on_control": get_args(OnControl),
}


def weigh(
    conversation: Conversation,
    layout: Layout,
    encoded: Encoded,
    options: MaskOptions,
    control: ControlTokens,
    only_last: bool = False,
) -> Sample:
    """Weights and roles of the tokens of one conversation.

    Args:
        only_last: a row of its own for the last answer: nothing before the one before it counts.

    Raises:
        ConversationError: an answer does not begin and end with a token of its own.
    """
    spans = answer_tokens(layout, encoded, control)
    roles = np.zeros(len(encoded.ids), dtype=np.uint8)
    weights = np.full(len(encoded.ids), options.prompt_weight, dtype=np.float32)
    if options.supervision_mode == "all":
        weights[:] = 1
    messages = conversation.messages
    others = _tokens(encoded, layout.others).tolist()
    for (_, _, role, number), (first, last) in zip(layout.others, others, strict=True):
        roles[first:last] = role
        if ROLES[role] in options.roles:
            weights[first:last] = 1
        if role == _ASSISTANT:
            weights[first:last] = 0
        elif messages[number - 1].weight != 1:
            weights[first:last] *= messages[number - 1].weight
    trained = _trained(layout, options, only_last)
    for answer, (first, last) in zip(layout.answers, spans.tolist(), strict=True):
        roles[first:last] = _ASSISTANT
        weights[first:last] = messages[answer.number - 1].weight * (answer.number in trained)
    if options.mask_special_tokens:
        special = control.flags[1, encoded.ids]
        special[spans[:, 1] - 1] = False
        weights[special] = 0
    if only_last:
        weights[: _history_end(layout, encoded)] = 0
    return Sample(encoded.ids.astype(np.int32), balanced(weights, options), roles)


def answer_tokens(layout: Layout, encoded: Encoded, control: ControlTokens) -> np.ndarray:
    """(answers, 2) the tokens [first, last) of each answer, its stop token the last of them.

    Raises:
        ConversationError: a token reaches over the end of an answer or of its stop token.
    """
    places = [place for a in layout.answers for place in (a.start, a.stop_start, a.end)]
    start, stop_start, end = encoded.units(places).reshape(-1, 3).T
    first, last = encoded.overlapping(start, end)
    stop = last - 1
    proven = encoded.starts[first] >= start
    proven &= (encoded.starts[stop] == stop_start) & (encoded.ends[stop] == end)
    proven &= encoded.ids[stop] == [control.ids.get(a.stop, -1) for a in layout.answers]
    if not proven.all():
        answer = layout.answers[int(proven.argmin())]
        tail = layout.text[max(answer.start, answer.stop_start - 12) : answer.end + 4]
        raise ConversationError(
            f"the stop token {answer.stop!r} of message {answer.number} is not a token of its "
            f"own: the answer ends in {tail!r}"
        )
    return np.array((first, last)).T


def straddled(layout: Layout, encoded: Encoded) -> list[int]:
    """The starts of answers (characters) that a token reaches over: part header, part answer."""
    starts = [answer.start for answer in layout.answers]
    units = encoded.units(starts)
    at = np.minimum(np.searchsorted(encoded.ends, units, "right"), len(encoded.ids) - 1)
    over = encoded.starts[at] < units
    return np.array(starts)[over].tolist() if over.any() else []


def _history_end(layout: Layout, encoded: Encoded) -> int:
    """The first token of what follows the answer before the last, 0 if there is none."""
    history = [number for *_, role, number in layout.others if role == _ASSISTANT]
    if not history:
        return 0
    after = [start for start, _, _, number in layout.others if number > history[-1]]
    start = after[0] if after else layout.answers[-1].start
    return int(np.searchsorted(encoded.starts, encoded.units([start])[0]))


def _tokens(encoded: Encoded, spans: tuple[tuple[int, int, int, int], ...]) -> np.ndarray:
    if not spans:
        return np.zeros((0, 2), dtype=np.int64)
    first, last = encoded.units([place for span in spans for place in span[:2]]).reshape(-1, 2).T
    return np.array(encoded.overlapping(first, last)).T


def _trained(layout: Layout, options: MaskOptions, only_last: bool) -> set[int]:
    """Numbers of the answers that are trained."""
    if options.supervision_mode == "roles" and "assistant" not in options.roles:
        return set()
    if only_last or options.supervision_mode == "last_assistant":
        return {layout.answers[-1].number}
    return {answer.number for answer in layout.answers}


def balanced(weights: np.ndarray, options: MaskOptions) -> np.ndarray:
    """The weights, of a sum of 1 if ``equal_sample_weight`` is asked for."""
    total = weights[1:].sum(dtype=np.float64)  # the first token is no target
    if options.equal_sample_weight and total > 0:
        weights = (weights / total).astype(np.float32)
    return weights
