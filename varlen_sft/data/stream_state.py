"""Where a run is in its global order, as small JSON, and whether a state belongs to this order."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from varlen_sft.data.files import write_whole
from varlen_sft.data.order import OrderOptions
from varlen_sft.errors import InputError

__all__ = [
    "VERSION",
    "Position",
    "differences",
    "load_state",
    "read_options",
    "read_state",
    "save_state",
    "write_state",
]

VERSION = 1
_NUMBERS = ("seed", "epoch", "step", "packs_per_step")


@dataclass(frozen=True)
class Position:
    """The step that comes next."""

    epoch: int = 0
    step: int = 0  # in the epoch
    start: Mapping[str, Any] | None = None  # see Order.walk


def write_state(position: Position, options: OrderOptions, fingerprint: str) -> dict[str, Any]:
    """A position and all that has to be the same where it is loaded."""
    others = asdict(options)
    return {
        "version": VERSION,
        "fingerprint": fingerprint,
        "seed": others.pop("seed"),
        "epoch": position.epoch,
        "step": position.step,
        "packs_per_step": others.pop("packs_per_step"),
        "options": others,
        "window": None if position.start is None else dict(position.start),
    }


def read_state(state: Mapping[str, Any]) -> Position:
    """The position of a state, however its order was made.

    Raises:
        InputError: it is no state, or of another version.
    """
    if not isinstance(state, Mapping) or "version" not in state:
        raise InputError("the stream's state must be what state_dict() gave, has no version")
    if state["version"] != VERSION:
        raise InputError(
            f"the stream's state must be of version {VERSION}, is of {state['version']!r}"
        )
    for name in _NUMBERS:
        least = {"seed": None, "packs_per_step": 1}.get(name, 0)
        value = state.get(name)
        if type(value) is not int or (least is not None and value < least):
            raise InputError(f"{name} of the stream's state must be a whole number, is {value!r}")
    window = state.get("window")
    if not isinstance(state.get("options"), Mapping) or not isinstance(window, Mapping | None):
        raise InputError("options and window of the stream's state must be dictionaries")
    return Position(state["epoch"], state["step"], window)


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state to a JSON file, whole and on the disk, or not at all; OSError."""
    write_whole(Path(path), (json.dumps(state, indent=1) + "\n").encode())


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A state from its file.

    Raises:
        InputError: the file cannot be read, or holds no state.
    """
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from None
    try:
        read_options(state)
    except InputError as error:
        raise InputError(error.reason, file=path) from None
    return state


def read_options(state: Mapping[str, Any]) -> OrderOptions:
    """The options of the order that a state is of.

    Raises:
        InputError: it is no state, or of options that are not known here.
    """
    read_state(state)
    others = dict(state["options"])
    if others.get("weights") is not None:
        others["weights"] = tuple(others["weights"])
    try:
        return OrderOptions(seed=state["seed"], packs_per_step=state["packs_per_step"], **others)
    except TypeError as error:
        raise InputError(f"the stream's state has options of another kind: {error}") from None


def differences(state: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What decides the global batches and is not the same in two states, in words."""
    there, here = _deciding(state), _deciding(here)
    return [
        f"{name} was {there.get(name)!r}, is {here.get(name)!r}"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def _deciding(state: Mapping[str, Any]) -> dict[str, Any]:
    names = ("fingerprint", "seed", "packs_per_step")
    found = {name: state.get(name) for name in names} | dict(state["options"])
    return json.loads(json.dumps(found))  # tuples and lists are one
