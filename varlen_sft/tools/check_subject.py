"""The model whose packs are checked: LlamaForSFT, or any other family after ``patch``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from varlen_sft.data.batch import PackedBatch
from varlen_sft.errors import InputError
from varlen_sft.models.checkpoint import hf_parts
from varlen_sft.models.config import LlamaConfig
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.modules import RotaryEmbedding
from varlen_sft.types import LossOutput, Sequences

__all__ = ["PatchedModel", "load_model", "hf_model", "hf_names", "rotary_tables", "vocab_size"]


class PatchedModel:
    """A patched Hugging Face model with the methods of ``LlamaForSFT`` that a check calls.

    Args:
        hf: a ``*ForCausalLM`` that is not patched yet; it is from now on.

    Raises:
        ValueError: ``patch`` refuses it.
    """

    def __init__(self, hf: Any) -> None:
        from varlen_sft.integrations.families import family_of
        from varlen_sft.integrations.hf import patch

        self.report = patch(hf)
        self.hf = hf
        self.family = family_of(hf.config)
        base = hf.base_model
        self.embed_tokens: nn.Module = base.embed_tokens
        self.layers: nn.ModuleList = base.layers
        self.norm: nn.Module = base.norm

    def __call__(self, batch: PackedBatch) -> LossOutput:
        from varlen_sft.integrations.packed import Packed

        ids, packed = batch.input_ids[None], Packed.from_batch(batch)
        return self.hf(input_ids=ids, packed=packed, skip_logits=True).loss_output

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, sequences: Sequences
    ) -> Tensor:
        """(T, C) after the last norm."""
        from varlen_sft.integrations.packed import Packed

        packed = Packed(sequences, position_ids)
        return self.hf.base_model(input_ids=input_ids[None], packed=packed).last_hidden_state[0]

    def lm_head(self, hidden: Tensor) -> Tensor:
        """(rows, V) logits, as the family scales and caps them."""
        logits = self.hf.lm_head(hidden) * self.family.logit_scale(self.hf.config)
        softcap = self.family.logit_softcap(self.hf.config)
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.hf.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.hf.parameters()

    def get_parameter(self, name: str) -> nn.Parameter:
        return self.hf.get_parameter(name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.hf.zero_grad(set_to_none=set_to_none)


Packing = LlamaForSFT | PatchedModel
"""What computes packs."""


def load_model(folder: Path, dtype: torch.dtype) -> Packing:
    """LlamaForSFT where the folder holds a Llama, else its Hugging Face model, patched.

    Raises:
        InputError: a family that is not supported, or weights that cannot be read.
    """
    if _config(folder).get("model_type") == "llama":
        return LlamaForSFT.from_pretrained(folder, dtype=dtype)
    try:
        return PatchedModel(hf_model(folder, dtype))
    except ValueError as error:
        raise InputError(str(error), file=folder) from error


def vocab_size(folder: Path) -> int:
    """V of a checkpoint folder that can be checked; its weights are not read.

    Raises:
        InputError: no config, or a family that is not supported.
    """
    config = _config(folder)
    if config.get("model_type") == "llama":
        return LlamaConfig.from_folder(folder).vocab_size
    from varlen_sft.integrations.families import family_of

    try:
        family_of(SimpleNamespace(**config))
        return int(config["vocab_size"])
    except (ValueError, KeyError) as error:
        raise InputError(str(error), file=folder / "config.json") from error


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            "no config.json: a checkpoint folder in HF format is expected", file=folder
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(error), file=path) from error
    if not isinstance(config, dict):
        raise InputError("must hold a JSON object", file=path)
    return config


def hf_model(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own model with its eager attention, in evaluation mode.

    Its embedding drops the input gradient of ``pad_token_id``, which in many checkpoints is the
    stop token: that is taken away here, so that its gradients are those of the loss.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would write into ours
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()
    model.base_model.embed_tokens.padding_idx = None
    return model


def hf_names(model: Packing) -> dict[str, list[tuple[str, int]]]:
    """For each parameter the HF tensors it is made of, with their row counts."""
    if isinstance(model, LlamaForSFT):
        return hf_parts(model)
    return {name: [(name, p.shape[0])] for name, p in model.named_parameters()}


def rotary_tables(model: Packing) -> dict[str | None, RotaryEmbedding]:
    """What turns q and k, by layer type; by None where one table serves all layers."""
    if isinstance(model, LlamaForSFT):
        return {None: model.rotary}
    from varlen_sft.integrations.hf_call import call_of

    return dict(call_of(model.hf.base_model).tables)
