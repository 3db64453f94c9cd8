"""Tools, calls of them, and template variables, in the form that templates are given."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from varlen_sft.data.conversation import ConversationError, check_text, kind_of, strings_in
from varlen_sft.data.json_rows import unique_keys

# What the renderer decides; a row that could set them would change more than its own variables.
_RESERVED = frozenset(
    "messages tools documents add_generation_prompt continue_final_message chat_template "
    "tokenize return_dict return_assistant_tokens_mask".split()
)


def read_tools(value: object) -> tuple[Mapping[str, Any], ...] | None:
    """The functions an assistant may call, as they are given; None if there are none.

    Args:
        value: a list of objects, or the same as a JSON string.

    Raises:
        ConversationError: anything else, or text in it that UTF-8 cannot hold.
    """
    tools = from_json("'tools'", value)
    for number, tool in enumerate(_objects("'tools'", tools), 1):
        check_strings(f"tool {number}", tool)
    return tuple(tools) or None


def read_tool_calls(where: str, value: object) -> tuple[Mapping[str, Any], ...]:
    """Tool calls as OpenAI writes them, with ``arguments`` an object.

    OpenAI's interface writes ``arguments`` as a JSON string, most templates expect the object: a
    string is parsed here, so that no template renders it as a string in a string. A bare call,
    ``{"name", "arguments"}``, is put into the form ``{"type": "function", "function": ...}``.

    Args:
        where: names the message in errors.
        value: a list of calls, one call, or the same as a JSON string.

    Raises:
        ConversationError: a call that is not a function's, has no name, or whose arguments are
            missing, not JSON, or not an object.
    """
    calls = from_json(f"the tool calls of {where}", value)
    if isinstance(calls, Mapping):
        calls = [calls]
    listed = _objects(f"the tool calls of {where}", calls)
    return tuple(_call(f"tool call {n} of {where}", call) for n, call in enumerate(listed, 1))


def read_template_kwargs(value: object) -> Mapping[str, Any]:
    """A row's variables for the chat template, such as ``{"enable_thinking": false}``.

    Args:
        value: an object, or the same as a JSON string.

    Raises:
        ConversationError: anything else, or a variable that is not a row's to set.
    """
    given = from_json("'chat_template_kwargs'", value)
    if not isinstance(given, Mapping):
        raise ConversationError(f"'chat_template_kwargs' must be an object, got {kind_of(given)}")
    for key in given:
        if key in _RESERVED or key.endswith("_token"):
            raise ConversationError(f"'chat_template_kwargs' may not set {key!r}")
    check_strings("'chat_template_kwargs'", given)
    return given


def from_json(name: str, value: object) -> Any:
    """The value, parsed if it is a string; columnar files hold what varies from row to row so.

    Raises:
        ConversationError: a string that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=unique_keys)
    except ConversationError:
        raise
    except json.JSONDecodeError as error:
        raise ConversationError(
            f"{name} must be JSON, got {value[:40]!r}: {error.msg} at character {error.pos + 1}"
        ) from None
    except ValueError as error:  # a number of 5000 digits
        raise ConversationError(f"{name} is not JSON that can be read: {error}") from None


def check_strings(name: str, value: object) -> None:
    """Raise ConversationError if a string anywhere in a JSON value is not UTF-8."""
    for text in strings_in(value) if isinstance(value, (Mapping, list, tuple, str)) else ():
        check_text(f"a string in {name}", text)


def _objects(name: str, value: object) -> Iterable[Mapping[str, Any]]:
    if not isinstance(value, (list, tuple)):
        raise ConversationError(f"{name} must be a list, got {kind_of(value)}")
    for number, item in enumerate(value, 1):
        if not isinstance(item, Mapping):
            raise ConversationError(f"{name} must be objects, item {number} is {kind_of(item)}")
    return value


def _call(where: str, call: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = call.get("type", "function")
    if kind not in ("function", None):
        raise ConversationError(f"{where} is of the type {kind!r}, expected 'function'")
    if "function" in call:
        function = call["function"]
        if not isinstance(function, Mapping):
            raise ConversationError(
                f"the function of {where} must be an object, got {kind_of(function)}"
            )
        rest = call
    else:
        function = {key: call[key] for key in ("name", "arguments") if key in call}
        rest = {key: value for key, value in call.items() if key not in function}
    return {**rest, "type": "function", "function": _function(where, function)}


def _function(where: str, function: Mapping[str, Any]) -> Mapping[str, Any]:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ConversationError(f"{where} must have a 'name', got {name!r}")
    if "arguments" not in function:
        raise ConversationError(f"{where} ({name}) has no 'arguments'")
    arguments = from_json(f"the arguments of {where} ({name})", function["arguments"])
    if not isinstance(arguments, Mapping):
        raise ConversationError(
            f"the arguments of {where} ({name}) must be an object, got {kind_of(arguments)}"
        )
    return {**function, "arguments": arguments}
