"""A tiny Llama with tokenizer and template, conversations, and a configuration that trains it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.data.prepared import chats, jsonl
from tests.data.prepared import model_folder as tokenizer_folder
from tests.helpers import tiny_hf_config, tiny_model
from varlen_sft.train.config import TrainConfig
from varlen_sft.train.config_file import parse_config


def llama_folder(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Random weights of a Llama, as a folder in Hugging Face's format."""
    tokenizer_folder(folder)

    config = tiny_hf_config(vocab_size=400, max_position_embeddings=256, **changes)
    tiny_model(config, dtype).save_pretrained(folder)
    return folder


def small_run(folder: Path, *arguments: str, text: str = "") -> TrainConfig:
    """Forty short conversations in packs of 128 tokens, four of them a step, six steps in fp32."""
    model = folder / "llama"
    if not model.exists():
        llama_folder(model)
        jsonl(folder / "chats.jsonl", chats())
        jsonl(folder / "valid.jsonl", chats(9))
    least = f"""
model: {{name: '{model}', dtype: fp32}}
data: {{train: '{folder}/chats.jsonl', valid: '{folder}/valid.jsonl', processes: 1}}
stream: {{max_tokens: 128, packs_per_step: 4, threads: 0}}
run: {{out: '{folder}/out', steps: 6}}
"""
    return parse_config(text or least, arguments)
