"""What a Llama is made of, read from HF's config.json without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varlen_sft.errors import InputError
from varlen_sft.rope_frequencies import resolve_rope_parameters

SUPPORTED_MODEL_TYPES = ("llama",)


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of a Llama, in the letters of this package."""

    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # I
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope_parameters: dict[str, Any]
    hf: dict[str, Any]
    """The parsed config.json, written back unchanged when a checkpoint is saved."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> LlamaConfig:
        """Read ``config.json`` of a checkpoint folder.

        Raises:
            InputError: no such file, not JSON, or a model that is not supported.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise InputError(
                "no config.json: a checkpoint folder in HF format is expected", file=folder
            )
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_hf(config)
        except (ValueError, KeyError) as error:
            what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(what, file=path) from error

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """From the dictionary of a HF config.

        Raises:
            ValueError: a family, activation or dropout that ``LlamaForSFT`` does not compute.
            KeyError: a size is missing.
        """
        _refuse_unsupported(hf)
        heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hidden,
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hidden // heads,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            rope_parameters=resolve_rope_parameters(hf),
            hf=dict(hf),
        )


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    family = hf.get("model_type")
    if family not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model_type must be one of {', '.join(SUPPORTED_MODEL_TYPES)}, got {family!r}"
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be 'silu', got {hf['hidden_act']!r}")
    if hf.get("attention_dropout"):
        raise ValueError(f"attention_dropout must be 0, got {hf['attention_dropout']}")
    if hf.get("quantization_config"):
        raise ValueError("quantised checkpoints are not supported: save it dequantised first")
