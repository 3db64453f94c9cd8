"""Where rows come from: a file, a folder, the Hugging Face hub; and how their masks are meant."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varlen_sft.data.arrow_rows import BATCH, batch_rows, choose_split
from varlen_sft.data.conversation import Conversation, ConversationError, Row, Text, Tokens
from varlen_sft.data.formats import MODES, parse_row, read_conversations, write_conversations
from varlen_sft.data.readers import is_there, read_dicts
from varlen_sft.errors import InputError

__all__ = [
    "SampleProcessor",
    "Source",
    "load_processor",
    "read_conversations",
    "read_rows",
    "write_conversations",
]

SampleProcessor = Callable[[Any], Any]
HUB = "hub:"


@dataclass(frozen=True)
class Source:
    """What a source string says.

    Args:
        name: a path, or on the hub ``owner/name`` with ``/config`` if it has several.
        mode: the mask mode of its rows, see ``formats.parse_row``.
        split: of a data set with several.
        hub: whether it is on the hub.
    """

    name: str
    mode: str | None = None
    split: str | None = None
    hub: bool = False

    @classmethod
    def parse(cls, text: str) -> Source:
        """Read ``[sft:|pretrain:|search:][hub:]NAME[@SPLIT]``.

        Nothing is taken for a hub name that does not say so, or a mistyped path would become a
        download. ``@`` and what follows belong to the name if something of that name is there; a
        file whose name begins like a prefix is written with ``./`` before it.

        Raises:
            InputError: no name is left.
        """
        mode = next((mode for mode in MODES if text.startswith(f"{mode}:")), None)
        name = text if mode is None else text.removeprefix(f"{mode}:")
        hub = name.startswith(HUB)
        name = name.removeprefix(HUB) if hub else name
        split = None
        if "@" in name and (hub or not is_there(Path(name))):
            name, split = name.rsplit("@", 1)
        if not name or split == "":
            raise InputError(f"expected [sft:|pretrain:|search:][hub:]NAME[@SPLIT], got {text!r}")
        return cls(name, mode, split, hub)

    def __str__(self) -> str:
        return f"{HUB}{self.name}" if self.hub else self.name


def read_rows(
    source: str | os.PathLike[str] | Source,
    *,
    sample_processor: SampleProcessor | str | None = None,
    mask_token_ids: Sequence[int] = (),
) -> Iterator[tuple[int, Row | ConversationError]]:
    """Stream ``(number, row)`` of a source, a few rows in memory at a time.

    A row that cannot be used is given as its ConversationError, in its place, so that the caller
    can stop at it or list it; none is left out. Numbers are those of ``readers.read_dicts``. The
    source is opened at once, before the first row.

    Args:
        source: a source string (Source.parse), or a path as it is.
        sample_processor: for rows of other shapes, a function that takes a row as it was read and
            returns one that ``formats.parse_row`` knows, or a Row; or ``"module:function"``.
        mask_token_ids: ids never to be trained, of rows of ``input_ids``.

    Raises:
        InputError: with file and row: the source cannot be opened or read on, or the
            sample_processor is not to be found or raised something else than a ConversationError.
    """
    if isinstance(source, str):
        source = Source.parse(source)
    elif not isinstance(source, Source):
        source = Source(os.fspath(source))
    if isinstance(sample_processor, str):
        sample_processor = load_processor(sample_processor)
    rows = _hub_rows(source) if source.hub else _local_rows(source)
    return parse_rows(source, rows, sample_processor, mask_token_ids)


def load_processor(name: str) -> SampleProcessor:
    """Import ``"module:function"``, the module from Python's path (PYTHONPATH=. for your own).

    Raises:
        InputError: another form, no such module or function, or it is not callable.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(f"sample_processor must be 'module:function', got {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"sample_processor {name!r}: {error}") from None
    if not callable(found):
        raise InputError(f"sample_processor {name!r} is not callable")
    return found


def _local_rows(source: Source) -> Iterator[tuple[int, Any]]:
    path = Path(source.name)
    if not is_there(path):
        reason = "no such file"
        if source.name.count("/") == 1:
            reason += f" (on the hub? then {HUB}{source.name})"
        raise InputError(reason, file=path)
    return read_dicts(path, split=source.split, with_mask=source.mode == "sft")


def _hub_rows(source: Source) -> Iterator[tuple[int, Any]]:
    """Rows of the hub, streamed; code that a data set brings along is never run."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("needs datasets: pip install datasets", file=str(source)) from None
    parts = source.name.split("/")
    name, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        data = load_dataset(name, config, split=source.split, streaming=True)
    except Exception as error:  # whatever hub, network or file format raise
        raise InputError(f"cannot be loaded: {error}", file=str(source)) from error
    if isinstance(data, Mapping):
        data = data[choose_split(source, data, source.split)]
    return _numbered(source, data)


def _numbered(source: Source, data: Any) -> Iterator[tuple[int, Any]]:
    number = 0
    rows = _table_rows(data)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # as above
            reason = f"cannot be read after this row: {error}"
            raise InputError(reason, file=str(source), row=number) from error
        if row is None:
            return
        number += 1
        yield number, row


def _table_rows(data: Any) -> Iterator[Any]:
    # As tables, since only their types tell a null that a column adds from one in the data.
    for table in data.with_format("arrow").iter(batch_size=BATCH):
        yield from batch_rows([table], table.schema)


def parse_rows(
    source: Source,
    rows: Iterator[tuple[int, Any]],
    processor: SampleProcessor | None,
    mask_token_ids: Sequence[int],
) -> Iterator[tuple[int, Row | ConversationError]]:
    """As read_rows, of rows as ``readers.read_dicts`` gives them."""
    for number, row in rows:
        try:
            if isinstance(row, ConversationError):
                raise row
            if processor is not None:
                row = _processed(source, number, row, processor)
            if not isinstance(row, (Conversation, Text, Tokens)):
                row = parse_row(row, mode=source.mode, mask_token_ids=mask_token_ids)
        except ConversationError as error:
            row = error
        yield number, row


def _processed(source: Source, number: int, row: Any, processor: SampleProcessor) -> Any:
    try:
        return processor(row)
    except ConversationError:
        raise
    except Exception as error:  # it is anybody's code
        reason = f"the sample_processor raised {type(error).__name__}: {error}"
        raise InputError(reason, file=str(source), row=number) from error
