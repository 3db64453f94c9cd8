"""HF safetensors into a model: fused matrices are joined, no bit of a weight changes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from varlen_sft.models.llama import LlamaForSFT

__all__ = ["COMPANIONS", "INDEX", "WEIGHTS", "hf_parts", "load_weights", "weights_fingerprint"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of a checkpoint folder that belong to the tokenizer and generation, copied as they are."""


def hf_parts(model: LlamaForSFT) -> dict[str, list[tuple[str, int]]]:
    """For each parameter of the model, the HF tensors it is made of, with their row counts."""
    config = model.config
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    fused = {
        "qkv_proj": [("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)],
        "gate_up_proj": [(p, config.intermediate_size) for p in ("gate_proj", "up_proj")],
    }
    parts: dict[str, list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        hf_name = name if name.startswith("lm_head.") else f"model.{name}"
        *prefix, module, kind = hf_name.split(".")
        parts[name] = [
            (".".join((*prefix, part, kind)), rows)
            for part, rows in fused.get(module, [(module, parameter.shape[0])])
        ]
    return parts


def load_weights(
    model: LlamaForSFT, folder: str | Path, *, dtype: torch.dtype | None = None
) -> None:
    """Fill a model that was built on the meta device.

    Args:
        model: its parameters are replaced.
        folder: holds ``model.safetensors`` or ``model.safetensors.index.json`` with its shards.
        dtype: cast to it; None keeps the checkpoint's.

    Raises:
        InputError: no weights, a damaged file, tensors missing, unknown, or of another shape.
    """
    with _Weights(Path(folder)) as weights:
        parts = hf_parts(model)
        _check_names(weights, parts, model.config.tie_word_embeddings)
        for name, pieces in parts.items():
            wanted = model.get_parameter(name).shape
            tensors = [weights.read(key, (rows, *wanted[1:])) for key, rows in pieces]
            joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            _set_parameter(model, name, joined.to(dtype or joined.dtype))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight


def weights_fingerprint(folder: str | Path) -> str:
    """sha256 of the contents of the files that hold a checkpoint folder's weights.

    Raises:
        InputError: no weights, or a file that cannot be read.
    """
    paths = _weight_files(Path(folder))
    if not paths:
        raise InputError(f"neither {WEIGHTS} nor {INDEX}", file=folder)
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            digests = list(threads.map(_digest, paths))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=error.filename) from None
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    """As transformers looks for them, of which some models still have pickles."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return sorted({path for _, path in _read_index(folder / INDEX)})
    return sorted(folder.glob("*.bin"))


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(value))


def _check_names(weights: _Weights, parts: Mapping[str, list], tied: bool) -> None:
    wanted = {key for pieces in parts.values() for key, _ in pieces}
    missing = sorted(wanted - weights.files.keys())
    # Old checkpoints carry the frequencies; tied ones may carry the head they share.
    spare = ("rotary_emb.inv_freq", *(["lm_head.weight"] if tied else []))
    unknown = sorted(key for key in weights.files.keys() - wanted if not key.endswith(spare))
    for what, keys in (("lacks", missing), ("has unknown", unknown)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(f"the checkpoint {what} tensor {keys[0]}{more}", file=weights.folder)


class _Weights:
    """Tensors of a checkpoint folder by name, whichever files hold them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> _Weights:
        index = self.folder / INDEX
        if (self.folder / WEIGHTS).is_file():
            path = self.folder / WEIGHTS
            self.files = {key: path for key in self._handle(path).keys()}
        elif index.is_file():
            self.files = dict(_read_index(index))
        else:
            raise InputError(f"neither {WEIGHTS} nor {INDEX}", file=self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)

    def read(self, key: str, shape: tuple[int, ...]) -> Tensor:
        path = self.files[key]
        handle = self._handle(path)
        try:
            tensor = handle.get_tensor(key)
        except Exception as error:
            raise InputError(f"tensor {key} cannot be read: {error}", file=path) from error
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"tensor {key} must have shape {shape} by config.json, got {tuple(tensor.shape)}",
                file=path,
            )
        return tensor

    def _handle(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InputError(f"not a readable safetensors file: {error}", file=path) from error
        return self._open[path]


def _read_index(index: Path) -> Iterator[tuple[str, Path]]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise InputError(f"not a safetensors index: {error!r}", file=index) from error
    for key, name in weight_map.items():
        # The index is data: a shard lies beside it, wherever its name points.
        if name != os.path.basename(name):
            raise InputError(f"shard {name!r} must be a file of this folder", file=index)
        yield key, index.parent / name
