"""HF safetensors out of a model: fused matrices are cut, shards of ranks joined, no bit changes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from varlen_sft.models.checkpoint import COMPANIONS, INDEX, WEIGHTS, hf_parts

if TYPE_CHECKING:
    from varlen_sft.models.llama import LlamaForSFT

__all__ = ["MAX_SHARD_BYTES", "copy_companions", "full_weights", "save_checkpoint"]

MAX_SHARD_BYTES = 5 * 10**9


def save_checkpoint(
    model: LlamaForSFT,
    folder: str | Path,
    *,
    copy_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights, config and companions; a folder that HF's ``from_pretrained`` opens.

    Weights are written under HF's names, so a checkpoint that was loaded without a cast comes back
    bit for bit. Every file is written beside its place and then moved there. At most one shard of
    the weights is held in memory. Of a model that FSDP2 shards all ranks call it, and rank 0 alone
    writes, as it does wherever there is a process group.

    Args:
        model: on any device.
        folder: made if it is not there.
        copy_from: a checkpoint folder whose tokenizer and generation files are copied.
        max_shard_bytes: weights beyond it go to several files with an index.
    """
    folder, writes = Path(folder), _is_first()
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    plan = _plan(model, max_shard_bytes)
    tensors = _hf_tensors(model, kept=writes)
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(plan, start=1):
        name = WEIGHTS if len(plan) == 1 else f"model-{number:05}-of-{len(plan):05}.safetensors"
        shard = dict(islice(tensors, len(keys)))
        if writes:
            _write_shard(folder / name, shard)
        weight_map |= dict.fromkeys(keys, name)
    if not writes:
        return
    if len(plan) > 1:
        size = sum(size for _, size in _sizes(model))
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        (folder / WEIGHTS).unlink(missing_ok=True)  # a reader would prefer it to the index
    dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    _write_json(folder / "config.json", _with_dtype(model.config.hf, dtype))
    copy_companions(copy_from, folder)


def copy_companions(source: str | Path | None, folder: Path) -> None:
    """Copy tokenizer, template and generation files that are there."""
    for name in COMPANIONS:
        if source is not None and (path := Path(source) / name).is_file():
            _replace(folder / name, partial(shutil.copyfile, path))


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of any model on rank 0's CPU, and nothing on other ranks.

    For ``save_pretrained(state_dict=...)`` of models that are not ours. All ranks call it, since
    they join the shards that FSDP2 made, one tensor at a time. Names that share a parameter share a
    tensor.
    """
    writes = _is_first()
    found: dict[str, Tensor] = {}
    joined: dict[int, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in joined:
            whole = _whole(value)
            joined[id(value)] = whole.cpu() if writes else torch.empty(0)
        if writes:
            found[name] = joined[id(value)]
    return found


def _is_first() -> bool:
    group = torch.distributed
    return not (group.is_available() and group.is_initialized()) or group.get_rank() == 0


def _whole(value: Tensor) -> Tensor:
    full = getattr(value, "full_tensor", None)
    return (value if full is None else full()).detach()


def _sizes(model: LlamaForSFT) -> Iterator[tuple[str, int]]:
    """(name, bytes) of each HF tensor, in the order of ``_hf_tensors``."""
    for name, pieces in hf_parts(model).items():
        parameter = model.get_parameter(name)
        row = parameter.shape[1:].numel() * parameter.itemsize
        for key, rows in pieces:
            yield key, rows * row


def _plan(model: LlamaForSFT, limit: int) -> Sequence[Sequence[str]]:
    """The names of each shard. One tensor that is larger has a shard of its own."""
    plan: list[list[str]] = [[]]
    filled = 0
    for key, size in _sizes(model):
        if plan[-1] and filled + size > limit:
            plan.append([])
            filled = 0
        plan[-1].append(key)
        filled += size
    return plan


def _hf_tensors(model: LlamaForSFT, *, kept: bool) -> Iterator[tuple[str, Tensor | None]]:
    """The tensors one after the other; None in their place where nobody keeps them."""
    for name, pieces in hf_parts(model).items():
        whole = _whole(model.get_parameter(name))
        if not kept:
            yield from ((key, None) for key, _ in pieces)
            continue
        parts = whole.cpu().split([rows for _, rows in pieces])
        yield from ((key, part.contiguous()) for (key, _), part in zip(pieces, parts, strict=True))


def _write_shard(path: Path, shard: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    _replace(path, lambda made: save_file(shard, made, metadata={"format": "pt"}))


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    _replace(path, lambda made: made.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside and move into place: a full disk or a kill leaves the file that was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
