"""A tokenizer of a few hundred tokens with a template: a check's time is in the vocabulary."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.data.test_chat import CHATML, TOKENS
from varlen_sft.tools.register_machine import register_machine_conversations

VOCAB = 320
PAD, BOS, EOS = 0, 1, 2


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json; ids of pad, BOS and EOS are 0, 1 and 2."""
    (folder / "tokenizer.json").write_text(_tokenizer(), encoding="utf-8")
    config = {**TOKENS, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@functools.cache
def _tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", TOKENS["bos_token"], TOKENS["eos_token"]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    talks = register_machine_conversations(50, 0, 1, 2)
    text = (message.content for talk in talks for message in talk.messages)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer.to_str()
