"""A batch of somebody else's collator, read once: which samples are where in its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from varlen_sft.data.sample import Sample
from varlen_sft.types import IGNORE_INDEX

__all__ = ["BatchView", "Span"]

FLASH_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
MATRICES = ("input_ids", "labels", "shift_labels", "position_ids", "seq_idx")


class Span(NamedTuple):
    """A sample, or what is left of it, in a batch."""

    row: int
    start: int
    end: int
    sample: int | None = None  # its number in the samples that were given

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class BatchView:
    """What HF's forward would be called with, as numpy arrays, and where its samples are."""

    input_ids: np.ndarray  # (B, L) int64
    labels: np.ndarray | None  # (B, L) unshifted
    shift_labels: np.ndarray | None  # (B, L) row i holds the target of token i
    position_ids: np.ndarray | None  # (B, L)
    mask: np.ndarray | None  # (B, L), or (B, 1 or H, L, L)
    flash: dict[str, Any]  # those of FLASH_KEYS that are there
    spans: tuple[Span, ...]  # in the order of rows and columns
    known_by: str
    """Whose word the spans are: samples, lengths, cu_seq_lens_q, seq_idx, position_ids or rows."""
    samples: tuple[tuple[np.ndarray, np.ndarray | None], ...] = ()
    """(ids, which of them are trained) of the samples that were given."""
    use_cache: bool | None = None  # as the batch says, None where it does not

    @classmethod
    def of(cls, batch: Mapping[str, Any], samples: Sequence[Any] | None = None) -> BatchView:
        """Read a batch.

        Args:
            batch: tensors, arrays or nested lists under HF's names. A ``lengths`` beside them says
                how many tokens each sample of a batch of one row has.
            samples: the samples it was made of, each a ``Sample``, a mapping with ``input_ids``
                (and ``labels``, if there are any), or token ids.

        Raises:
            ValueError: no ``input_ids``, shapes that do not fit, or samples that are not in it.
        """
        read = {key: _matrix(key, batch[key]) for key in MATRICES if batch.get(key) is not None}
        ids = read.get("input_ids")
        if ids is None:
            raise ValueError(f"batch must have input_ids, got {', '.join(batch) or 'nothing'}")
        for key, value in read.items():
            if value.shape != ids.shape:
                if key != "position_ids" or value.shape != (1, ids.shape[1]):
                    raise ValueError(f"{key} must have shape {ids.shape}, got {value.shape}")
                read[key] = np.broadcast_to(value, ids.shape)  # as HF does
        mask = batch.get("attention_mask")
        view = cls(
            input_ids=ids,
            labels=read.get("labels"),
            shift_labels=read.get("shift_labels"),
            position_ids=read.get("position_ids"),
            mask=None if mask is None else _mask(mask, ids),
            flash={key: batch[key] for key in FLASH_KEYS if batch.get(key) is not None},
            spans=(),
            known_by="rows",
            samples=tuple(_sample(s) for s in samples or ()),
            use_cache=None if batch.get("use_cache") is None else bool(batch["use_cache"]),
        )
        known_by, spans = _spans(view, batch.get("lengths"), read.get("seq_idx"))
        spans = [span for span in spans if len(span)]  # a row may be all padding
        return cls(**{**vars(view), "known_by": known_by, "spans": tuple(spans)})

    @property
    def packed_rows(self) -> list[int]:
        """Rows that hold two samples or more."""
        rows = [span.row for span in self.spans]
        return sorted({row for row in rows if rows.count(row) > 1})

    def of_row(self, row: int) -> list[Span]:
        return [span for span in self.spans if span.row == row]

    def trained(self) -> np.ndarray | None:
        """(B, L) bool: token i is a target. From shift_labels where both are given, as in HF."""
        if self.shift_labels is not None:
            targets = np.zeros(self.input_ids.shape, dtype=bool)
            targets[:, 1:] = self.shift_labels[:, :-1] != IGNORE_INDEX
            return targets
        return None if self.labels is None else self.labels != IGNORE_INDEX

    def attended(self) -> np.ndarray | None:
        """(B, L) bool of a 2-D mask."""
        return self.mask != 0 if self.mask is not None and self.mask.ndim == 2 else None

    def place(self, span: Span) -> str:
        """How a sample is named."""
        return f"sample {self.spans.index(span) if span.sample is None else span.sample}"


def array(value: Any) -> np.ndarray:
    """A tensor (bf16 and devices included), array or list as numpy."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def _matrix(key: str, value: Any) -> np.ndarray:
    found = array(value)
    found = found[None] if found.ndim == 1 else found
    if found.ndim != 2 or found.dtype.kind not in "iu":
        raise ValueError(f"{key} must be integers (B, L), got {found.dtype} {found.shape}")
    return found.astype(np.int64)


def _mask(value: Any, ids: np.ndarray) -> np.ndarray:
    found = array(value)
    if found.ndim == 1:
        found = found[None]
    rows, length = ids.shape
    if found.shape != (rows, length) and not (
        found.ndim == 4 and found.shape[0] in (1, rows) and found.shape[2:] == (length, length)
    ):
        raise ValueError(
            f"attention_mask must have shape {ids.shape} or ({rows}, 1, {length}, {length}), "
            f"got {found.shape}"
        )
    return found


def _sample(value: Any) -> tuple[np.ndarray, np.ndarray | None]:
    if isinstance(value, Sample):
        return value.input_ids.astype(np.int64), value.token_weights > 0
    if isinstance(value, Mapping):
        labels = value.get("labels")
        trained = None if labels is None else array(labels).reshape(-1) != IGNORE_INDEX
        return array(value["input_ids"]).reshape(-1).astype(np.int64), trained
    return array(value).reshape(-1).astype(np.int64), None


# --------------------------------------------------------------------- spans


def _spans(view: BatchView, lengths: Any, seq_idx: np.ndarray | None) -> tuple[str, list[Span]]:
    """The first that is there decides, from what cannot be wrong to what is a guess."""
    rows, length = view.input_ids.shape
    if view.samples:
        return "samples", list(_found(view))
    if lengths is not None:
        return "lengths", _by_edges(np.cumsum([0, *array(lengths).reshape(-1)]), view)
    if "cu_seq_lens_q" in view.flash and rows == 1:
        edges = array(view.flash["cu_seq_lens_q"]).reshape(-1)
        return "cu_seq_lens_q", _by_edges(edges, view)
    if seq_idx is not None:
        return "seq_idx", list(_by_change(np.diff(seq_idx, axis=1) != 0, view))
    if view.position_ids is not None and view.attended() is None:
        return "position_ids", list(_by_change(np.diff(view.position_ids, axis=1) != 1, view))
    return "rows", [Span(row, *_real(view, row)) for row in range(rows)]


def _real(view: BatchView, row: int) -> tuple[int, int]:
    """From the first token that is attended to through the last."""
    attended = view.attended()
    at = np.arange(view.input_ids.shape[1]) if attended is None else np.flatnonzero(attended[row])
    return (int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0)


def _by_edges(edges: np.ndarray, view: BatchView) -> list[Span]:
    rows, length = view.input_ids.shape
    if rows != 1:
        raise ValueError(f"lengths are those of one row, got a batch of {rows}")
    if edges[0] != 0 or (np.diff(edges) < 0).any() or edges[-1] > length:
        raise ValueError(f"samples must lie within {length} tokens, got edges {edges.tolist()}")
    pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    return [Span(0, start, end) for start, end in pairs if end > start]


def _by_change(starts: np.ndarray, view: BatchView) -> Iterator[Span]:
    for row in range(len(starts)):
        begin, end = _real(view, row)
        inside = (np.flatnonzero(starts[row]) + 1).tolist()
        edges = [begin, *(at for at in inside if begin < at < end), end]
        for start, stop in zip(edges[:-1], edges[1:], strict=True):
            yield Span(row, start, stop)


def _found(view: BatchView) -> Iterator[Span]:
    """Each sample where its ids stand; those of a row one after another, in any order.

    Raises:
        ValueError: a sample is nowhere in the batch.
    """
    free = np.ones(view.input_ids.shape, dtype=bool)
    spans = []
    for number in sorted(range(len(view.samples)), key=lambda i: -len(view.samples[i][0])):
        ids = view.samples[number][0]
        place = _first_free(view.input_ids, ids, free)
        if place is None:
            raise ValueError(
                f"samples must be in the batch, token by token: sample {number} ({len(ids)} "
                "tokens) is not"
            )
        row, start = place
        free[row, start : start + len(ids)] = False
        spans.append(Span(row, start, start + len(ids), number))
    yield from sorted(spans)


def _first_free(rows: np.ndarray, ids: np.ndarray, free: np.ndarray) -> tuple[int, int] | None:
    if not len(ids) or len(ids) > rows.shape[1]:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(rows, len(ids), axis=1)
    unused = np.lib.stride_tricks.sliding_window_view(free, len(ids), axis=1)
    # The first token decides for nearly every place; only the rest is compared whole.
    for row, start in np.argwhere(windows[:, :, 0] == ids[0]).tolist():
        if (windows[row, start] == ids).all() and unused[row, start].all():
            return row, start
    return None
