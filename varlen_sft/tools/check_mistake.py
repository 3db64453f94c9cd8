"""A mistake in somebody's training set-up: what, where, what it does, how to mend it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from varlen_sft.errors import InputError
from varlen_sft.rope_frequencies import resolve_rope_parameters

__all__ = ["Mistake", "ModelFacts"]


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong; ``str`` tells it in four lines."""

    name: str
    what: str  # the evidence
    effect: str  # what it does to the training
    mend: str
    row: int | None = None  # of the batch, where the evidence is first seen
    column: int | None = None
    certain: bool = True
    """False: it looks like this mistake, and could be meant."""

    def __str__(self) -> str:
        word = "" if self.certain else " (suspected)"
        return (
            f"{self.name}{word}: {self.where()}{self.what}\n"
            f"  what it does: {self.effect}\n  how to mend it: {self.mend}"
        )

    def where(self) -> str:
        """Row and column, "" where it is about no place of a batch."""
        if self.row is None:
            return ""
        return f"row {self.row}, column {self.column}: "


@dataclass(frozen=True)
class ModelFacts:
    """What has to be known of a model to judge a batch for it."""

    pads: frozenset[int] = frozenset()
    stops: frozenset[int] = frozenset()
    bos: int | None = None
    rope: tuple[tuple[str, dict[str, Any]], ...] = ()
    """(layer type, or "" where all layers share one; as ``resolve_rope_parameters`` returns)."""
    query_size: int | None = None  # H * D
    patched: bool = False
    caches: bool = False
    """It will make a cache when it is called as it is, and its attention is not FlashAttention."""

    @classmethod
    def of(cls, model: Any) -> ModelFacts:
        """From a Hugging Face model, or from its config alone."""
        config = getattr(model, "config", model)
        generation = getattr(model, "generation_config", None)
        more = {} if generation is None else generation.to_dict()
        facts = cls.from_config(config.to_dict(), more)
        if config is model:  # what a Trainer will do to a config is not known yet
            return facts
        flash = "flash" in str(getattr(config, "_attn_implementation", ""))
        caches = bool(getattr(config, "use_cache", False)) and not flash
        return replace(facts, patched=_is_patched(model), caches=caches)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelFacts:
        """From a checkpoint folder; its weights are not read.

        Raises:
            InputError: no config.json, or a file that is not JSON.
        """
        config = _json(folder / "config.json")
        if config is None:
            raise InputError(
                "no config.json: a checkpoint folder in HF format is expected", file=folder
            )
        generation = _json(folder / "generation_config.json") or {}
        pad = _tokenizer_pad(folder)
        return cls.from_config(config, generation, pads=frozenset(_ids(pad)))

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        generation: Mapping[str, Any],
        *,
        pads: frozenset[int] = frozenset(),
    ) -> ModelFacts:
        """From the dictionaries of config.json and generation_config.json."""
        text = config.get("text_config")
        config = {**config, **text} if isinstance(text, Mapping) else config
        heads = config.get("num_attention_heads")
        width = config.get("head_dim") or (heads and config.get("hidden_size", 0) // heads)
        return cls(
            pads=pads | {*_ids(config.get("pad_token_id")), *_ids(generation.get("pad_token_id"))},
            stops=frozenset(
                _ids(config.get("eos_token_id")) + _ids(generation.get("eos_token_id"))
            ),
            bos=config.get("bos_token_id"),
            rope=tuple(rope_tables(config).items()),
            query_size=heads * width if heads and width else None,
        )


def rope_tables(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """RoPE parameters by layer type ("" where all share them); a type that is unknown is left out.

    Gemma 3 has a dictionary for each type of layer where others have one of numbers.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = given and all(value is None or isinstance(value, Mapping) for value in given.values())
    tables: dict[str, dict[str, Any]] = {}
    for kind, parameters in (given if nested else {"": given}).items():
        if parameters is None:  # layers without RoPE
            continue
        try:
            tables[kind] = resolve_rope_parameters({**config, "rope_parameters": parameters})
        except ValueError:
            continue
    return tables


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]


def _tokenizer_pad(folder: Path) -> int | None:
    """The id of the pad token by the tokenizer's own files: collators ask the tokenizer."""
    named = (_json(folder / "tokenizer_config.json") or {}).get("pad_token")
    text = named.get("content") if isinstance(named, Mapping) else named
    added = (_json(folder / "tokenizer.json") or {}).get("added_tokens") or []
    return next((token["id"] for token in added if token["content"] == text), None)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"not JSON: {error}", file=path) from error
    if not isinstance(read, dict):
        raise InputError("must hold a JSON object", file=path)
    return read


def _is_patched(model: Any) -> bool:
    """Whether ``varlen_sft.patch`` has been called on it: if so, its module has been imported."""
    hf = sys.modules.get("varlen_sft.integrations.hf")
    if hf is None:
        return False
    try:
        return hf.is_patched(model)
    except TypeError:  # a model of one's own, which patch does not take
        return False
