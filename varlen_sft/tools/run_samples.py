"""What the model said at each validation of a run, beside what was held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from varlen_sft.tools.page import Html, section, tag
from varlen_sft.words import count

__all__ = ["SAMPLE_STYLE", "samples_section", "short_source"]

SHOWN = 4
"""Answers to one conversation that are not folded away: the first, and the newest ones."""
SAMPLE_STYLE = """
.talk { border-top: 1px solid var(--line); padding: 12px 0 4px; }
.talk h3 { font-size: 1rem; margin: 0; font-weight: 600; white-space: pre-wrap; }
.talk dl { margin: .4rem 0; }
.talk .prompt { white-space: pre-wrap; background: var(--card); padding: 8px; margin: .4rem 0; }
"""


def short_source(source: str) -> str:
    """A source without the folders on somebody's disk; a name on the hub is kept whole."""
    mode, colon, name = source.rpartition(":")
    return source if "hub" in mode.split(":") else f"{mode}{colon}{name.rsplit('/', 1)[-1]}"


def samples_section(events: Sequence[Mapping[str, Any]]) -> Html:
    """Each conversation with all answers to it, the newest first; nothing without any.

    Args:
        events: "samples", and the step that they were made after, rising.
    """
    if not events:
        return Html("")
    said: dict[tuple, list[tuple[int, Mapping[str, Any]]]] = {}
    for event in reversed(events):
        for one in event["samples"]:
            said.setdefault((one["source"], one["sample"], one["prompt"]), []).append(
                (event["step"], one)
            )
    newest = events[-1]
    exact = sum(one["exact"] for one in newest["samples"])
    note = (
        f"Held-out conversations up to their last answer, answered greedily. After step "
        f"{newest['step']:,} {exact} of {count(len(newest['samples']), 'answer')} "
        f"{'is' if exact == 1 else 'are'} the held-out one, word for word."
    )
    facts = tag("p", note, class_="dim", data_field="exact", data_value=exact)
    return section("What it says", facts, *(_talk(answers) for answers in said.values()))


def _talk(answers: Sequence[tuple[int, Mapping[str, Any]]]) -> Html:
    """One conversation; answers are the newest first."""
    first = answers[0][1]
    source = f"{short_source(first['source'])}, sample {first['sample']:,}"
    prompt = tag("div", first["prompt"], class_="prompt", data_said="prompt")
    shown = answers if len(answers) <= SHOWN else [*answers[: SHOWN - 1], answers[-1]]
    folded = [answer for answer in answers if answer not in shown]
    parts = [
        tag("h3", first["asked"], data_said="asked"),
        tag("details", tag("summary", f"all that the model reads ({source})"), prompt),
        tag("dl", *_pair("held out", first["answer"], None), *_pairs(shown)),
    ]
    if folded:
        title = f"{count(len(folded), 'answer')} between"
        parts.append(tag("details", tag("summary", title), tag("dl", *_pairs(folded))))
    return tag("div", *parts, class_="talk")


def _pairs(answers: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[Html]:
    for step, one in answers:
        name = f"step {step:,}" + " \u2713" * one["exact"]
        yield from _pair(name, one["said"], step, "good" if one["exact"] else None)


def _pair(name: str, text: str, step: int | None, look: str | None = None) -> tuple[Html, Html]:
    said = "answer" if step is None else "said"
    return tag("dt", name), tag("dd", text, class_=look, data_said=said, data_step=step)
