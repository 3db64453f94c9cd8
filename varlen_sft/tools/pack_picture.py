"""One pack drawn token by token: role, position, target, and where sequences begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.tools.page import Html, tag

if TYPE_CHECKING:
    from varlen_sft.data.batch import PackedBatch

__all__ = ["STYLE", "PackPicture", "draw", "picture_pack", "spelled", "visible"]

SIGNS = {"\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5", " ": "\u00b7"}
FILTERS = ("everything", "targets", *ROLES)  # the radio button of a role is #f2 and on


def _role_style(number: int, role: str) -> str:
    return (
        f".{role} {{ --role: var(--{role}); }}\n"
        f"#f{number}:checked ~ .sequence .t:not(.{role}) {{ opacity: .15; }}\n"
    )


STYLE = """
.pack { --none: #8a94a0; --system: #8e44d8; --user: #1f6fd0; --assistant: #1f9440;
  --tool: #d97a0a; position: relative; }
.sequence { border-top: 3px solid var(--fg); margin: 14px 0 0; padding: 4px 0 0; }
.sequence h3 { font-size: .85rem; margin: 0 0 4px; }
.t { display: inline-flex; flex-direction: column; margin: 0 2px 4px 0; padding: 0 3px;
  min-width: 1.7em; max-width: 100%; vertical-align: top; text-align: center; border-radius: 3px;
  border-bottom: 4px solid transparent; unicode-bidi: isolate;
  font: 13px/1.4 ui-monospace, monospace;
  background: color-mix(in srgb, var(--role) 24%, var(--bg)); }
.t i { font: 10px/1.3 system-ui, sans-serif; color: var(--dim); }
.t b { font-size: 11px; font-weight: 600; min-height: 1.4em; }
.t.s { border-bottom-color: var(--fg); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: start; margin: 10px 0; }
.pack input { position: absolute; opacity: 0; }
.pack label { display: inline-block; border: 1px solid var(--line); border-radius: 99px;
  padding: 2px 10px; margin: 0 4px 6px 0; font-size: .85rem; cursor: pointer; }
input:checked + label { background: var(--fg); color: var(--bg); }
input:focus-visible + label { outline: 2px solid var(--a); outline-offset: 2px; }
#f1:checked ~ .sequence .t:not(.s), #chosen:checked ~ .sequence .t.x { opacity: .15; }
""" + "".join(_role_style(number, role) for number, role in enumerate(ROLES, 2))


@dataclass(frozen=True)
class PackPicture:
    """What is drawn of one pack of T rows."""

    ids: list[int]  # (T,)
    texts: list[str]  # (T,)
    roles: list[str]  # (T,)
    positions: list[int]  # (T,)
    labels: list[int]  # (T,), -100 where there is no target
    label_texts: list[str]  # (T,), "" where there is no target
    weights: list[float]  # (T,)
    edges: list[int]  # (B + 1,) from 0 to T
    pad_tokens: int  # at the end of T
    names: tuple[str, ...] = ()  # (B,) where each sequence comes from, or nothing to tell


def picture_pack(
    samples: Sequence[Sample],
    batch: PackedBatch,
    tokenizer: ChatTokenizer,
    names: Sequence[str] = (),
) -> PackPicture:
    """Everything the page says about one pack.

    Args:
        samples: those of the pack, in its order; they know the roles.
        batch: what a model is given, on any device.
        tokenizer: spells single tokens; a part of a character becomes U+FFFD.
        names: where each sample comes from, to be told beside its number.

    Raises:
        ValueError: the samples are not those of the batch, or an id is not the tokenizer's.
    """
    ids, labels = batch.input_ids.tolist(), batch.labels.tolist()
    if np.concatenate([s.input_ids[:-1] for s in samples]).tolist() != ids[: batch.real_tokens]:
        raise ValueError("samples must be those of the batch, in its order: their ids differ")
    roles = [ROLES[role] for sample in samples for role in sample.roles[:-1]]
    texts = {token: spelled(tokenizer, [token], ids[0]) for token in {*ids, *labels} - {-100}}
    return PackPicture(
        ids=ids,
        texts=[texts[token] for token in ids],
        roles=roles + ["none"] * batch.pad_tokens,
        positions=batch.position_ids.tolist(),
        labels=labels,
        label_texts=["" if label < 0 else texts[label] for label in labels],
        weights=batch.token_weights.tolist(),
        edges=batch.cu_seqlens.tolist(),
        pad_tokens=batch.pad_tokens,
        names=tuple(names),
    )


def spelled(tokenizer: ChatTokenizer, ids: Sequence[int], anchor: int) -> str:
    """The text of ids in the middle of a row: at its start some decoders leave out a space.

    Args:
        anchor: any id, best a control token, for the ids to stand after.
    """
    before = tokenizer.decode([anchor])
    text = tokenizer.decode([anchor, *ids])
    # Where the anchor is a part of a character the two may be one.
    apart = text.startswith(before) and len(text) > len(before)
    return text[len(before) :] if apart else tokenizer.decode(ids)


def visible(text: str) -> str:
    """White space as signs; what cannot be seen, or would turn the line around, as its number."""
    shown = (SIGNS.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)
    return "".join(shown)


def draw(pack: PackPicture, roles: Sequence[str] = ()) -> Html:
    """The pack with a legend and buttons that dim all but one kind of token (no script).

    Args:
        pack: what is drawn.
        roles: those that are not dim at first; all where there are none.
    """
    sequences = [
        _sequence(pack, number, start, end, roles)
        for number, (start, end) in enumerate(pairwise(pack.edges), 1)
        if end > start
    ]
    return tag("div", *_buttons(roles), _legend(), *sequences, class_="pack", id="pack")


def _buttons(roles: Sequence[str]) -> list[Html]:
    names = {f"f{number}": name for number, name in enumerate(FILTERS)}
    pressed = "f0"
    if len(roles) == 1:
        pressed = f"f{FILTERS.index(roles[0])}"
    elif roles:  # no button shows two roles: they get one of their own
        pressed = "chosen"
        names[pressed] = ", ".join(roles)
    drawn: list[Html] = []
    for name, text in names.items():
        checked = "" if name == pressed else None
        drawn.append(tag("input", type="radio", name="shown", id=name, checked=checked))
        drawn.append(tag("label", text, for_=name))
    return drawn


def _legend() -> Html:
    role = (tag("span", "text", tag("i", name), tag("b"), class_=f"t {name}") for name in ROLES)
    return tag(
        "div",
        *role,
        tag("span", "text", tag("i", "position"), tag("b", "\u2192target"), class_="t none s"),
        tag("span", "thick rule and \u2192: this row is trained to say the target next"),
        class_="legend",
        aria_hidden="true",
    )


def _sequence(pack: PackPicture, number: int, start: int, end: int, roles: Sequence[str]) -> Html:
    """One block: a rule, what it is, and its tokens."""
    targets = sum(label >= 0 for label in pack.labels[start:end])
    padding = start >= len(pack.ids) - pack.pad_tokens
    origin = "" if padding or not pack.names else f" ({pack.names[number - 1]})"
    name = f"sequence {number}{origin}, {end - start} tokens, " + (
        "padding" if padding else f"{targets} targets"
    )
    tokens = Html("\n".join(_token(pack, row, roles) for row in range(start, end)))
    data = {"data_tokens": end - start, "data_targets": targets}
    return tag("div", tag("h3", name), tokens, class_="sequence", **data)


def _token(pack: PackPicture, row: int, roles: Sequence[str]) -> Html:
    label, role = pack.labels[row], pack.roles[row]
    text, position = visible(pack.texts[row]), pack.positions[row]
    target = f"{visible(pack.label_texts[row])} (id {label})" if label >= 0 else "no target"
    hover = (
        f"{text} (id {pack.ids[row]}), {role}\nposition {position}, row {row}\n"
        f"target: {target}\nweight {pack.weights[row]:g}"
    )
    below = tag("i", position), tag("b", f"\u2192{visible(pack.label_texts[row])}" * (label >= 0))
    return tag(
        "span",
        text,
        *below,
        class_=f"t {role}{' s' * (label >= 0)}{' x' * (bool(roles) and role not in roles)}",
        title=hover,
        data_id=pack.ids[row],
        data_pos=position,
        data_label=label,
        data_weight=pack.weights[row],
        data_role=role,
    )
