"""Conversations that masks have gone wrong on, or could: written by hand, the same for every
template, but for a few that spell the template's own tokens.
"""

from __future__ import annotations

from typing import Any

from tests.data.templates.facts import Facts
from varlen_sft.data.conversation import Conversation, Message

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks out of the window.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "where"}},
            "required": ["city"],
        },
    },
}


def say(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    messages = [] if system is None else [Message("system", system)]
    for k, content in enumerate(contents):
        messages.append(Message(("user", "assistant")[k % 2], content))
    return Conversation(tuple(messages))


def call(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": f"call_{number}", "function": function}


def calling(*calls: dict[str, Any], content: str = "", reasoning: str | None = None) -> Message:
    return Message("assistant", content, reasoning_content=reasoning, tool_calls=calls)


def thinking(reasoning: str, content: str) -> Message:
    return Message("assistant", content, reasoning_content=reasoning)


def user(content: str) -> Message:
    return Message("user", content)


def answer(content: str) -> Message:
    return Message("assistant", content)


def result(content: str, name: str = "weather", number: int = 1) -> Message:
    return Message("tool", content, extra={"name": name, "tool_call_id": f"call_{number}"})


def talk(*messages: Message, tools: bool = False) -> Conversation:
    return Conversation(messages, tools=(_WEATHER,) if tools else None)


_CODE = "```python\ndef f(x):\n    return {'a': [x]}  # <|fine|>\n```\n"
_FAMILY = "👨‍👩‍👧‍👦🏴‍☠️👍🏽🇨🇭"
_SUNNY = call("weather", {"city": "Bern"})

PLAIN = {
    "one turn": say("What is it?", "It is a llama."),
    "system": say("What is it?", "It is.", system="You are brief."),
    "empty system": say("What is it?", "It is.", system=""),
    "one token": say("a", "a", "b", "b"),
    "empty answer": say("Say nothing.", "", "Again.", ""),
    "blank answers": say("Say nothing.", " ", "Again.", "\n", "More.", " \n\t\n "),
    "leading white space": say("a", "\n\nhello", "b", "  hello", "c", "\thello", "d", "\n hello"),
    "trailing white space": say("a\n", "hello\n", "b  ", "hello \n\n", "c", "hello\t"),
    "characters of many tokens": say("𒀀𓀀", "é🤖漢字🫠", "🦙\u0301", "𒀀"),
    "emoji": say(_FAMILY, _FAMILY + "\n" + _FAMILY, "☕️", "\u200d👩"),
    "right to left": say("שלום", "مرحبا \u202bעולם\u202c 123", "\u200f?", "\u200fنعم"),
    "combining": say("e\u0301\u0323", "\u0301a Z̶a̶l̶g̶o̶", "n\u0303", "\u0303"),
    "quotes the user": say("It is a llama.", "It is a llama.", "So?", "So?\nIt is a llama."),
    "the user repeats": say("a?", "The answer.", "The answer.", "The answer.", "a?", "a?"),
    "all the same": say("x", "x", "x", "x", "x", "x", system="x"),
    "many turns": say(*(f"message {k}" for k in range(24)), system="Count."),
    "a hundred turns": say(*(f"{k} {'na ' * (k % 7)}" for k in range(200))),
    "names of roles": say("user", "assistant", "model", "user", "tool", "system", system="system"),
    "headers as text": say(
        "assistant\n", "\nassistant\nuser: hi\nAssistant: hi", "[INST] x [/INST]",
        "### Assistant:\nhi\n### User:\n", "Human: a", "model\nAssistant:", system="assistant\n",
    ),
    "jinja": say("{{ bos_token }}{% if x %}", "{% endif %}{# hi #} {{ messages }} {% raw %}"),
    "json": say('{"role": "assistant"}', '[{"role": "user", "content": "\\n\\u00e9"}]\n'),
    "code": say(_CODE, _CODE + "\n" + _CODE, "again", _CODE),
    "numbers": say("1e-9 ١٢٣ ½", "12345678901234567890", "3.14", "3"),
    "long word": say("a" * 3000, "b" * 3000, "c", "ab" * 1500),
    "line ends": say("a\r\nb", "a\r\nb\r\n", "\r", "\rhello\n\rhello\r", "\t\t", "a\tb\t"),
    "control characters": say("\x00\x01", "\x00a\x7f\x1b[0m\x08", "\x1c", "\x1fhello\x85"),
    "private use": say("\ue000\ue001\uf8ff", "\uf8ff\ue000 \U000f0000", "\ue000", "\ue001"),
    "odd spaces": say("\ufeffa", "\ufeffb\u00a0", "\u00a0", "\u00a0c\u2028", "\u3000", "\u2003d"),
    "lone marks": say("<|", "<|im", "|>", "<start_of_|>", "<", "<｜end▁of", "</", "</s"),
    "thinking marks of the user": say("What is </think>?\n<think>", "A mark.", "</think>", "Yes."),
    "a tool result in user text": say("Hi.", "Hi.", "<tool_response>\n1\n</tool_response>", "One."),
    "tools without a call": talk(user("Hi."), answer("Hi."), tools=True),
}  # fmt: skip
"""No reasoning, no tool calls."""

THINKING = {
    "closes a thought in passing": say("How does it end?", "With </think> it ends.", "So?", "So."),
    "thinks in its content": say("a?", "<think>\nhm\n</think>\n\nIt is.", "b?", "It is not."),
    "thinks in its last content": say("a?", "b.", "c?", "<think>\nhm\n</think>\n\nIt is."),
    "reasoning": talk(user("a?"), thinking("First,\nthen.", "It is.")),
    "reasoning in history": talk(
        user("a?"), thinking("Hm.", "It is."), user("b?"), thinking("Hm, hm.", "It is not.")
    ),
    "reasoning with blank edges": talk(
        user("a?"), thinking("\n\nHm. \n", "\nIt is.\n"), user("b?"), thinking(" Hm\n\n", " It.")
    ),
    "empty reasoning": talk(user("a?"), thinking("", "It is."), user("b?"), thinking("\n", "So.")),
    "nothing but reasoning in history": talk(
        user("a?"), thinking("Hm.", ""), user("b?"), thinking("Hm.", "It is not.")
    ),
    "reasoning that equals the answer": talk(user("x"), thinking("x", "x")),
}
"""Reasoning, or marks of it in an answer."""

TOOLS = {
    "call": talk(user("Rain?"), calling(_SUNNY), result("sun"), answer("No."), tools=True),
    "call without schemas": talk(user("Rain?"), calling(_SUNNY), result("sun"), answer("No.")),
    "call at the end": talk(user("Rain?"), calling(_SUNNY), tools=True),
    "call in text": talk(
        user("Rain?"), calling(_SUNNY, content="Let me look."), result("sun"), answer("No.")
    ),
    "call in text, an empty result": talk(
        user("Rain?"), calling(_SUNNY, content="Let me look."), result(""), answer("No.")
    ),
    "call after a blank line": talk(
        user("Rain?"), calling(_SUNNY, content="\n"), result("sun"), answer("")
    ),
    "call in text at the end": talk(user("Rain?"), calling(_SUNNY, content="Let me look.")),
    "call after reasoning": talk(
        user("Rain?"), calling(_SUNNY, reasoning="Look."), result("sun"), thinking("Sun.", "No.")
    ),
    "calls in two rounds": talk(
        user("Rain?"), calling(_SUNNY), result("fog"), calling(call("weather", {"city": "Bex"})),
        result("sun"), answer("No."), user("Sure?"), answer("Yes."),
    ),
    "calls in parallel": talk(
        user("Rain?"), calling(_SUNNY, call("weather", {"city": "Bex"}, 2)), result("sun"),
        result("fog", number=2), answer("No."),
    ),
    "result, then the user": talk(
        user("Rain?"), calling(_SUNNY), result("sun"), answer("No."), user("Thanks."), answer("So.")
    ),
    "numbers": talk(
        user("Add."), calling(call("add", {"a": 1, "b": -2.5, "yes": True, "no": None})),
        result("-1.5", "add"), answer("-1.5"),
    ),
    "nested": talk(
        user("Put."), calling(call("put", {"at": {"x": [1, "two", {"y": ""}]}, "all": []})),
        result('{"ok": true}', "put"), answer("Done."),
    ),
    "a list": talk(
        user("Sum."), calling(call("sum", {"of": ["1", "é"], "to": [2]})), result("3", "sum"),
        answer("3"),
    ),
    "no arguments": talk(user("Go."), calling(call("go", {})), result("", "go"), answer("Gone.")),
    "strings to escape": talk(
        user("Say."), calling(call("say", {"text": 'a "b"\n\\c\' <d>&é🦙', "": " "})),
        result('a "b"\n\\c', "say"), answer("Said."),
    ),
    "order of arguments": talk(
        user("Go."), calling(call("go", {"b": "1", "ab": "2", "a": "3", "B": "4"})),
        result("b", "go"), answer("Gone."),
    ),
    "arguments as JSON text": talk(
        user("Rain?"), calling(call("weather", '{"city": "Bern"}')), result("sun"), answer("No.")
    ),
}  # fmt: skip
"""Tool calls. A few templates write none of them."""


def own(facts: Facts) -> dict[str, Conversation]:
    """Conversations that spell the template's own tokens, in every message that can."""
    stop = facts.end or facts.stops[-1]
    spelled = f"{facts.prompt}fake{stop}\n" + " ".join(facts.control)
    marks = [m for m in facts.markers if "think" not in m and "channel" not in m]
    marks = " ".join(m for m in marks if m not in facts.stops)
    return {
        "user spells control tokens": say(spelled, "It is.", stop, "It is not."),
        "user begins and ends with one": say(stop + "x" + stop, "It is.", stop, "It is not."),
        "system spells control tokens": say("a?", "It is.", system=spelled),
        "user spells markers": say("".join(facts.markers) or "a", "It is."),
        "result spells control tokens": talk(
            user("Rain?"), calling(_SUNNY), result(spelled), answer("No.")
        ),
        "answer spells its stop token": say("a?", f"It ends with {stop} or not.", "b?", "It is."),
        "answer spells a header": say("a?", f"{facts.control[-1]}user", "b?", "It is."),
        "answer spells markers": say("a?", f"a {marks} b".replace("  ", " ")),
        "call spells its stop token": talk(
            user("Rain?"), calling(call("weather", {"city": f"B{stop}"})), result("sun"),
            answer("No."),
        ),
        "an argument's name spells its stop token": talk(
            user("Rain?"), calling(call("weather", {"in": {f"B{stop}": 1}})), result("sun"),
            answer("No."),
        ),
        "a tool's name spells a control token": talk(
            user("Rain?"), calling(_SUNNY), result("sun", name=f"weather{stop}"), answer("No."),
        ),
    }  # fmt: skip


def conversations(facts: Facts) -> dict[str, Conversation]:
    """Every conversation, by a name that says what is nasty about it."""
    tools = {f"{name} (tools)": conversation for name, conversation in TOOLS.items()}
    return {**PLAIN, **THINKING, **tools, **own(facts)}
