"""The keys of a configuration: what each is called here, and what others call it."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from varlen_sft.errors import InputError
from varlen_sft.train.config import TrainConfig
from varlen_sft.train.config_data import StageConfig

__all__ = ["ALIASES", "GROUPS", "KINDS", "STAGE_KEYS", "convert", "resolve", "unknown"]

_HINTS = get_type_hints(TrainConfig)
GROUPS: dict[str, Any] = {name: kind for name, kind in _HINTS.items() if name != "stages"}
"""Dataclass of each group."""

KINDS: dict[str, Any] = {
    f"{group}.{name}": kind
    for group, made in GROUPS.items()
    for name, kind in get_type_hints(made).items()
} | {"stages": _HINTS["stages"]}
"""Type of each key, by its path."""

STAGE_KEYS = tuple(field.name for field in fields(StageConfig))

_LEAVES = {path.rpartition(".")[2]: path for path in KINDS}
assert len(_LEAVES) == len(KINDS), "the last part of a key alone must name it"

ALIASES = {
    "base_model": "model.name",
    "gradient_checkpointing": "model.activation_checkpointing",
    "hf_dataset": "data.train",
    "hf_dataset_split": "data.train",
    "conversation_column_name": "data.conversation_column",
    "train_on_completions_only": "data.supervision_mode",
    "roles_to_train": "data.train_roles",
    "mock_data": "data.mock",
    "sample_packing": "stream.packing",
    "packed": "stream.packing",
    "remove_cross_attention": "stream.isolate",
    "max_seq_len": "stream.max_tokens",
    "sequence_len": "stream.max_tokens",
    "sequence_length": "stream.max_tokens",
    "num_loading_workers": "stream.threads",
    "learning_rate": "optim.lr",
    "lr_scheduler": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "output_dir": "run.out",
    "max_steps": "run.steps",
    "num_epochs": "run.epochs",
    "eval_steps": "run.valid_every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "use_tensorboard": "log.tensorboard",
    "wandb_project": "log.wandb",
    "data_stages": "stages",
}
"""Keys of nanotron, torchtune, axolotl and Hugging Face, and what they are here."""

_NOT_HERE = {
    "gradient_accumulation_steps": "stream.packs_per_step is the global batch, in packs; "
    "stream.accumulate only shares it out",
    "adapter": "for LoRA give model.lora_rank",
}
for _name in ("micro_batch_size", "per_device_train_batch_size", "batch_size", "global_batch_size"):
    _NOT_HERE[_name] = _NOT_HERE["gradient_accumulation_steps"]


def resolve(key: str, group: str | None = None) -> str:
    """The path of a key: ``optim.lr``, ``lr`` alone, or what others call it.

    Args:
        group: the mapping it stands in.

    Raises:
        InputError: no such key; names the nearest.
    """
    path = key if group is None else f"{group}.{key}"
    if path in KINDS:
        return path
    if group is None and key in _LEAVES:
        return _LEAVES[key]
    if key in ALIASES:
        return ALIASES[key]
    raise unknown(path, [*KINDS, *ALIASES])


def unknown(key: str, known: list[str]) -> InputError:
    """The error that names the key nearest to one that does not exist."""
    last = key.rpartition(".")[2]
    if last in _NOT_HERE:
        return InputError(f"unknown key {key}: {_NOT_HERE[last]}")
    by_last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    near = near or [by_last[n] for n in difflib.get_close_matches(last, by_last, n=1, cutoff=0.5)]
    if near:
        meant = ALIASES.get(near[0])
        told = near[0] if meant is None else f"{near[0]}, which is {meant}"
        return InputError(f"unknown key {key}; the nearest is {told}")
    return InputError(f"unknown key {key}; `varlen-sft train --print_config` prints all there are")


def convert(key: str, path: str, value: Any) -> Any:
    """What a value means under our own key: others say yes or no where we have words.

    Raises:
        InputError: neither yes nor no, where that is meant.
    """
    last = key.rpartition(".")[2]
    if last == "train_on_completions_only":
        return "assistant" if _yes_or_no(key, value) else "all"
    if path == "stream.packing" and isinstance(value, bool):
        return "planned" if value else "none"
    if last == "hf_dataset":
        return [f"hub:{name}" for name in as_list(value)]
    if is_list(KINDS[path]) and path != "stages" and isinstance(value, str | int | float):
        return [value]
    return value


def is_list(kind: Any) -> bool:
    """Whether a key holds a list of any length, of which one entry may stand alone."""
    options = [kind, *get_args(kind)]
    return any(get_origin(one) is tuple and get_args(one)[-1] is Ellipsis for one in options)


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as the one entry of a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _yes_or_no(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{key} must be true or false, is {value!r}")
    return value
