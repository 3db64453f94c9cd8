"""How templates write tool calls, by hand: what a model would have to say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = Mapping[str, Any]


class CannotWrite(Exception):
    """The template raises at such calls."""


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _need_mapping(arguments: Any) -> Mapping[str, Any]:
    if not isinstance(arguments, Mapping):
        raise CannotWrite
    return arguments


def _hermes(call: Call, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>'


def hermes(calls: Sequence[Call]) -> str:
    return "\n".join(_hermes(call, dumps(call["arguments"])) for call in calls)


def hermes_raw(calls: Sequence[Call]) -> str:
    """Arguments that are text already stay as they are."""
    texts = []
    for call in calls:
        arguments = call["arguments"]
        texts.append(_hermes(call, arguments if isinstance(arguments, str) else dumps(arguments)))
    return "\n".join(texts)


def _functions(calls: Sequence[Call], write: Callable[[Any], str], after: str) -> str:
    text = ""
    for call in calls:
        text += f"<tool_call>\n<function={call['name']}>\n"
        for name, value in _need_mapping(call["arguments"]).items():
            text += f"<parameter={name}>\n{write(value)}\n</parameter>\n"
        text += "</function>\n</tool_call>" + after
    return text


def _python_or_json(value: Any) -> str:
    return dumps(value) if isinstance(value, (dict, list)) else str(value)


def _text_or_json(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)


def function_python(calls: Sequence[Call]) -> str:
    return _functions(calls, _python_or_json, "\n")[:-1]


def function_json(calls: Sequence[Call]) -> str:
    return _functions(calls, _text_or_json, "\n")[:-1]


def nemotron(calls: Sequence[Call]) -> str:
    return _functions(calls, _python_or_json, "\n")


def _python(calls: Sequence[Call], write: Callable[[Any], str]) -> str:
    texts = []
    for call in calls:
        arguments = _need_mapping(call["arguments"]).items()
        texts.append(
            f"{call['name']}({', '.join(f'{name}={write(value)}' for name, value in arguments)})"
        )
    return f"<|tool_call_start|>[{', '.join(texts)}]<|tool_call_end|>"


def python(calls: Sequence[Call]) -> str:
    def write(value: Any) -> str:
        if isinstance(value, str):
            return f"'{value}'"
        return dumps(value) if isinstance(value, dict) else str(value)

    return _python(calls, write)


def python_escaped(calls: Sequence[Call]) -> str:
    def write(value: Any) -> str:
        if isinstance(value, str):
            for plain, escaped in (("\\", r"\\"), ("'", r"\'"), ("\n", r"\n"), ("\r", r"\r")):
                value = value.replace(plain, escaped)
            return f"'{value}'"
        return dumps(value) if isinstance(value, (dict, list)) else str(value)

    return _python(calls, write)


def llama(calls: Sequence[Call]) -> str:
    if len(calls) != 1:
        raise CannotWrite
    return f'{{"name": "{calls[0]["name"]}", "parameters": {dumps(calls[0]["arguments"])}}}'


def _deepseek(calls: Sequence[Call], arguments: Sequence[str]) -> str:
    return "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call['name']}\n```json\n{text}\n```"
        "<｜tool▁call▁end｜>"
        for call, text in zip(calls, arguments, strict=True)
    )


def deepseek(calls: Sequence[Call]) -> str:
    """Arguments have to be text; a mapping cannot be joined to it."""
    if not all(isinstance(call["arguments"], str) for call in calls):
        raise CannotWrite
    return _deepseek(calls, [call["arguments"] for call in calls])


def deepseek_json(calls: Sequence[Call]) -> str:
    return _deepseek(calls, [dumps(call["arguments"]) for call in calls])


def glm(calls: Sequence[Call]) -> str:
    text = ""
    for call in calls:
        text += f"\n<tool_call>{call['name']}\n"
        for name, value in _need_mapping(call["arguments"]).items():
            text += f"<arg_key>{name}</arg_key>\n<arg_value>{_text_or_json(value)}</arg_value>\n"
        text += "</tool_call>"
    return text


def _gemma4(value: Any, null: str) -> str:
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + _gemma4_pairs(value, null) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_gemma4(item, null) for item in value) + "]"
    return null if value is None else str(value)


def _gemma4_pairs(mapping: Mapping[str, Any], null: str) -> str:
    pairs = sorted(mapping.items(), key=lambda pair: pair[0].lower())
    return ",".join(f"{name}:{_gemma4(value, null)}" for name, value in pairs)


def _gemma4_calls(calls: Sequence[Call], null: str) -> str:
    text = ""
    for call in calls:
        arguments = call["arguments"]
        raw = isinstance(arguments, str)
        inside = arguments if raw else _gemma4_pairs(arguments, null)
        text += f"<|tool_call>call:{call['name']}{{{inside}}}<tool_call|>"
    return text


def gemma4(calls: Sequence[Call]) -> str:
    return _gemma4_calls(calls, "None")


def gemma4_null(calls: Sequence[Call]) -> str:
    for call in calls:
        _need_mapping(call["arguments"])
    return _gemma4_calls(calls, "null")


def atem(calls: Sequence[Call]) -> list[str]:
    """One text per call: each is a message of its own."""
    texts = []
    for call in calls:
        text = f'<atem:function_calls>\n<atem:invoke name="{call["name"]}">\n'
        for name, value in _need_mapping(call["arguments"]).items():
            text += f'<atem:parameter name="{name}">{_text_or_json(value)}</atem:parameter>\n'
        texts.append(f"{text}</atem:invoke>\n</atem:function_calls>")
    return texts


WRITERS: dict[str, Callable[[Sequence[Call]], str]] = {
    writer.__name__: writer
    for writer in (
        hermes, hermes_raw, function_python, function_json, nemotron, python, python_escaped,
        llama, deepseek, deepseek_json, glm, gemma4, gemma4_null,
    )
}  # fmt: skip
