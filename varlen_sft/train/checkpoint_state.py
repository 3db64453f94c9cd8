"""States as tensors and JSON, and the parts of a run's state that no other room owns."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from varlen_sft.errors import InputError

__all__ = ["ModelState", "RandomState", "RunIds", "Stateful", "joined", "parted"]


class Stateful(Protocol):
    """What a checkpoint holds, as in torch: numbers, text and tensors in dictionaries."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class ModelState:
    """Parameters and persistent buffers of a model, sharded or not, by the model's own names.

    A matrix that two modules share is held once.

    Args:
        model: as it is trained.
        base: fingerprint of the files that frozen parameters come from: such parameters are not
            held then, but the fingerprint is. None holds all.
    """

    def __init__(self, model: nn.Module, base: str | None = None) -> None:
        self.model, self.base = model, base

    def state_dict(self) -> dict[str, Any]:
        return dict(self._held()) | ({} if self.base is None else {"base": self.base})

    def require_base(self, state: Mapping[str, Any], file: Path) -> None:
        """Refuse to go on with other frozen weights than those of a state.

        Args:
            state: as it was saved; what is no tensor is enough.
            file: it comes from, for errors.

        Raises:
            InputError: what is frozen came from other files.
        """
        there = state.get("base")
        if None not in (self.base, there) and there != self.base:
            raise InputError(
                "holds only what is trained, and the model's own files are not those that the run "
                f"began with: their fingerprint was {there}, is {self.base}",
                file=file,
            )

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self._held():
            value.copy_(state[name])

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        kept = set(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            if name in kept and (self.base is None or parameter.requires_grad):
                yield _own_name(name), parameter.detach()
        for name, buffer in self.model.named_buffers():
            if name in kept:
                yield _own_name(name), buffer.detach()


class RandomState:
    """Where this rank's random numbers are: of torch on CPU and device, of numpy, of Python.

    Ranks draw their own, and each finds its own again. A rank that the saved run did not have goes
    on with the numbers it has.

    Args:
        rank: of this process.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        version, words, spare = random.getstate()
        drawn = np.random.get_state(legacy=False)
        assert isinstance(drawn, dict)
        inner = drawn["state"]
        state = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(words, dtype=torch.int64),
            "python_spare": _number(spare),
            "numpy": torch.tensor([*inner["key"].tolist(), inner["pos"]], dtype=torch.int64),
            "numpy_spare": _number(drawn["gauss"] if drawn["has_gauss"] else None),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return {f"rank-{self.rank}": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        found = state.get(f"rank-{self.rank}")
        if found is None:
            return
        torch.set_rng_state(found["torch"])
        words = tuple(found["python"].tolist())
        random.setstate((3, words, _spare(found["python_spare"])))
        *key, at = found["numpy"].tolist()
        spare = _spare(found["numpy_spare"])
        np.random.set_state(("MT19937", key, at, int(spare is not None), spare or 0.0))
        if "cuda" in found and torch.cuda.is_available():
            torch.cuda.set_rng_state(found["cuda"])


class RunIds(dict[str, str]):
    """Names under which others know the run ({"wandb": ...}), to go on under the same ones."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        self.update(state)


def parted(name: str, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a state by their full names, and all else, which has to fit JSON.

    Returns:
        Tensors, in the same memory; and a copy of the rest.

    Raises:
        ValueError: a name with a dot, which could be taken for a part of another state.
        TypeError: a key that is no string, a tensor within a list, a value that JSON has not.
    """
    if "." in name:
        raise ValueError(f"a state's name must have no dot, got {name!r}")
    tensors, rest = dict(_tensors(name, state)), _rest(state)
    try:
        return tensors, json.loads(json.dumps(rest))
    except TypeError as error:
        raise TypeError(f"the state of {name} must be tensors and JSON: {error}") from None


def joined(
    name: str,
    rest: Mapping[str, Any],
    live: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """A state again.

    Args:
        name: of the whole state.
        rest: of ``parted``, as it was saved.
        live: of the object as it is, which says where the tensors belong.
        tensors: of ``parted``, as they were saved. One that was not is left out.
    """
    made = dict(rest)
    for key, value in live.items():
        if isinstance(value, Tensor):
            if f"{name}.{key}" in tensors:
                made[key] = tensors[f"{name}.{key}"]
        elif isinstance(value, Mapping) and _has(f"{name}.{key}", value, tensors):
            made[key] = joined(f"{name}.{key}", made.get(key, {}), value, tensors)
    return made


def _has(name: str, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    return any(key in tensors for key, _ in _tensors(name, state))


def _tensors(name: str, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"keys of {name} must be strings, got {key!r}")
        if isinstance(value, Tensor):
            yield f"{name}.{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(f"{name}.{key}", value)


def _rest(state: Mapping[str, Any]) -> dict[str, Any]:
    """All but the tensors, and but the dictionaries that hold nothing else."""
    rest = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and value:
            if inner := _rest(value):
                rest[key] = inner
        elif not isinstance(value, Tensor):
            rest[key] = value
    return rest


def _own_name(name: str) -> str:
    """Without what DDP, torch.compile and activation checkpointing put into it."""
    added = ("_orig_mod", "_checkpoint_wrapped_module")
    parts = [part for part in name.split(".") if part not in added]
    return ".".join(parts[1:] if parts[0] == "module" else parts)


def _number(value: float | None) -> Tensor:
    return torch.tensor(math.nan if value is None else value, dtype=torch.float64)


def _spare(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)
