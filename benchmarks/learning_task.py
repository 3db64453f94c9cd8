"""The task of the learning benchmark: dialogues, those held out, and a model that starts empty."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from varlen_sft.data.formats import Conversation
from varlen_sft.tools.demo_data import write_conversations
from varlen_sft.tools.register_machine import register_machine_conversations

__all__ = ["SIZES", "Dialogues", "draw", "write_model", "write_rows"]

PAD, END = "<pad>", "<|end|>"
SPECIAL = (PAD, "<|system|>", "<|user|>", "<|assistant|>", END, "<unk>")
CHARACTERS = ("\n", *map(chr, range(32, 127)))
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIZES = {
    "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32,
}  # fmt: skip
_SYSTEM_KEPT = 14
"""Every second dialogue has the system prompt, which is longer than the rest of it and always the
same: one in seven of those is trained, so that time goes into what is new."""
_HELD_OUT_SEED = 2 * 10**6  # no run's own


class Dialogues(NamedTuple):
    """What is trained, and what the model never sees."""

    short: list[Conversation]
    train: list[Conversation]
    held_out: list[Conversation]


def draw(count: int, held_out: int, seed: int, min_turns: int, max_turns: int) -> Dialogues:
    """Different dialogues; those held out are the same for every seed.

    Args:
        count: drawn to train on; less those that come twice or whose users say what is held out.
        held_out: how many.
        seed: of the training dialogues.
        min_turns, max_turns: user turns of a dialogue. Short ones have 1 to min_turns, and no
            system prompt.
    """
    talks = register_machine_conversations
    kept = list(dict.fromkeys(talks(3 * held_out, _HELD_OUT_SEED, min_turns, max_turns)))[:held_out]
    short = [c for c in talks(count, seed, 1, min_turns) if _begins_with_user(c)]
    drawn = enumerate(talks(2 * count, seed, min_turns, max_turns))
    train = [c for k, c in drawn if _begins_with_user(c) or k % _SYSTEM_KEPT == 0]
    return Dialogues(_but(short, kept), _but(train, kept), kept)


def _begins_with_user(dialogue: Conversation) -> bool:
    return dialogue.messages[0].role == "user"


def _but(drawn: Sequence[Conversation], held_out: Sequence[Conversation]) -> list[Conversation]:
    said = {_users(dialogue) for dialogue in held_out}
    return [dialogue for dialogue in dict.fromkeys(drawn) if _users(dialogue) not in said]


def _users(dialogue: Conversation) -> tuple[str, ...]:
    """What the users say decides the answers; a system prompt makes no new dialogue."""
    return tuple(m.content for m in dialogue.messages if m.role == "user")


def write_rows(path: Path, rows: Sequence[Conversation]) -> str:
    """JSON lines; the path as the configuration names a source."""
    write_conversations(path, rows)
    return str(path)


def write_model(folder: Path, sizes: Mapping[str, int] = SIZES) -> Path:
    """config.json of a small Llama and its tokenizer, without weights: one token a character."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": json.dumps(_TOKENIZER_CONFIG),
        "config.json": json.dumps(_config(sizes)),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": END,
    "unk_token": "<unk>", "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
}  # fmt: skip


def _tokenizer() -> str:
    """tokenizer.json: special tokens, and each printable ASCII character."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer.to_str()


def _config(sizes: Mapping[str, int]) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "vocab_size": len(SPECIAL) + len(CHARACTERS), "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": True,
        "initializer_range": 0.08,  # about 1 / sqrt(C): with 0.02 attention is flat for long
        "bos_token_id": None, "pad_token_id": SPECIAL.index(PAD),
        "eos_token_id": SPECIAL.index(END), **sizes,
    }  # fmt: skip
