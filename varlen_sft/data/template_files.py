"""A model's chat template and special tokens, found beside its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from jinja2 import TemplateSyntaxError

from varlen_sft.data.template import ChatTemplate
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


def read_template(folder: Path, path: Path | None = None) -> ChatTemplate:
    """The chat template of a model folder.

    ``chat_template.jinja`` comes first, then ``chat_template`` in ``tokenizer_config.json`` (of
    several named ones, ``default``).

    Args:
        path: a Jinja file to take instead, with the folder's special tokens.

    Raises:
        InputError: no template, or one that does not compile.
    """
    config_path = folder / "tokenizer_config.json"
    config = _read_json(config_path) if config_path.exists() else {}
    given, path = path is not None, path or folder / "chat_template.jinja"
    if given or path.exists():
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
        return ChatTemplate(source, _special_tokens(config), _stop_tokens(folder))
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


def stop_ids(folder: Path) -> list[int]:
    """``eos_token_id`` of generation_config.json and config.json, as far as they are there.

    Raises:
        InputError: one of them is no JSON object.
    """
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        stop = _read_json(path).get("eos_token_id") if path.exists() else None
        ids += stop if isinstance(stop, list) else [stop] if isinstance(stop, int) else []
    return list(dict.fromkeys(ids))


def _stop_tokens(folder: Path) -> list[str]:
    """Those of ``stop_ids``, as text."""
    ids = stop_ids(folder)
    path = folder / "tokenizer.json"
    added = _read_json(path).get("added_tokens", []) if ids and path.exists() else []
    named = {token["id"]: token["content"] for token in added}
    return [named[token] for token in ids if token in named]


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    tokens = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):  # a serialised AddedToken
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens
