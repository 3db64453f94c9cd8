"""Data for the demo: small real dialogues, and dialogues whose answers can be computed.

The real ones are the English chatterbot corpus (BSD-3), read from the installed package; the others
are register machine dialogues. Together they fill a train and a validation file that share no
question and no dialogue.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varlen_sft.data.formats import Conversation, Message, write_conversations
from varlen_sft.tools.register_machine import answer, register_machine_conversations

__all__ = [
    "DemoData",
    "answer",
    "chatterbot_conversations",
    "hold_out",
    "register_machine_conversations",
    "write_demo_data",
]


@dataclass(frozen=True)
class DemoData:
    """The written files and what went into them, see write_demo_data."""

    train: Path
    validation: Path
    counts: dict[str, int]


def chatterbot_conversations() -> tuple[list[Conversation], dict[str, int]]:
    """The English corpus, user and assistant in turn, without exact duplicates; and counts.

    White space around a message is stripped (it comes from YAML blocks). ``counts``: ``read`` lists
    in the corpus, ``kept``; not kept are ``malformed`` (not a list of texts), ``blank`` (a blank
    message), ``unanswered`` (one message only), ``duplicates``. From those kept,
    ``trailing_dropped`` last messages were dropped because nobody answers them.
    """
    counts = Counter(
        dict.fromkeys(
            ("read", "kept", "malformed", "blank", "unanswered", "duplicates", "trailing_dropped"),
            0,
        )
    )
    kept: dict[Conversation, None] = {}
    for lines in _chatterbot_lists():
        counts["read"] += 1
        reason = _unusable(lines)
        if reason:
            counts[reason] += 1
            continue
        conversation = _alternate([line.strip() for line in lines])
        if conversation in kept:
            counts["duplicates"] += 1
            continue
        kept[conversation] = None
        counts["trailing_dropped"] += len(lines) % 2
    counts["kept"] = len(kept)
    return list(kept), dict(counts)


def write_demo_data(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    n_dialogues: int = 2000,
    min_turns: int = 2,
    max_turns: int = 12,
    validation_share: float = 0.05,
) -> DemoData:
    """Write ``train.jsonl`` and ``validation.jsonl`` into folder (made if it is not there).

    About validation_share of each kind is held out, at least one dialogue. What the users say in a
    dialogue decides its side, by hash, so that no question stands on both.

    Args:
        folder: where to write.
        seed: of the register machine dialogues.
        n_dialogues: register machine dialogues, before duplicates are dropped.
        min_turns: user turns of the shortest of them.
        max_turns: user turns of the longest of them.
        validation_share: in (0, 1).

    Returns:
        Paths and counts: ``chatterbot_`` counts as chatterbot_conversations has them,
        ``register_machine_`` read, kept and duplicates, and for both kinds train and validation.

    Raises:
        ValueError: bad counts, or a share that leaves a side empty.
    """
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be in (0, 1), got {validation_share}")
    chatterbot, counts = chatterbot_conversations()
    drawn = register_machine_conversations(n_dialogues, seed, min_turns, max_turns)
    unique = list(dict.fromkeys(drawn))
    machine = {"read": len(drawn), "kept": len(unique), "duplicates": len(drawn) - len(unique)}
    all_counts: dict[str, int] = {}
    train: list[Conversation] = []
    validation: list[Conversation] = []
    for kind, conversations, kind_counts in (
        ("chatterbot", chatterbot, counts),
        ("register_machine", unique, machine),
    ):
        kept, held_out = hold_out(conversations, validation_share)
        kind_counts |= {"train": len(kept), "validation": len(held_out)}
        all_counts |= {f"{kind}_{name}": count for name, count in kind_counts.items()}
        train += kept
        validation += held_out
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = DemoData(folder / "train.jsonl", folder / "validation.jsonl", all_counts)
    write_conversations(data.train, train)
    write_conversations(data.validation, validation)
    return data


def _chatterbot_lists() -> list[Any]:
    import chatterbot_corpus
    import yaml

    folder = Path(chatterbot_corpus.__file__).parent / "data" / "english"
    lists: list[Any] = []
    for path in sorted(folder.glob("*.yml")):
        lists += yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
    return lists


def _unusable(lines: Any) -> str | None:
    """Why an entry of the corpus is not a conversation, as a name in the counts."""
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        return "malformed"  # YAML reads an unquoted yes, 42 or date as something else than text
    if not all(line.strip() for line in lines):
        return "blank"
    return "unanswered" if len(lines) < 2 else None


def _alternate(lines: Sequence[str]) -> Conversation:
    answered = lines[: len(lines) // 2 * 2]
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], line) for i, line in enumerate(answered)))


def hold_out(
    conversations: Sequence[Conversation], share: float
) -> tuple[list[Conversation], list[Conversation]]:
    """(kept, held out), each in the order given; the hash of what the user says decides.

    Raises:
        ValueError: a side would be empty.
    """
    keys = [_question_hash(conversation) for conversation in conversations]
    wanted = max(1, round(share * len(keys)))
    bound = sorted(keys)[wanted - 1] if keys else ""
    held_out = [c for c, key in zip(conversations, keys, strict=True) if key <= bound]
    kept = [c for c, key in zip(conversations, keys, strict=True) if key > bound]
    if not kept or not held_out:
        raise ValueError(
            f"{len(conversations)} dialogues cannot be split, {share} of them for validation"
        )
    return kept, held_out


def _question_hash(conversation: Conversation) -> str:
    # Case and white space aside, or "what is ai" would sit in both files.
    said = [m.content.casefold().split() for m in conversation.messages if m.role == "user"]
    return hashlib.sha256(repr(said).encode()).hexdigest()
