"""Megatron sets whose documents are not one sample of plain tokens."""

from __future__ import annotations

import pytest

from tests.data.megatron_files import write
from varlen_sft.data.packed_rows import MAGIC
from varlen_sft.data.readers import read_dicts
from varlen_sft.data.sources import read_rows
from varlen_sft.errors import InputError

EOD = 0
TRAINED = -(2**31)  # the highest bit of an int32


def pack(*samples: list[int], starts: list[int] | None = None, version: int = 1) -> list[int]:
    """Words of a packed row; a negative token stands for one after which the next is trained."""
    if starts is None:
        starts = [sum(map(len, samples[:i])) for i in range(len(samples))]
    return [MAGIC, version, len(starts), *starts, *(word for one in samples for word in one)]


def after(token: int) -> int:
    return token + TRAINED


def test_packed_rows_are_taken_apart(tmp_path):
    first = pack([5, after(6), after(7), after(8)], [9, 10, after(11)])
    prefix = write(tmp_path / "set", [[first], [pack([after(1), 2])]], 4)
    rows = list(read_dicts(prefix))
    assert [(n, row["input_ids"].tolist(), row["loss_mask"].tolist()) for n, row in rows] == [
        (1, [5, 6, 7, 8], [0, 0, 1, 1]),  # the bit of 6 speaks of 7, that of 7 of 8
        (2, [9, 10, 11], [0, 0, 0]),  # those of 8 and 11 would speak of the next sample
        (3, [1, 2], [0, 1]),
    ]
    for mode in ("", "sft:"):
        parsed = [row for _, row in read_rows(f"{mode}{prefix}")]
        assert [row.token_weights.tolist() for row in parsed] == [[0, 0, 1, 1], [0, 0, 0], [0, 1]]
    ((_, error), *_) = read_rows(f"pretrain:{prefix}")
    assert "which trains all tokens" in str(error)


BAD = {
    "a packed row ('SFTB') must be of version 1, is of 2": pack([1, 2], version=2),
    "a packed row ('SFTB') must be of version 1, is of none": [MAGIC],
    "the 0 samples of a packed row must begin at 0 and rise within its 2 tokens, they begin at "
    "[]": pack([1, 2], starts=[]),
    "the 2 samples of a packed row must begin at 0 and rise within its 2 tokens, they begin at "
    "[0, 2]": pack([1, 2], starts=[0, 2]),
    "the 2 samples of a packed row must begin at 0 and rise within its 3 tokens, they begin at "
    "[1, 2]": pack([1, 2, 3], starts=[1, 2]),
    "the 2 samples of a packed row must begin at 0 and rise within its 3 tokens, they begin at "
    "[0, 0]": pack([1, 2, 3], starts=[0, 0]),
    "the 9 samples of a packed row must begin at 0 and rise within its 0 tokens, they begin at "
    "[0, 1]": [MAGIC, 1, 9, 0, 1],
    "expected a packed row like those before it ('SFTB'), found other tokens": [1, 2],
}


@pytest.mark.parametrize("expected", BAD)
def test_a_damaged_packed_row_is_named(tmp_path, expected):
    prefix = write(tmp_path / "set", [[pack([1, 2])], [BAD[expected]]], 4)
    rows = read_dicts(prefix)
    assert next(rows)[0] == 1
    with pytest.raises(InputError) as caught:
        next(rows)
    assert str(caught.value) == f"{prefix}.bin, row 2: {expected}"


def test_an_end_of_document_token_is_a_token(tmp_path):
    prefix = write(tmp_path / "set", [[[1, EOD, 2, EOD]], [[EOD], [3, EOD]]])
    rows = [row for _, row in read_rows(f"pretrain:{prefix}")]
    assert [row.input_ids.tolist() for row in rows] == [[1, EOD, 2, EOD], [EOD, 3, EOD]]
    assert [row.token_weights.tolist() for row in rows] == [[1] * 4, [1] * 3]


def test_a_set_with_modes_is_refused_by_a_clear_word(tmp_path):
    prefix = write(tmp_path / "set", [[[1, 2], [3]]], modes=b"\0\1")
    with pytest.raises(InputError, match=r"set.idx: a multimodal data set \(it stores modes\)"):
        read_rows(f"pretrain:{prefix}")
