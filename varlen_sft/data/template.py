"""A model's chat template: found beside its tokenizer, rendered in a Jinja sandbox.

The environment is the one transformers gives templates, so that a template renders to the same text
here as there, without importing it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from varlen_sft.data.conversation import ConversationError, Message

GENERATION_MARKS = "varlen_sft_generation_marks"
"""The template variable that says what ``{% generation %}`` writes around its text."""

_PROBE = "varlen"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template.

    Attributes:
        has_generation_tags: it marks answers with ``{% generation %}``.
        reasoning_key: the name under which it reads what an assistant thought.

    Args:
        source: the Jinja text.
        special_tokens: template variables such as ``bos_token``.
        stop_tokens: tokens at which the model's generation ends, besides ``eos_token``.

    Raises:
        TemplateSyntaxError: the source is not Jinja.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], stop_tokens: Sequence[str] = ()
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.stop_tokens = tuple(stop_tokens)
        environment = _environment()
        self._template = environment.from_string(source)
        tree = environment.parse(source)
        self.has_generation_tags = any(
            block.call.node.name == "_mark_generation"
            for block in tree.find_all(nodes.CallBlock)
            if isinstance(block.call.node, nodes.ExtensionAttribute)
        )
        self.variables = meta.find_undeclared_variables(tree)
        self.reasoning_key = next(
            (name for name in _REASONING if re.search(rf"\b{name}\b", source)), _REASONING[0]
        )
        # Templates of models that see images want a list of parts, and write no plain string.
        self._content_in_parts = False
        self._content_in_parts = not self._writes(_PROBE) and self._writes(
            [{"type": "text", "text": _PROBE}]
        )

    def _writes(self, content: object) -> bool:
        messages = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            return _PROBE in self.render(messages)
        except ConversationError:
            return False

    def view(
        self,
        message: Message,
        content: str | None = None,
        reasoning: str | None = None,
        tool_calls: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """A message as templates read it: absent fields are absent, not None.

        Args:
            content, reasoning, tool_calls: what to write instead of the message's own.
        """
        content = message.content if content is None else content
        reasoning = message.reasoning_content if reasoning is None else reasoning
        tool_calls = tool_calls or message.tool_calls
        parts = [{"type": "text", "text": content}] if self._content_in_parts else content
        view: dict[str, Any] = {"role": message.role, "content": parts, **message.extra}
        if reasoning is not None:
            view[self.reasoning_key] = reasoning
        if tool_calls:
            view["tool_calls"] = list(tool_calls)
        return view

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
        generation_marks: tuple[str, str] = ("", ""),
    ) -> str:
        """The text of a conversation as the model sees it.

        Args:
            messages: what the template loops over, as messages or views of them.
            tools: schemas of functions, or None.
            template_kwargs: further variables of the template.
            add_generation_prompt: end with the header that the model answers to.
            generation_marks: written before and after what ``{% generation %}`` tags enclose.

        Raises:
            ConversationError: the template refused the conversation; its own words are the reason.
        """
        views = [self.view(m) if isinstance(m, Message) else m for m in messages]
        variables: dict[str, Any] = {
            "tools": tools,  # templates test `tools is not none`, so undefined would not do
            "documents": None,
            **self.special_tokens,
            **(template_kwargs or {}),
            GENERATION_MARKS: generation_marks,
        }
        try:
            return self._template.render(
                messages=views, add_generation_prompt=add_generation_prompt, **variables
            )
        except TemplateError as error:
            raise ConversationError(f"the chat template refused: {error}") from None
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            # What Jinja does not wrap: `none + "text"`, a filter on another type.
            raise ConversationError(
                f"the chat template failed: {type(error).__name__}: {error}"
            ) from None


class _Generation(Extension):
    """``{% generation %}``, by which templates mark what transformers is to train."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark_generation", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark_generation(self, context: Context, caller: Callable[[], str]) -> str:
        opening, closing = context[GENERATION_MARKS]
        return opening + caller() + closing


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
