"""What ``varlen-sft show`` tells of its rows before their tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import ROLES
from varlen_sft.tools.pack_picture import visible
from varlen_sft.tools.show import Answer, Shown, target_weights
from varlen_sft.tools.show_rows import Piece

__all__ = ["facts"]


def facts(shown: Shown) -> dict[str, str]:
    """What is above the tokens, by name; the screen and the page say the same."""
    options = shown.options
    rows = list(dict.fromkeys(piece.row for piece in shown.pieces))
    told = {
        "file": str(options.file),
        **shown.step,
        "row" if len(rows) == 1 else "rows": ", ".join(map(str, rows)),
        "model": str(options.model),
        "tokens": _tokens(shown),
        "roles": _roles(shown.pieces),
        "stop token": _stop_token(shown.answers),
        **_counts(shown.pieces),
    }
    if masks := _masks(options.masks):
        told["masks"] = masks
    return told | (_pack(shown) if shown.is_pack else {})


def _tokens(shown: Shown) -> str:
    tokens = sum(len(piece.sample) for piece in shown.pieces)
    supervised = sum(label >= 0 for label in shown.picture.labels)
    if not supervised:
        return f"{tokens:,}, none supervised: there is nothing to train"
    return f"{tokens:,}, {supervised:,} supervised ({supervised / tokens:.1%})"


def _roles(pieces: Sequence[Piece]) -> str:
    told = []
    for number, role in enumerate(ROLES):
        weights = [target_weights(p.sample)[p.sample.roles == number] for p in pieces]
        tokens = sum(map(len, weights))
        supervised = sum(int((w > 0).sum()) for w in weights)
        if tokens:
            told.append(f"{role} {tokens:,}" + f" ({supervised:,} supervised)" * bool(supervised))
    return ", ".join(told)


def _stop_token(answers: Sequence[Answer]) -> str:
    """Of each kind of last token: how many answers it ends, and in how many it is trained."""
    told = []
    trained = [answer for answer in answers if answer.trained]
    for text, count in Counter(answer.last for answer in trained).items():
        stops = sum(answer.stop_trained for answer in trained if answer.last == text)
        how = {0: "NO stop token trained", count: "trained"}.get(stops, f"trained in {stops}")
        told.append(f"{visible(text)} ends {_answers(count)}, {how}")
    if rest := len(answers) - len(trained):
        told.append(f"{_answers(rest)} not trained at all")
    return "; ".join(told) or "no answer, so none"


def _answers(count: int) -> str:
    return f"{count} answer{'s' * (count > 1)}"


def _counts(pieces: Sequence[Piece]) -> dict[str, str]:
    """What the tokenizer met on the way; only cuts are told where there are none."""
    counts = sum((piece.counts for piece in pieces), Counter[str]())
    told = {"straddles cut": str(counts["straddles_cut"])}
    if counts["rewritten_turns"]:
        told["history"] = f"the thinking of {_answers(counts['rewritten_turns'])} is left out"
    if counts["spelled_control"]:
        told["control tokens"] = "spelled in a message, and kept as text there"
    return told


def _masks(options: MaskOptions) -> str:
    """Those that are not the default."""
    default = MaskOptions()
    changed = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if getattr(options, field.name) != getattr(default, field.name)
    }
    return ", ".join(
        f"{name} = {'+'.join(value) if isinstance(value, tuple) else value}"
        for name, value in changed.items()
    )


def _pack(shown: Shown) -> dict[str, str]:
    edges, tokens = shown.picture.edges, len(shown.picture.ids)
    lengths = np.diff(edges)
    full = f"{tokens:,} input tokens"
    if shown.capacity is not None:
        full += f" of {shown.capacity:,} ({tokens / shown.capacity:.1%} full)"
    pairs, causal = int((lengths * (lengths + 1) // 2).sum()), tokens * (tokens + 1) // 2
    return {
        "pack": f"{len(shown.pieces)} sequence{'s' * (len(shown.pieces) > 1)}, {full}",
        "cu_seqlens": " ".join(map(str, edges)),
        "attention": f"{pairs:,} of {causal:,} causal pairs ({pairs / causal:.1%}): "
        "no token sees another sequence",
    }
