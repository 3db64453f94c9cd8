"""The model of a run: LlamaForSFT, or any patched Hugging Face model behind the same forward."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from varlen_sft.data.batch import PackedBatch
from varlen_sft.errors import InputError
from varlen_sft.models.checkpoint import weights_fingerprint
from varlen_sft.models.config import SUPPORTED_MODEL_TYPES, LlamaConfig
from varlen_sft.models.export import MAX_SHARD_BYTES, copy_companions, full_weights
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.train.config import ModelConfig
from varlen_sft.train.optimizer import freeze
from varlen_sft.train.parallel import blocks
from varlen_sft.types import LossOutput

__all__ = ["DTYPES", "PatchedForSFT", "base_fingerprint", "load_model", "model_folder"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HUB = "hub:"
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]


class PatchedForSFT(nn.Module):
    """A Hugging Face model that ``varlen_sft.patch`` changed, with the forward of LlamaForSFT.

    Args:
        model: patched, or a PEFT model around one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch) -> LossOutput:
        """Weighted loss of a pack, see ``LlamaForSFT.forward``."""
        from varlen_sft.integrations.packed import Packed

        packed = Packed.from_batch(batch)
        made = self.model(input_ids=batch.input_ids[None], packed=packed, skip_logits=True)
        return made.loss_output

    def save_pretrained(self, folder: str | Path, *, copy_from: str | Path | None = None) -> None:
        """Write what HF's ``from_pretrained`` opens; of a PEFT model the adapter.

        All ranks call it, rank 0 writes, see ``models.export``.
        """
        weights = full_weights(self.model)
        if weights:
            model: Any = self.model
            # transformers' own limit is 50 GB; PEFT has no use for one.
            model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD_BYTES)
            copy_companions(copy_from, Path(folder))


def model_folder(name: str) -> Path:
    """The folder of a model: its own, or where ``hub:OWNER/NAME`` was downloaded to.

    Raises:
        InputError: no such folder, nothing of that name on the hub, or no network.
    """
    if not name.startswith(HUB):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            on_hub = f" (on the hub? then {HUB}{name})" if name.count("/") == 1 else ""
            raise InputError(f"no such folder{on_hub}", file=folder)
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=_FILES))
    except (OSError, ValueError) as error:  # HTTP and name errors are such
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot be downloaded: {first}", file=name) from None


def load_model(config: ModelConfig, folder: Path, seed: int = 0) -> LlamaForSFT | PatchedForSFT:
    """Weights on the CPU, what is frozen frozen; to be moved and wrapped by whoever trains it.

    The same weights on every rank: random ones, LoRA's too, follow from the seed alone.

    Args:
        config: see there.
        folder: of ``model_folder``.
        seed: of random weights.

    Returns:
        A module that takes a PackedBatch and gives a LossOutput.

    Raises:
        InputError: a folder that holds no such model, a family that is not supported, patterns
            that match no parameter, or that freeze them all.
    """
    impl = config.impl or _impl(config, folder)
    model = _own(config, folder, seed) if impl == "own" else _patched(config, folder, seed)
    freeze(model, config.frozen)
    return model.train()


def base_fingerprint(config: ModelConfig, folder: Path) -> str | None:
    """Of the files that frozen parameters come from; None if all are trained, or random.

    A checkpoint need not hold what is in those files, as long as they stay what they were.
    """
    if config.random_init or not (config.lora_rank or config.frozen):
        return None
    return weights_fingerprint(folder)


def _impl(config: ModelConfig, folder: Path) -> str:
    """Own for what LlamaForSFT computes, transformers for all else."""
    import json

    if config.lora_rank:
        return "hf"
    try:
        family = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return "own"  # which says what is wrong with the file
    return "own" if family in SUPPORTED_MODEL_TYPES else "hf"


def _own(config: ModelConfig, folder: Path, seed: int) -> LlamaForSFT:
    dtype = DTYPES[config.dtype]
    if config.random_init:
        model = _random_llama(LlamaConfig.from_folder(folder), seed).to(dtype)
    else:
        model = LlamaForSFT.from_pretrained(folder, dtype=dtype)
    for block in model.layers:
        if config.compile:
            _compile(block)
        if config.activation_checkpointing:
            from torch.utils.checkpoint import checkpoint

            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def _random_llama(sizes: LlamaConfig, seed: int) -> LlamaForSFT:
    with torch.device("meta"):  # nothing is drawn twice
        model = LlamaForSFT(sizes)
    model.to_empty(device="cpu")
    if sizes.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    std = sizes.hf.get("initializer_range", 0.02)  # as transformers does it, and its default
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def _patched(config: ModelConfig, folder: Path, seed: int) -> PatchedForSFT:
    import transformers

    import varlen_sft

    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _transformers_model(transformers, config, folder)
            if config.lora_rank:
                model = _with_lora(model, config.lora_rank)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(str(error).strip().splitlines()[0], file=folder) from error
    try:
        varlen_sft.patch(model, prune_last_layer=not config.activation_checkpointing)
    except ValueError as error:
        raise InputError(str(error), file=folder) from error
    if config.activation_checkpointing:
        _recompute(model)
    if config.compile:
        for block in blocks(model):
            _compile(block)
    return PatchedForSFT(model)


def _transformers_model(transformers: Any, config: ModelConfig, folder: Path) -> Any:
    dtype = DTYPES[config.dtype]
    if not config.random_init:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    sizes = transformers.AutoConfig.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_config(sizes, dtype=dtype)


def _with_lora(model: Any, rank: int) -> Any:
    import peft

    # Adapters in the model's dtype: the optimiser keeps fp32 weights, and FSDP wants one dtype.
    lora = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that PEFT asks transformers for
        return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)


def _recompute(model: Any) -> None:
    """Transformers' own checkpointing, under the name that the installed version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _compile(block: Any) -> None:
    """Of the instance, not by a wrapper: names of parameters stay."""
    block.forward = torch.compile(block.forward, dynamic=True)
