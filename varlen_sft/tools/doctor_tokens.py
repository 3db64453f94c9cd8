"""The questions that ``varlen-sft doctor`` asks of tokens: where answers stop, BOS, pad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from varlen_sft.data.conversation import ConversationError
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.tools.doctor_finding import Finding, quoted
from varlen_sft.tools.doctor_probes import BASIC, Subject, stop_tokens, turns
from varlen_sft.words import count, listed

__all__ = ["bos", "control_text", "padding", "stops", "straddles"]


def stops(subject: Subject) -> Finding:
    """An answer has to end with a token at which generation ends, and to be trained through it."""
    name = "which stop tokens, are they trained?"
    if tail := _unclosed(subject):
        return Finding(name, "fail", f"none: after an answer the template writes {tail}")
    ends = Counter(end for probe in subject.probes for s in probe.samples for end in answers_of(s))
    if not ends:
        placed = any(probe.samples for probe in subject.probes)
        reason = "no answer of a probe is trained" if placed else "no probe can be placed"
        return Finding(name, "note", reason)
    texts = {token: subject.tokenizer.decode([token]) for token, _ in ends}
    if missed := [repr(texts[token]) for token, trained in ends if not trained]:
        return Finding(name, "fail", f"{listed(missed)} ends answers, and is NOT trained")
    told = [f"{texts[token]!r} ({count(number, 'answer')})" for (token, _), number in ends.items()]
    evidence = f"{listed(told)}: trained in each"
    unknown = sorted(set(texts.values()) - set(stop_tokens(subject.tokenizer)))
    if not unknown:
        return Finding(name, "pass", evidence)
    return Finding(
        name,
        "note",
        f"{evidence}; but {listed(map(repr, unknown))} is neither eos_token nor in eos_token_id of "
        "generation_config.json, so generation has to be told to stop there",
    )


def _unclosed(subject: Subject) -> str:
    """What follows an answer that nothing ends, in quotes; "" if there is none such."""
    for probe in subject.probes:
        for turn in turns(subject.template, probe.conversation) if probe.name in BASIC else ():
            here = turn.alone.places[-1]
            tail = turn.alone.text[here.last :]
            if here.owned and subject.turns.find_stop(tail) is None:
                return quoted(tail)
    return ""


def answers_of(sample: Sample) -> Iterator[tuple[int, bool]]:
    """The last token of each trained answer, and whether it is trained itself."""
    inside = sample.roles == ROLES.index("assistant")
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    for start, end in edges.reshape(-1, 2).tolist():
        if (sample.token_weights[start:end] > 0).any():
            yield int(sample.input_ids[end - 1]), bool(sample.token_weights[end - 1] > 0)


def straddles(subject: Subject) -> Finding:
    """A token may not be half header, half answer."""
    name = "do tokens straddle the start of an answer?"
    cut = {p.name: p.counts["straddles_cut"] for p in subject.probes if p.counts["straddles_cut"]}
    if not cut:
        return Finding(name, "pass", "in no probe, leading spaces and newlines among them")
    return Finding(
        name,
        "note",
        f"{sum(cut.values())} in {listed(cut)}, such as a header's newline that merges with the "
        "answer's; the text is cut there, as it is when a model is prompted",
    )


def control_text(subject: Subject) -> Finding:
    """What a user types ends nothing, whatever it looks like."""
    name = "does control text in a message stay text?"
    probe = next(probe for probe in subject.probes if probe.name == "control text")
    user, answer = probe.conversation.messages
    harmless = replace(probe.conversation, messages=(replace(user, content="hello"), answer))
    (expected,) = subject.untagged.encode_rows([harmless], subject.options)
    if isinstance(probe.outcome, ConversationError):
        return Finding(name, "note", f"such rows are refused: {probe.outcome}")
    if isinstance(expected, ConversationError):
        return Finding(name, "note", f"not to be told: {expected}")
    found, wanted = _controls(subject, probe.samples), _controls(subject, expected)
    if changed := (found - wanted) + (wanted - found):
        told = [repr(subject.tokenizer.decode([token])) for token in sorted(changed)]
        return Finding(name, "fail", f"no: a user who types {listed(told)} writes that token")
    return Finding(name, "pass", f"yes, as in {quoted(user.content)}")


def _controls(subject: Subject, samples: Sequence[Sample]) -> Counter[int]:
    """How often each added token occurs."""
    added = subject.tokenizer.control.flags[0]
    return Counter(id for sample in samples for id in sample.input_ids.tolist() if added[id])


def bos(subject: Subject) -> Finding:
    """BOS once: the template may write it, and a tokenizer may add it."""
    name = "is BOS written twice?"
    token = subject.tokenizer.special_tokens.get("bos_token")
    if not token or token not in subject.tokenizer.control.ids:
        return Finding(name, "pass", "the tokenizer has no bos_token")
    turn = next(turns(subject.template, subject.conversation("plain")), None)
    if turn is None:
        return Finding(name, "note", "not to be told: the template refuses a plain question")
    text = turn.alone.text
    written = 0
    while text.startswith(token, written * len(token)):
        written += 1
    adds = subject.tokenizer.adds_bos()
    return _bos_finding(name, token, written, adds)


def _bos_finding(name: str, token: str, written: int, adds: bool) -> Finding:
    if written > 1:
        return Finding(name, "fail", f"the template itself begins with {token!r} {written} times")
    if written and adds:
        return Finding(
            name,
            "note",
            f"not here, but the template writes {token!r} and the tokenizer would add it again: "
            "tokenise rendered text with add_special_tokens=False",
        )
    if adds:
        return Finding(
            name,
            "note",
            f"no, not even once: the tokenizer begins texts with {token!r}, the template "
            "conversations without",
        )
    how = "the template writes" if written else "neither template nor tokenizer writes"
    return Finding(name, "pass", f"{how} {token!r}{' once' * written}")


def padding(subject: Subject) -> Finding:
    """Where pads are masked by their value, real stop tokens are lost with them."""
    name = "is the pad token a stop token?"
    pad = subject.tokenizer.special_tokens.get("pad_token")
    if not pad:
        return Finding(name, "pass", "there is no pad token, and none is needed")
    if pad not in stop_tokens(subject.tokenizer):
        return Finding(name, "pass", f"no, it is {pad!r}")
    return Finding(
        name,
        "note",
        f"yes, {pad!r}; harmless here: packs have no pads, and masks go by position, not by value",
    )
