"""A prepared set larger than memory: what a step needs is read, and nothing else."""

from __future__ import annotations

import json
import os
import re
import struct
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests.data.streams import stream
from varlen_sft.data.store import FORMAT, VERSION, Store, file_of

SAMPLES, LENGTH = 45_000, 100_001  # 4.5 billion tokens: offsets that no 32 bits hold


@pytest.fixture
def store(tmp_path) -> Store:
    """18 GB of tokens and as much of weights, in files that are holes but for the last sample."""
    prefix, tokens = tmp_path / "big", SAMPLES * LENGTH
    lengths = np.full(SAMPLES, LENGTH, "<i4")
    starts = np.arange(SAMPLES, dtype="<i8") * LENGTH * 4
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, SAMPLES, SAMPLES + 1)
    documents = np.arange(SAMPLES + 1, dtype="<i8")
    parts = (head, lengths.tobytes(), starts.tobytes(), documents.tobytes())
    file_of(prefix, ".idx").write_bytes(b"".join(parts))
    for suffix, kind, value in ((".bin", "<i4", 77), (".weights", "<f4", 1), (".roles", "u1", 3)):
        size = np.dtype(kind).itemsize
        with file_of(prefix, suffix).open("wb") as file:
            file.truncate(tokens * size)
            file.seek((tokens - LENGTH) * size)
            file.write(np.full(LENGTH, value, kind).tobytes())
    manifest = {"format": FORMAT, "version": VERSION, "layout": "sidecar", "fingerprint": "big",
                "files": {}, "counts": {"samples": SAMPLES, "tokens": tokens}}  # fmt: skip
    file_of(prefix, ".manifest.json").write_text(json.dumps(manifest))
    return Store(prefix)


def own_memory() -> int:
    """Bytes of this process that are not pages of files."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", text)[1])  # type: ignore[index]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="asks Linux for memory")
def test_a_set_larger_than_memory_is_streamed(store):
    before = own_memory()
    found = stream(store, {"max_tokens": LENGTH - 1, "balance": "none"}, workers=2)
    order = found.order
    steps = list(islice(found, 3))
    assert {len(batch.input_ids) for step in steps for batch in step.batches} == {LENGTH - 1}
    assert not any(int(batch.labels.max()) > 0 for step in steps for batch in step.batches)
    last = next(k for k in range(order.steps(0)) if any(SAMPLES - 1 in p for p in packs(order, k)))
    (batch,) = [b for b in found.step(last).batches if int(b.labels.max()) > 0]
    assert batch.input_ids.unique().tolist() == [77] and batch.labels.unique().tolist() == [77]
    assert own_memory() - before < 250e6  # half of it are the batches that are held here


def packs(order, step: int) -> list[list[int]]:
    return [pack.tolist() for pack in order.step(0, step).packs]
