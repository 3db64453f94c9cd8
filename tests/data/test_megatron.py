"""Megatron's index: what is written by its layout is read, and each way of being wrong is named."""

from __future__ import annotations

import os
import struct
import tracemalloc

import numpy as np
import pytest

from tests.data.megatron_files import write
from varlen_sft.data.megatron import DTYPES, megatron_rows, prefix_of, read_index
from varlen_sft.data.readers import read_dicts
from varlen_sft.errors import InputError

DOCUMENTS = [[[1, 2], [3]], [[4, 5, 6]], [[]], []]


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("suffix", ["", ".idx", ".bin"])
def test_documents_are_read(tmp_path, code, suffix):
    prefix = write(tmp_path / "data.v1", DOCUMENTS, code)
    rows = list(read_dicts(f"{prefix}{suffix}"))
    assert [(n, row["input_ids"].tolist()) for n, row in rows] == [
        (1, [1, 2, 3]),
        (2, [4, 5, 6]),
        (3, []),
        (4, []),
    ]
    assert rows[0][1]["input_ids"].dtype == DTYPES[code]


def test_the_index_is_as_written(tmp_path):
    index = read_index(write(tmp_path / "data", DOCUMENTS))
    assert index.lengths.tolist() == [2, 1, 3, 0]
    assert index.pointers.tolist() == [0, 4, 6, 12]
    assert index.documents.tolist() == [0, 2, 3, 4, 4]
    assert index.num_documents == 4
    assert read_index(write(tmp_path / "none", [])).num_documents == 0
    assert list(megatron_rows(tmp_path / "none")) == []


def test_large_ids_are_no_negative_ones(tmp_path):
    ((_, row),) = megatron_rows(write(tmp_path / "data", [[[65535, 40000]]]))
    assert row["input_ids"].tolist() == [65535, 40000]


def test_documents_of_tokens_and_mask(tmp_path):
    # Entry i is of the label of token i: in the first row, of 8, of 9, and of none.
    prefix = write(tmp_path / "data", [[[7, 8, 9, 0, 1, 0]], [[]], [[5, 0]], [[1, 2, 1, 1]]])
    rows = [row for _, row in megatron_rows(prefix, with_mask=True)]
    assert [row["input_ids"].tolist() for row in rows] == [[7, 8, 9], [], [5], [1, 2]]
    assert [row["loss_mask"].tolist() for row in rows] == [[0, 0, 1], [], [0], [0, 1]]
    assert rows[0]["loss_mask"].dtype == np.uint16
    write(tmp_path / "data", [[[7, 8, 9, 0, 1, 0]], [[7, 8, 9, 0, 1, 1]]])
    with pytest.raises(InputError, match=r"data.bin, row 2: the mask ends in 1, where no label"):
        list(megatron_rows(prefix, with_mask=True))


@pytest.mark.parametrize("tokens", [[7, 0, 1], [7, 8, 1, 2]])
def test_documents_that_are_not_tokens_and_mask_are_named(tmp_path, tokens):
    prefix = write(tmp_path / "data", [[[5, 1]], [tokens]])
    with pytest.raises(InputError) as caught:
        list(megatron_rows(prefix, with_mask=True))
    assert str(caught.value) == (
        f"{prefix}.bin, row 2: expected tokens and as many mask entries, 0 or 1 ('sft:' reads "
        f"documents so), got {len(tokens)} entries that are not"
    )


def i4(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def i8(*values: int) -> bytes:
    return np.array(values, "<i8").tobytes()


BAD_INDICES = {
    "must begin with b'MMIDIDX\\x00\\x00', begins with b'MMIDIDX\\x00\\x01'": {
        "magic": b"MMIDIDX\x00\x01"
    },
    "must be of version 1, is of 2": {"version": i8(2)},
    "has the dtype code 7, known for tokens are 1 (uint8), 2 (int8), 3 (int16), 4 (int32), 5 "
    "(int64), 8 (uint16)": {"code": b"\x07"},
    "has the dtype code 0, known for tokens are 1 (uint8), 2 (int8), 3 (int16), 4 (int32), 5 "
    "(int64), 8 (uint16)": {"code": b"\x00"},
    "must have 122 bytes for 4 sequences and 5 document entries, has 124": {"modes": b"\0\0"},
    "must have 134 bytes for 5 sequences and 5 document entries, has 122": {"sequences": i8(5)},
    "must have 122 bytes for 4 sequences and 5 document entries, has 114": {
        "documents": i8(0, 2, 3, 4)
    },
    "a multimodal data set (it stores modes), which is not supported": {"modes": b"\0" * 4},
    "has no document entries, expected at least the closing one": {"entries": i8(0)},
    "sequence 1 has the length -1": {"lengths": i4(2, -1, 5, 0)},
    "sequence 2 must begin at byte 6, where the one before it ends, its pointer says 2": {
        "pointers": i8(0, 4, 2, 12)
    },
    "sequence 0 must begin at byte 0, where the one before it ends, its pointer says 2": {
        "pointers": i8(2, 4, 6, 12)
    },
    "documents must run from sequence 0 to 4, run from 0 to 3": {"documents": i8(0, 2, 3, 3, 3)},
    "documents must run from sequence 0 to 4, run from 1 to 4": {"documents": i8(1, 2, 3, 4, 4)},
    "document 2 begins before document 1": {"documents": i8(0, 3, 2, 4, 4)},
}


@pytest.mark.parametrize("expected", BAD_INDICES)
def test_a_bad_index_is_named(tmp_path, expected):
    prefix = write(tmp_path / "data", DOCUMENTS, **BAD_INDICES[expected])
    with pytest.raises(InputError) as caught:
        megatron_rows(prefix)  # before the first row
    assert str(caught.value) == f"{prefix}.idx: {expected}"


def test_an_index_is_checked_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("varlen_sft.data.megatron._BLOCK", 2)
    prefix = write(tmp_path / "data", DOCUMENTS)
    assert [len(row["input_ids"]) for _, row in megatron_rows(prefix)] == [3, 3, 0, 0]
    write(prefix, DOCUMENTS, documents=i8(0, 4, 3, 4, 4))
    with pytest.raises(InputError, match="document 2 begins before document 1"):
        read_index(prefix)
    write(prefix, DOCUMENTS, pointers=i8(0, 4, 6, 10))
    with pytest.raises(InputError, match="sequence 3 must begin at byte 12, .* says 10"):
        read_index(prefix)


def test_a_header_that_stops_is_named(tmp_path):
    prefix = write(tmp_path / "data", DOCUMENTS)
    os.truncate(f"{prefix}.idx", 20)
    with pytest.raises(InputError, match=r"data.idx: must have a header of 34 bytes, has 20"):
        read_index(prefix)


def test_data_of_another_size_is_named(tmp_path):
    prefix = write(tmp_path / "data", DOCUMENTS)
    with pytest.raises(InputError) as caught:
        os.truncate(f"{prefix}.bin", 10)
        read_index(prefix)
    assert str(caught.value) == (
        f"{prefix}.bin: has 10 bytes, its index accounts for 12: it is truncated"
    )
    with pytest.raises(InputError, match="has 14 bytes, .* for 12: it is not the index's"):
        os.truncate(f"{prefix}.bin", 14)
        read_index(prefix)
    os.unlink(f"{prefix}.bin")
    with pytest.raises(InputError, match=r"data.bin: cannot be read: No such file"):
        read_index(prefix)


def test_data_that_shrinks_while_it_is_read_is_named(tmp_path):
    prefix = write(tmp_path / "data", DOCUMENTS)
    rows = megatron_rows(prefix)
    os.truncate(f"{prefix}.bin", 10)
    assert next(rows)[0] == 1
    with pytest.raises(InputError, match=r"data.bin, row 2: ends before the end of this document"):
        next(rows)


def test_only_an_index_makes_a_prefix(tmp_path):
    prefix = write(tmp_path / "data", DOCUMENTS)
    assert prefix_of(prefix) == prefix_of(tmp_path / "data.bin") == prefix
    assert prefix_of(tmp_path / "other") is None
    prefix.write_text("{}")  # a file of that name is what is meant
    assert prefix_of(prefix) is None
    (tmp_path / "data.idx").write_bytes(b"another index")
    assert prefix_of(tmp_path / "data.idx") is None


def test_a_hundred_megabytes_are_read_in_few(tmp_path):
    prefix = tmp_path / "data"
    count, length = 2000, 25_000
    ends = np.arange(count + 1, dtype="<i8")
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, count, count + 1)
    lengths = np.full(count, length, "<i4").tobytes()
    pointers = (ends[:-1] * 2 * length).tobytes()
    (tmp_path / "data.idx").write_bytes(head + lengths + pointers + ends.tobytes())
    with open(f"{prefix}.bin", "wb") as file:
        for number in range(count):
            file.write(np.full(length, number, np.uint16).tobytes())
    tracemalloc.start()
    try:
        for number, row in megatron_rows(prefix):
            assert row["input_ids"][0] == row["input_ids"][-1] == number - 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == count and peak < 1e6
