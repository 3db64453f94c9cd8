"""A configuration written out: every key with its meaning; read again it is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from varlen_sft.train.config import TrainConfig
from varlen_sft.train.config_keys import GROUPS, KINDS

__all__ = ["changes", "dump", "flat"]


def flat(config: TrainConfig) -> dict[str, Any]:
    """Plain values by path, as YAML and JSON have them."""
    found = {}
    for group, values in asdict(config).items():
        if group == "stages":
            found[group] = [_plain(stage) for stage in values]
        else:
            found |= {f"{group}.{name}": _plain(value) for name, value in values.items()}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def changes(before: TrainConfig, now: TrainConfig) -> list[str]:
    """What two configurations do not have in common, in words."""
    old, new = flat(before), flat(now)
    return [f"{key} was {old[key]!r}, is {new[key]!r}" for key in old if old[key] != new[key]]


def dump(config: TrainConfig) -> str:
    """YAML of every key, each under a comment that says what it means."""
    values = flat(config)
    lines = []
    for group, made in GROUPS.items():
        about, meaning = _meanings(made)
        lines += ["", *(f"# {line}" for line in about.splitlines()), f"{group}:"]
        for name in (field.name for field in fields(made)):
            path = f"{group}.{name}"
            lines += [f"  # {meaning[name]}{_choices(KINDS[path])}"]
            lines += [f"  {name}: {_inline(values[path])}"]
    lines += [
        "",
        f"# {_meanings(TrainConfig)[1]['stages']}",
        f"stages: {_inline(values['stages'])}",
    ]
    return "\n".join(lines[1:]) + "\n"


def _meanings(made: type) -> tuple[str, dict[str, str]]:
    """The docstring of a dataclass, and those under its fields."""
    from docstring_parser import parse_from_object

    found = parse_from_object(made)
    about = " ".join((found.description or "").split())
    return about, {p.arg_name: " ".join((p.description or "").split()) for p in found.params}


def _choices(kind: Any) -> str:
    """The words that a key may have, if it has any."""
    for one in (kind, *get_args(kind)):
        if get_origin(one) is Literal:
            return f" ({', '.join(get_args(one))})"
    return ""


def _inline(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
