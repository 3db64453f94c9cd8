"""Prepared sets: what is written is Megatron's layout, and every damage has a name."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.data.megatron_files import write
from tests.data.prepared import change_manifest, contents
from varlen_sft.data import store_write
from varlen_sft.data.readers import read_dicts
from varlen_sft.data.sample import Sample
from varlen_sft.data.sources import read_rows
from varlen_sft.data.store import LAYOUTS, Store, file_of
from varlen_sft.data.store_write import write_store
from varlen_sft.errors import InputError


def sample(ids: list[int], weights: list[float], roles: list[int]) -> Sample:
    return Sample(np.array(ids, "i4"), np.array(weights, "f4"), np.array(roles, "u1"))


SAMPLES = [
    sample([5, 70000, 7], [0, 0, 1], [0, 2, 3]),
    sample([8, 9], [1, 0], [2, 3]),
    sample([1, 2, 3, 4], [0, 1, 1, 1], [1, 3, 3, 3]),
]
DOCUMENTS = {
    "sidecar": [[5, 70000, 7], [8, 9], [1, 2, 3, 4]],
    "tokens+mask": [[5, 70000, 7, 0, 1, 0], [8, 9, 0, 0], [1, 2, 3, 4, 1, 1, 1, 0]],
}


@pytest.fixture
def prefix(tmp_path) -> Path:
    write_store(tmp_path / "a.set", SAMPLES)
    return tmp_path / "a.set"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [2, 1 << 20])
def test_the_bytes_are_megatrons(tmp_path, monkeypatch, layout, block):
    monkeypatch.setattr(store_write, "_BLOCK", block)
    write_store(tmp_path / "set", SAMPLES, layout=layout)
    theirs = write(tmp_path / "by_hand", [[document] for document in DOCUMENTS[layout]], 4)
    for suffix in (".bin", ".idx"):
        assert (
            file_of(tmp_path / "set", suffix).read_bytes() == Path(f"{theirs}{suffix}").read_bytes()
        )
    roles = file_of(tmp_path / "set", ".roles").read_bytes()
    assert roles == bytes([0, 2, 3, 2, 3, 1, 3, 3, 3])
    weights = file_of(tmp_path / "set", ".weights")
    if layout == "sidecar":
        assert weights.read_bytes() == struct.pack("<9f", 0, 0, 1, 1, 0, 0, 1, 1, 1)
    else:
        assert not weights.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [3, 1 << 22])
def test_samples_come_back(tmp_path, monkeypatch, layout, block):
    monkeypatch.setattr("varlen_sft.data.store._BLOCK", block)
    write_store(tmp_path / "set", SAMPLES, layout=layout, fingerprint="f00d")
    store = Store(tmp_path / "set.bin")
    assert (len(store), store.layout, store.fingerprint) == (3, layout, "f00d")
    assert store.lengths.tolist() == [3, 2, 4] and store.lengths.dtype == np.int32
    assert store.supervised.tolist() == [1, 0, 3] and store.supervised.dtype == np.int64
    for i, expected in enumerate(SAMPLES):
        found = store.sample(i)
        for name in ("input_ids", "token_weights", "roles"):
            one, other = getattr(found, name), getattr(expected, name)
            assert type(one) is np.ndarray and one.dtype == other.dtype
            # tokens+mask has no place for the weight of the first token, which is no target.
            first = 1 if (name, layout) == ("token_weights", "tokens+mask") else 0
            assert one[:first].tolist() == [0] * first
            assert one[first:].tolist() == other[first:].tolist()
    store.verify()
    for i in (-1, 3):
        with pytest.raises(IndexError, match=r"must be in \[0, 3\), got"):
            store.sample(i)


def cut(suffix: str, size: int):
    return lambda prefix: os.truncate(file_of(prefix, suffix), size)


def swap(suffix: str, at: int, data: bytes):
    def change(prefix):
        path = file_of(prefix, suffix)
        old = path.read_bytes()
        path.write_bytes(old[:at] + data + old[at + len(data) :])

    return change


BAD = {
    ".bin: has 32 bytes, its index accounts for 36: it is truncated": cut(".bin", 32),
    ".idx: must be of version 1, is of 2": swap(".idx", 9, struct.pack("<Q", 2)),
    ".idx: must hold int32 tokens, holds int64": swap(".idx", 17, b"\x05"),
    ".weights: must have 36 bytes for 9 tokens, has 32": cut(".weights", 32),
    ".roles: must have 9 bytes for 9 tokens, has 10": cut(".roles", 10),
    ".roles: cannot be read: No such file or directory": lambda p: file_of(p, ".roles").unlink(),
    ".manifest.json: does not match its files: it counts 4 samples, the index 3": (
        lambda p: change_manifest(p, counts={"samples": 4, "tokens": 9})
    ),
    ".manifest.json: does not match its files: it counts 8 tokens, the index 9": (
        lambda p: change_manifest(p, counts={"samples": 3, "tokens": 8})
    ),
    ".manifest.json: must be of version 2, is of 1": lambda p: change_manifest(p, version=1),
    ".manifest.json: 'fingerprint' is missing, or no str": (
        lambda p: change_manifest(p, fingerprint=None)
    ),
    ".manifest.json: must have the format 'varlen_sft prepared data'": (
        lambda p: change_manifest(p, format="x")
    ),
    ".manifest.json: layout must be one of ('sidecar', 'tokens+mask'), is 'x'": (
        lambda p: change_manifest(p, layout="x")
    ),
    ".idx: document 0 must be tokens and as many mask entries, has 3 entries": (
        lambda p: change_manifest(p, layout="tokens+mask")
    ),
    ".manifest.json: no such file: not a prepared data set, or `varlen-sft prepare` has not "
    "finished it": lambda p: file_of(p, ".manifest.json").unlink(),
}


@pytest.mark.parametrize("expected", BAD)
def test_each_damage_is_named(prefix, expected):
    change = BAD[expected]
    if "holds int64" in expected:  # of int64 there would be as many bytes more
        file_of(prefix, ".bin").write_bytes(bytes(72))
        swap(".idx", 46, struct.pack("<3q", 0, 24, 40))(prefix)
    change(prefix)
    with pytest.raises(InputError) as caught:
        Store(prefix)
    assert str(caught.value) == f"{prefix}{expected}"


def test_other_documents_and_no_samples_are_named(tmp_path, prefix):
    write(prefix, [[[5, 70000, 7], [8, 9]], [[1, 2, 3, 4]]], 4)
    with pytest.raises(InputError, match="must have one sequence per document"):
        Store(prefix)
    write(prefix, [], 4)
    with pytest.raises(InputError, match="has no samples"):
        Store(prefix)
    with pytest.raises(InputError, match="no samples to write"):
        write_store(tmp_path / "none", [])
    assert contents(tmp_path / "none") == {}


def test_weights_that_cannot_be_are_named(prefix):
    swap(".weights", 16, struct.pack("<f", float("nan")))(prefix)
    assert Store(prefix).sample(0).token_weights.tolist() == [0, 0, 1]
    with pytest.raises(InputError, match=r"a.set, row 2: token_weights must be finite"):
        Store(prefix).sample(1)


def test_verify_finds_one_changed_bit(prefix):
    swap(".bin", 3, b"\x01")(prefix)
    with pytest.raises(InputError, match=r"a.set.bin: was changed: its sha256 is not"):
        Store(prefix).verify()


def test_a_set_is_replaced_whole_or_not_at_all(prefix):
    before = contents(prefix)
    half = sample([1, 2], [0, 0.5], [0, 3])
    with pytest.raises(InputError, match=r"weights of 0 and 1 only, a token weighs 0.5"):
        write_store(prefix, [*SAMPLES, half], layout="tokens+mask")
    assert contents(prefix) == before
    write_store(prefix, SAMPLES, layout="tokens+mask")
    assert contents(prefix).keys() == before.keys() - {".weights"}
    assert sorted(os.listdir(prefix.parent)) == sorted("a.set" + s for s in contents(prefix))
    Store(prefix).verify()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prepared_set_is_a_source(tmp_path, layout):
    write_store(tmp_path / "set", SAMPLES, layout=layout)
    for name in ("set", "set.idx", "set.bin"):
        rows = [row for _, row in read_dicts(tmp_path / name)]
        assert [row["input_ids"].tolist() for row in rows] == DOCUMENTS["sidecar"]
        masks = [row["loss_mask"].tolist() for row in rows]
        first = 1 if layout == "sidecar" else 0  # of a token that is no target
        assert masks == [[0, 0, 1], [first, 0], [0, 1, 1, 1]]
    ((_, error), *_) = read_rows(f"pretrain:{tmp_path / 'set'}")
    assert "the row has 'loss_mask', and the source is 'pretrain:'" in str(error)


def test_the_manifest_is_json_of_one_form(prefix):
    text = file_of(prefix, ".manifest.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"
