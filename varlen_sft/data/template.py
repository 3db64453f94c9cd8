"""A model's chat template: found beside its tokenizer, rendered in a Jinja sandbox.

The environment is the one transformers gives templates, so that a template renders to the same text
here as there, without importing it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from varlen_sft.data.formats import ConversationError, Message
from varlen_sft.errors import InputError

SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""The variables of a template that name a token."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        special_tokens: template variables such as ``bos_token``.

    Raises:
        TemplateSyntaxError: the source is not Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._template = _environment().from_string(source)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation as the model sees it.

        Raises:
            ConversationError: the template refused the conversation; its own words are the reason.
        """
        try:
            return self._template.render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                tools=None,  # templates test `tools is not none`, so undefined would not do
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except TemplateError as error:
            raise ConversationError(f"the chat template refused: {error}") from None


def read_template(folder: Path) -> ChatTemplate:
    """The chat template of a model folder.

    ``chat_template.jinja`` comes first, then ``chat_template`` in ``tokenizer_config.json`` (of
    several named ones, ``default``).

    Raises:
        InputError: no template, or one that does not compile.
    """
    config_path = folder / "tokenizer_config.json"
    config = _read_json(config_path) if config_path.exists() else {}
    path = folder / "chat_template.jinja"
    if path.exists():
        source: object = _read_text(path)
    else:
        path, source = config_path, config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not isinstance(source, str):
        raise InputError(
            "no chat template: neither chat_template.jinja nor 'chat_template' in "
            "tokenizer_config.json",
            file=folder,
        )
    try:
        return ChatTemplate(source, _special_tokens(config))
    except TemplateSyntaxError as error:
        reason = f"not a Jinja template: line {error.lineno}: {error.message}"
        raise InputError(reason, file=path) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason} at byte {error.start + 1}"
        raise InputError(reason, file=path) from None


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise InputError("expected a JSON object", file=path)
    return value


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    tokens = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):  # a serialised AddedToken
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


class _Generation(Extension):
    """``{% generation %}`` marks answers for transformers; here spans are proven another way."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _PlainNamespace(Namespace):
    """``namespace()`` without underscored names: a template is code from somewhere else."""

    def __init__(self, /, *args: Any, **attributes: Any) -> None:
        for name in dict(*args, **attributes):
            _check_attribute(name)
        super().__init__(*args, **attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not set {name!r} on a namespace")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _PlainNamespace
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML; a model must see the characters themselves.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
