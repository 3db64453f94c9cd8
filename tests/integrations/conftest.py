"""What the tests of trainers share, made once: a folder with a tiny model, chats, two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_hf_config, tiny_model
from tests.integrations.steps import run_ranks

ANSWERS = ("hello", "good morning to you", "no", "as you like it", "so it is", "well", "a b", "d")


@pytest.fixture(scope="session")
def folder(tmp_path_factory, smollm2_tokenizer_dir) -> Path:
    """A Llama with SmolLM2's tokenizer and vocabulary, and next to no weights."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_hf_config(vocab_size=49152, max_position_embeddings=512)
    config["architectures"] = ["LlamaForCausalLM"]
    tiny_model(config, torch.float32).save_pretrained(folder, copy_from=smollm2_tokenizer_dir)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """Eight short conversations as JSON lines."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"say {text}"}, {"role": "assistant", "content": text}]
        for text in ANSWERS
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory, folder, chats) -> tuple[dict, Path]:
    """What ``two_ranks.py`` found, and the folder of its checkpoints. One start of two processes
    serves all tests: they take longer to import than to train."""
    out = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_ranks.py")
    run_ranks(script, str(out), str(folder), str(chats))
    return torch.load(out / "results.pt"), out
