"""Messages in a column of another name: ``varlen_sft.data.column:NAME`` as ``sample_processor``.

The functions are made when they are asked for, so that a worker finds them by a string alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from varlen_sft.data.conversation import ConversationError

__all__ = ["processor"]

MESSAGES = "messages"
_BEFORE = (MESSAGES, "input_ids")  # what ``formats.parse_row`` would read instead of the column


def processor(column: str) -> str:
    """The name of the function that takes a row's messages from a column."""
    return f"{__name__}:{column}"


def __getattr__(column: str) -> Callable[[Any], Any]:
    if column.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {column!r}")

    def renamed(row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row  # refused by name where rows are parsed
        if column not in row:
            raise ConversationError(
                f"no column {column!r} with the messages; the row has {', '.join(map(str, row))}"
            )
        others = {key: value for key, value in row.items() if key not in (column, *_BEFORE)}
        return {MESSAGES: row[column], **others}

    return renamed
