"""Which tokens are trained, and how much: weights in label space, from proven places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from varlen_sft.data.control import ControlTokens, Spelled
from varlen_sft.data.conversation import ConversationError
from varlen_sft.data.edges import Encoded
from varlen_sft.data.placed import Job, Layout
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.spans import Spans

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
    jobs: Sequence[Job], encoded: Sequence[Encoded], options: MaskOptions, control: ControlTokens
) -> list[Sample | Unclean | ConversationError]:
    """Weights and roles of the tokens of conversations.

    Returns:
        For each, its sample; or what keeps its text from being tokenised in one go; or why an
        answer cannot be told from what follows it.
    """
    if not jobs:
        return []
    spans = Spans(encoded, [job.layout for job in jobs])
    wrong: dict[int, Unclean | ConversationError] = {}
    wrong.update(_unproven(jobs, spans, control))
    wrong.update(unclean(spans, control))
    weights, roles = _weights_and_roles(jobs, spans, options)
    if options.mask_special_tokens:
        special = control.flags[1, spans.ids]
        special[spans.answers.last - 1] = False
        weights[special] = 0
    ids = spans.ids.astype(np.int32)

    def sample(k: int) -> Sample:
        at = slice(spans.token_at[k], spans.token_at[k + 1])
        own = weights[at].copy()  # copies: a sample that is kept must not keep its batch
        if jobs[k].only_last:
            own[: _history_end(jobs[k].layout, encoded[k])] = 0
        return Sample(ids[at].copy(), balanced(own, options), roles[at].copy())

    return [wrong[k] if k in wrong else sample(k) for k in range(len(jobs))]


class Unclean(NamedTuple):
    """Why one tokenisation of a text will not do.

    ``spelled``: what the data wrote became control tokens. ``cuts``: the starts of answers, in
    characters, that a token reaches over: part header, part answer.
    """

    spelled: tuple[Spelled, ...]
    cuts: tuple[int, ...]


def unclean(spans: Spans, control: ControlTokens) -> dict[int, Unclean]:
    """The rows that have to be tokenised in pieces, by their index."""
    spelled: dict[int, list[Spelled]] = {}
    for row, one in control.spelled(spans):
        spelled.setdefault(row, []).append(one)
    cuts: dict[int, list[int]] = {}
    first = np.minimum(spans.answers.first, len(spans.ids) - 1)
    for k in (spans.starts[first] < spans.answers.start).nonzero()[0].tolist():
        cuts.setdefault(int(spans.answers.row[k]), []).append(spans.said[k].start)
    return {
        row: Unclean(tuple(spelled.get(row, ())), tuple(cuts.get(row, ())))
        for row in {*spelled, *cuts}
    }


def _unproven(
    jobs: Sequence[Job], spans: Spans, control: ControlTokens
) -> dict[int, ConversationError]:
    """The rows with an answer whose stop token is not a token of its own, by their index."""
    stop = spans.answers.last - 1
    proven = (spans.starts[stop] == spans.stop_starts) & (spans.ends[stop] == spans.answers.end)
    proven &= spans.ids[stop] == [control.ids.get(answer.stop, -1) for answer in spans.said]
    wrong: dict[int, ConversationError] = {}
    for k in (~proven).nonzero()[0].tolist():
        answer, row = spans.said[k], int(spans.answers.row[k])
        text = jobs[row].layout.text[max(answer.start, answer.stop_start - 12) : answer.end + 4]
        reason = (
            f"the stop token {answer.stop!r} of message {answer.number} is not a token of its "
            f"own: the answer ends in {text!r}"
        )
        wrong.setdefault(row, ConversationError(reason))
    return wrong


def _weights_and_roles(
    jobs: Sequence[Job], spans: Spans, options: MaskOptions
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) float32, before special tokens and earlier answers are taken out, and (N,) uint8.

    A token that two messages share is the later one's, but an answer's before all.
    """
    whole = 1.0 if options.supervision_mode == "all" else options.prompt_weight
    weights = np.full(len(spans.ids), whole, dtype=np.float32)
    roles = np.zeros(len(spans.ids), dtype=np.uint8)
    messages = [message.weight for job in jobs for message in job.conversation.messages]
    own = np.array(messages, dtype=np.float32)
    before = np.cumsum([0, *(len(job.conversation.messages) for job in jobs)])
    chosen = np.isin(spans.roles, [ROLES.index(role) for role in options.roles])
    others = np.where(chosen, 1, whole) * (spans.roles != _ASSISTANT)
    # Where one answer alone is trained, the others are not laid out as answers.
    trained = options.supervision_mode != "roles" or "assistant" in options.roles
    answers = np.full(len(spans.said), trained)
    for places, role, factors in (
        (spans.others, spans.roles, others),
        (spans.answers, np.full(len(answers), _ASSISTANT), answers),
    ):
        at, which = places.tokens()
        factors = own[before[places.row] + places.number - 1] * factors
        weights[at] = factors.astype(np.float32)[which]
        roles[at] = role.astype(np.uint8)[which]
    return weights, roles


def _history_end(layout: Layout, encoded: Encoded) -> int:
    """The first token of what follows the answer before the last, 0 if there is none."""
    history = [number for *_, role, number in layout.others if role == _ASSISTANT]
    if not history:
        return 0
    after = [start for start, _, _, number in layout.others if number > history[-1]]
    start = after[0] if after else layout.answers[-1].start
    return int(np.searchsorted(encoded.starts, encoded.units([start])[0]))


def balanced(weights: np.ndarray, options: MaskOptions) -> np.ndarray:
    """The weights, of a sum of 1 if ``equal_sample_weight`` is asked for."""
    if not options.equal_sample_weight:
        return weights
    total = weights[1:].sum(dtype=np.float64)  # the first token is no target
    return (weights / total).astype(np.float32) if total > 0 else weights
