"""Whether a template leaves earlier answers as they were said."""

from __future__ import annotations

from dataclasses import dataclass

from varlen_sft.data.conversation import Conversation
from varlen_sft.tools.doctor_finding import Finding
from varlen_sft.tools.doctor_probes import Subject, Turn, thought_of, turns, whole
from varlen_sft.words import count, listed

__all__ = ["History", "history_kept", "look_back"]

TRIED = ("multi-turn", "thinking", "thinking in text", "tools")


@dataclass
class History:
    """Earlier answers of some conversations: how many, how many changed, and how (first match)."""

    seen: int = 0
    changed: int = 0
    thinking: int = 0  # the reasoning is left out
    prompt: int = 0  # what the model was prompted with is gone
    stop: int = 0  # another token stands where the model stopped
    other: int = 0


def history_kept(subject: Subject) -> Finding:
    """What is said in the last turn has to stand there when it is an earlier one."""
    name = "is history written as it was said?"
    options = subject.options
    conversations = [subject.conversation(probe) for probe in TRIED]
    if options.history == "preserve":
        conversations = [subject.tokenizer.keep_history(talk) for talk in conversations]
    found = look_back(subject, conversations)
    if not found.seen:
        return Finding(name, "note", "not to be told: the template refuses every probe")
    if not found.changed:
        return Finding(name, "pass", f"yes, each of {count(found.seen, 'earlier answer')}")
    lost = f"{found.changed} of {count(found.seen, 'earlier answer')} change: {_how(found)}"
    if options.history == "per_assistant":
        return Finding(name, "pass", f"{lost}; history=per_assistant trains each as it was said")
    if options.supervision_mode == "last_assistant":
        return Finding(name, "pass", f"{lost}; only the last answer is trained")
    return Finding(name, "fail", f"{lost}; {_advice(subject)}")


def _how(found: History) -> str:
    lost = {
        "lose their thinking": found.thinking,
        "lose what the generation prompt ends in": found.prompt,
        "end with another stop token": found.stop,
        "lose what the template writes around the last answer": found.other,
    }
    return listed(f"{number} {what}" for what, number in lost.items() if number)


def _advice(subject: Subject) -> str:
    if subject.options.history == "preserve":
        return "the template has no variable that keeps them: use history=per_assistant"
    kept = [subject.tokenizer.keep_history(subject.conversation(name)) for name in TRIED]
    ways = "per_assistant"
    if not look_back(subject, kept).changed:
        ways = "preserve or per_assistant"
    return f"use history={ways}, or answers are trained as no model would say them"


def look_back(subject: Subject, conversations: list[Conversation]) -> History:
    """Compare each earlier answer with itself when it was the last."""
    found = History()
    for conversation in conversations:
        later = whole(subject.template, conversation)
        if later is None:
            continue
        for turn in list(turns(subject.template, conversation))[:-1]:
            before = later.places[turn.number - 2].last
            if before >= 0:
                thought = thought_of(conversation.messages[turn.number - 1])
                _compare(subject, turn, thought, later.text[before:], found)
    return found


def _compare(subject: Subject, turn: Turn, thought: str, later: str, found: History) -> None:
    """``later``: the whole conversation from the end of the message before the answer on."""
    found.seen += 1
    before, here = turn.alone.places[-2].last, turn.alone.places[-1]
    end = here.last if here.owned else len(turn.prompt)
    lead, stop = subject.turns.find_stop(turn.alone.text[end:]) or ("", "")
    said = turn.alone.text[before:end] + lead
    if later.startswith(said + stop):
        return
    found.changed += 1
    if thought and thought in said and thought not in later:
        found.thinking += 1
    elif turn.injected is not None and not later.startswith(turn.prompt[before:]):
        found.prompt += 1
    elif later.startswith(said):
        found.stop += 1
    else:
        found.other += 1
