"""The questions that ``varlen-sft doctor`` asks of a template."""

from __future__ import annotations

import re
from collections.abc import Callable

from varlen_sft.data.conversation import ConversationError
from varlen_sft.data.marks import common_prefix, place
from varlen_sft.tools.doctor_finding import Finding, quoted, shape
from varlen_sft.tools.doctor_history import history_kept
from varlen_sft.tools.doctor_probes import BASIC, Subject, Turn, turns
from varlen_sft.tools.doctor_tokens import bos, control_text, padding, stops, straddles
from varlen_sft.words import count, listed

__all__ = ["QUESTIONS", "ask"]

_NOT_MARKED = ("whitespace", "thinking in text")
"""Probes whose answers begin before their marks, so that a part of them would pass for injected."""

_SPEAKER = re.compile(r"\b(assistant|model|bot|gpt|ai)\b", re.IGNORECASE)


def ask(subject: Subject) -> list[Finding]:
    """Every question once, then which probes cannot be used."""
    findings = [question(subject) for question in QUESTIONS]
    failed = any(finding.verdict == "fail" for finding in findings)
    return [*findings, probes_usable(subject, explained=failed)]


def generation_prompt(subject: Subject) -> Finding:
    """A template that cannot prompt for an answer leaves its header to be trained."""
    name = "is there a generation prompt?"
    turn = next(turns(subject.template, subject.conversation("plain")), None)
    if turn is None:
        return Finding(name, "note", "not to be told: the template refuses a plain question")
    if turn.prompt != turn.bare:
        return Finding(name, "pass", f"add_generation_prompt adds {quoted(_added(subject, turn))}")
    if _header(subject, turn.injected or ""):
        return Finding(
            name,
            "fail",
            f"add_generation_prompt changes nothing, but {quoted(turn.injected or '')} stands "
            "before an answer: a model would be trained to write its own header",
        )
    return Finding(name, "pass", "none is needed: an answer follows the question at once")


def _added(subject: Subject, turn: Turn) -> str:
    """What the prompt has more, from the control token on that differs (Phi 3 ends with EOS)."""
    at = common_prefix(turn.prompt, turn.bare)
    for control in subject.tokenizer.control.pattern.finditer(turn.prompt):
        if control.start() < at < control.end():
            at = control.start()
    return turn.prompt[at:]


def prefix_stable(subject: Subject) -> Finding:
    """What a model is given has to be the beginning of what it is trained on."""
    name = "are prompts prefixes of what is trained?"
    bad: dict[str, str] = {}
    seen = 0
    for probe in subject.probes:
        for turn in turns(subject.template, probe.conversation):
            seen += 1
            if turn.injected is None:
                bad.setdefault(probe.name, turn.prompt)
    if not bad:
        if not seen:
            return Finding(name, "note", "not to be told: the template refuses every probe")
        return Finding(name, "pass", f"the prompt of each of {count(seen, 'answer')} is kept")
    where, prompt = next(iter(bad.items()))
    return Finding(
        name,
        "fail" if bad.keys() & set(BASIC) else "note",
        f"no in {listed(bad)}: the {where} prompt ends in {quoted(prompt)}, and with its answer "
        f"the conversation does not begin so{_switches(subject)}",
    )


def _switches(subject: Subject) -> str:
    """A prompt that opens a thought wants data that think, or to be told otherwise."""
    known = sorted({"enable_thinking", "thinking"} & subject.template.variables)
    return f"; a row's chat_template_kwargs can set {' or '.join(known)}" if known else ""


def header_in_loss(subject: Subject) -> Finding:
    """What the template writes after the prompt is trained: it has to be the model's to say."""
    name = "is a header in the loss?"
    if generation_prompt(subject).verdict != "pass":
        return Finding(name, "note", "not to be told without a generation prompt")
    told, headers = _injected(subject)
    if headers:
        where = "stands between the generation prompt and the answer, and would be trained"
        return Finding(name, "fail", f"{quoted(headers[0])} {where}")
    if not told:
        return Finding(name, "pass", "no: an answer is trained from its first character on")
    return Finding(
        name,
        "note",
        f"no, but the template writes {listed(map(quoted, told))} after the prompt; a model has "
        "to say that itself, so it is trained",
    )


def _injected(subject: Subject) -> tuple[list[str], list[str]]:
    """The template's texts between a prompt and its answer, and those of them that are headers."""
    told: dict[str, None] = {}  # in the order in which they are met
    headers = []
    for probe in subject.probes:
        for turn in turns(subject.template, probe.conversation):
            found = turn.injected or ""
            if _header(subject, found) and (probe.samples or probe.name in BASIC):
                headers.append(found)
            if found.strip() and probe.name not in _NOT_MARKED:
                told[found] = None
    return list(told), headers


def _header(subject: Subject, injected: str) -> bool:
    """Whether a text names a speaker, or is the header that the template prompts with."""
    return bool(subject.turns.header_in(injected) or _SPEAKER.search(injected))


def tags_agree(subject: Subject) -> Finding:
    """``{% generation %}`` has to enclose what a model samples."""
    name = "do generation tags agree?"
    if not subject.template.has_generation_tags:
        return Finding(name, "pass", "there are none, and none are needed")
    seen, extra = 0, ""
    for probe in subject.probes:
        if not probe.samples:
            continue
        seen += 1
        (outcome,) = subject.tokenizer.encode_rows([probe.conversation], subject.options)
        if isinstance(outcome, ConversationError):
            return Finding(name, "fail", f"in {probe.name}: {outcome}")
        extra = extra or _also_tagged(subject, probe.name)
    if not seen:
        return Finding(name, "note", "not to be told: no probe can be placed")
    evidence = f"in each of {count(seen, 'probe')} they enclose what is trained"
    if not extra:
        return Finding(name, "pass", evidence)
    return Finding(name, "note", f"{evidence}, and {extra} besides, which is not trained here")


def _also_tagged(subject: Subject, name: str) -> str:
    """What the tags enclose that no model samples, such as white space after the stop token."""
    conversation = subject.conversation(name)
    try:
        answers = subject.untagged.planner.lay_out(conversation).answers
        placed = place(subject.template, conversation)
    except ConversationError:  # rewritten history: each answer was a row of its own
        return ""
    for start, end in placed.tags:
        for answer in answers:
            if start <= answer.start < end and (start, end) != (answer.start, answer.end):
                around = placed.text[start : answer.start], placed.text[answer.end : end]
                return listed(dict.fromkeys(quoted(text) for text in around if text))
    return ""


def mechanisms_agree(subject: Subject) -> Finding:
    """Places found from marks, and again from prefixes and sentinels."""
    name = "do two ways to find answers agree?"
    proven = [probe for probe in subject.probes if probe.samples]
    for probe in proven:
        if probe.disagreement is not None:
            return Finding(name, "fail", f"{probe.name}: {probe.disagreement}")
    if not proven:
        return Finding(name, "note", "nothing to compare: no probe can be placed")
    return Finding(name, "pass", f"on {count(len(proven), 'probe')}")


def probes_usable(subject: Subject, explained: bool) -> Finding:
    """Which probes are refused, and why; ``explained`` if another question failed already."""
    name = "which conversations are refused?"
    refused = {p.name: str(p.outcome) for p in subject.probes if not isinstance(p.outcome, tuple)}
    if not refused:
        return Finding(name, "pass", f"none of {listed(p.name for p in subject.probes)}")
    basic = refused.keys() & set(BASIC)
    alike: dict[str, list[str]] = {}
    for probe, reason in refused.items():
        alike.setdefault(shape(reason), []).append(probe)
    told = [f"{listed(names)}: {refused[names[0]]}" for names in alike.values()]
    return Finding(name, "fail" if basic and not explained else "note", "\n".join(told))


QUESTIONS: tuple[Callable[[Subject], Finding], ...] = (
    generation_prompt,
    prefix_stable,
    header_in_loss,
    stops,
    tags_agree,
    history_kept,
    straddles,
    control_text,
    bos,
    padding,
    mechanisms_agree,
)
