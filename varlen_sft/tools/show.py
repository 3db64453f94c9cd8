"""``varlen-sft show``: what a row of a file trains, token by token, or a pack of rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from varlen_sft.data.batch import collate
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.errors import InputError
from varlen_sft.tools.pack_picture import PackPicture, picture_pack, spelled, visible
from varlen_sft.tools.show_rows import Piece, chosen, planned
from varlen_sft.tools.show_step import check_step_options, step_pieces

if TYPE_CHECKING:
    from rich.console import Console

    from varlen_sft.data.order import OrderOptions

__all__ = ["Answer", "Run", "ShowOptions", "Shown", "gather", "readable", "run", "target_weights"]

MAX_TOKENS = 2048  # of a planned pack, as in the demo
PACK_ROWS = 256
ASSISTANT = ROLES.index("assistant")


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """What to show; ``varlen-sft show --help`` says it in words."""

    file: str  # a source, see data.sources
    model: Path
    rows: tuple[int, ...] = (1,)
    pack: bool = False
    pack_rows: int | None = None
    max_tokens: int | None = None
    roles: tuple[str, ...] = ()  # what is shown of the tokens; () for all
    html: Path | None = None
    sample_processor: str | None = None
    mask_token_ids: tuple[int, ...] = ()
    masks: MaskOptions = MaskOptions()
    step: int | None = None  # of a run over prepared sets, from 1
    step_pack: int = 1
    state: Path | None = None  # of the run's stream, as JSON
    order: OrderOptions | None = None  # of the run, instead of a state
    sources: tuple[str, ...] = ()  # prepared sets that the run has after ``file``


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one sample that have one role and one weight."""

    text: str
    role: str
    weight: float  # as targets: 0 for a sample's first token, which nothing comes before


@dataclass(frozen=True)
class Answer:
    """One answer as it lies in the tokens."""

    last: str  # the text of its last token
    trained: bool  # any token of it
    stop_trained: bool  # the last is a control token, and trained


@dataclass(frozen=True)
class Shown:
    """The samples of one pack, which may be one sample alone, and that pack."""

    options: ShowOptions
    pieces: list[Piece]
    picture: PackPicture
    runs: list[list[Run]]  # of each sample
    last_texts: list[str]  # of each sample's last token, which is a target and never read
    answers: list[Answer]
    step: dict[str, str] = field(default_factory=dict)
    """With --step: which one it is, and what is in its packs, by name."""

    @property
    def capacity(self) -> int | None:
        """The most tokens that the pack may hold, None without a bound."""
        return _capacity(self.options)

    @property
    def is_pack(self) -> bool:
        return self.options.pack or bool(self.step) or len(self.pieces) > 1


def run(options: ShowOptions, console: Console) -> None:
    """Print the rows, or with ``html`` what they come to, and write the page.

    Raises:
        InputError: a model, a file or a row that cannot be used, a page that cannot be written.
    """
    from varlen_sft.tools import show_terminal

    shown = gather(options)
    if options.html is None:
        show_terminal.screen(console, shown)
        return
    from varlen_sft.tools.show_page import write_show_page

    try:
        write_show_page(options.html, shown)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=options.html) from None
    show_terminal.header(console, shown)
    console.print(f"written: {options.html}", highlight=False, markup=False, soft_wrap=True)


def gather(options: ShowOptions) -> Shown:
    """Read, tokenise, pack and collate as training does.

    Raises:
        InputError: a model, a file or a row that cannot be used.
    """
    if options.pack and len(options.rows) > 1:
        raise InputError("--pack takes one --row, from which it packs; several are a pack already")
    if options.pack_rows and not options.pack:
        raise InputError("--pack-rows says how many rows --pack packs, but there is no --pack")
    check_step_options(options)
    tokenizer = ChatTokenizer.from_folder(options.model)
    step: dict[str, str] = {}
    capacity = _capacity(options)
    if options.step is not None:
        pieces, step, capacity = step_pieces(options, tokenizer)
        options = replace(options, max_tokens=capacity)
    elif options.pack:
        assert capacity is not None
        pieces = planned(options, tokenizer, options.pack_rows or PACK_ROWS, capacity)
    else:
        pieces = chosen(options, tokenizer, capacity)
    samples = [piece.sample for piece in pieces]
    names = [piece.name for piece in pieces]
    return Shown(
        options,
        pieces,
        picture_pack(samples, collate(samples), tokenizer, names),
        [_runs(sample, tokenizer) for sample in samples],
        [_text(sample, len(sample) - 1, len(sample), tokenizer) for sample in samples],
        [answer for sample in samples for answer in _answers(sample, tokenizer)],
        step,
    )


def _capacity(options: ShowOptions) -> int | None:
    return options.max_tokens or (MAX_TOKENS if options.pack else None)


def target_weights(sample: Sample) -> np.ndarray:
    """(L,) as the loss sees them: nothing comes before the first token, so it is no target."""
    weights = sample.token_weights.copy()
    weights[0] = 0
    return weights


def _text(sample: Sample, start: int, end: int, tokenizer: ChatTokenizer) -> str:
    """Of the tokens [start, end)."""
    ids = sample.input_ids[start:end].tolist()
    if start == 0:
        return tokenizer.decode(ids)
    return spelled(tokenizer, ids, int(sample.input_ids[0]))


def _runs(sample: Sample, tokenizer: ChatTokenizer) -> list[Run]:
    weights, roles = target_weights(sample), sample.roles
    changes = (np.diff(weights) != 0) | (np.diff(roles.astype(np.int64)) != 0)
    starts = [0, *(np.flatnonzero(changes) + 1).tolist()]
    return [
        Run(_text(sample, a, b, tokenizer), ROLES[roles[a]], float(weights[a]))
        for a, b in zip(starts, [*starts[1:], len(sample)], strict=True)
    ]


def _answers(sample: Sample, tokenizer: ChatTokenizer) -> list[Answer]:
    """Runs of the assistant's tokens; in a text without roles, of trained tokens."""
    weights = target_weights(sample)
    inside = sample.roles == ASSISTANT
    if not inside.any():
        inside = weights > 0
    control = {tokenizer.control.ids[text] for text in tokenizer.control.special}
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    return [
        Answer(
            _text(sample, end - 1, end, tokenizer),
            bool((weights[start:end] > 0).any()),
            bool(weights[end - 1] > 0) and int(sample.input_ids[end - 1]) in control,
        )
        for start, end in edges.reshape(-1, 2).tolist()
    ]


def readable(text: str) -> str:
    """As ``visible``, but lines are broken after their sign, and spaces stay."""
    return "".join(c if c == " " else visible(c) + "\n" * (c == "\n") for c in text)
