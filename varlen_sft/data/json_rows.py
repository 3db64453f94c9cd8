"""Rows of JSON files, one in memory at a time: JSON lines, or one array of rows."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from varlen_sft.data.conversation import ConversationError
from varlen_sft.errors import InputError

CHUNK = 1 << 16
"""Bytes of an array that are read at a time, at first; more for a row that is longer."""

BYTE_ORDER_MARK = codecs.BOM_UTF8


def json_lines(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """``(line, row)`` of UTF-8 JSON lines; a line that is not JSON gives its ConversationError.

    Lines are physical ones and count from 1; blank ones are skipped, and so is a byte order mark.
    """
    return ((number, parse_line(line)) for number, line in raw_lines(file))


def raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """``(line, bytes)`` as json_lines, for whoever parses them elsewhere, by parse_line."""
    # Binary lines end at \n only; text mode would also count a lone \r as the end of a row.
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield number, line


def json_array(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """``(number, row)`` of the entries of one JSON array, numbered from 1.

    Raises:
        InputError: with row: what cannot be parsed in an array leaves no place to go on from.
    """
    text = _Text(file)
    text.expect("[")
    if text.peek() != "]":
        yield text.row, text.value()
        while text.peek() == ",":
            text.expect(",")
            text.row += 1
            yield text.row, text.value()
    text.expect("]")
    if text.peek():
        raise InputError(f"text after the end of the array: {text.rest()[:40]!r}", row=text.row)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook``: json would keep the last of two equal keys, and drop the others.

    Raises:
        ConversationError: a key stands twice.
    """
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConversationError(f"the key {twice!r} stands twice in one object")
    return made


def parse_line(line: bytes) -> object:
    """The value of a line, or a ConversationError where it is not JSON."""
    try:
        return _VALUES.decode(line.decode())
    except ConversationError as error:
        return error
    except UnicodeDecodeError as error:
        return ConversationError(f"not UTF-8: {error.reason} at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return ConversationError(f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:  # nested too deep; a number of 5000 digits
        return ConversationError(f"not JSON that can be read: {error}")


_VALUES = json.JSONDecoder(object_pairs_hook=unique_keys)


class _Text:
    """A window on a UTF-8 file that moves as values are taken from its start."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.row = 1  # for errors
        self._window = ""
        self._at = 0  # in the window
        self._before = 0  # characters of the file before the window
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            while self._at < len(self._window) and self._window[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._window) or not self._read(CHUNK):
                return self._window[self._at : self._at + 1]

    def expect(self, character: str) -> None:
        """Take one character, InputError if another comes."""
        found = self.peek()
        if found != character:
            raise self._bad(f"expected {character!r}, got {found or 'the end of the file'!r}")
        self._at += 1

    def value(self) -> object:
        """Take one value, reading on while it may be cut off by the window's end."""
        self.peek()
        size = CHUNK
        while True:
            try:
                value, end = _VALUES.raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                if not self._is_cut(error) or not self._read(size):
                    raise self._bad(error.msg, error.pos) from None
            except ConversationError as error:
                raise InputError(str(error), row=self.row) from None
            except (RecursionError, ValueError) as error:
                raise InputError(f"not JSON that can be read: {error}", row=self.row) from None
            else:
                # A number near the window's end may go on: 1 | 2, 1. | 5, 1e- | 5.
                if end + 2 < len(self._window) or not self._read(size):
                    self._at = end
                    return value
            size *= 2  # tries cost as much as they read, so that long rows stay linear

    def rest(self) -> str:
        return self._window[self._at :]

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        # The longest thing that is an error until it is whole: the literal -Infinity, or \\uXXXX.
        return error.msg.startswith("Unterminated") or error.pos > len(self._window) - 12

    def _read(self, size: int) -> bool:
        """Drop what was taken and read on; at the end of the file False, and nothing moves."""
        if self._ended:
            return False
        data = self._file.read(size)
        self._ended = not data
        try:
            more = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8: {error.reason}", row=self.row) from None
        if not more and self._ended:
            return False
        self._before += self._at
        self._window = self._window[self._at :] + more
        self._at = 0
        return True

    def _bad(self, reason: str, at: int | None = None) -> InputError:
        place = self._before + (self._at if at is None else at) + 1
        return InputError(f"not JSON: {reason} at character {place} of the file", row=self.row)
