"""As few packs as trl.pack_dataset makes, whatever the lengths are."""

from __future__ import annotations

import numpy as np
import pytest

from varlen_sft.data.packing import pack

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

T, COUNT = 4096, 2000


def clipped(drawn: np.ndarray) -> np.ndarray:
    return np.clip(drawn.astype(np.int32), 1, T)


def lengths_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    short, long = rng.integers(1, 200, COUNT // 2), rng.integers(T // 2, T + 1, COUNT // 2)
    return {
        "lognormal": lambda: clipped(rng.lognormal(6.1, 1.0, COUNT)),
        "heavy tail": lambda: clipped(rng.lognormal(7.2, 1.3, COUNT)),
        "uniform": lambda: rng.integers(1, T + 1, COUNT),
        "bimodal": lambda: rng.permutation(np.concatenate([short, long])),
        "zipf": lambda: clipped(rng.zipf(1.4, COUNT)),
        "triples": lambda: rng.integers(T // 3 - 30, T // 3 + 30, COUNT),
        "quarter to half": lambda: rng.integers(T // 4, T // 2, COUNT),
        "all equal": lambda: np.full(COUNT, 700),
        "all of a pack": lambda: np.full(COUNT, T),
        "a pack or one token": lambda: rng.choice([1, T - 1, T], COUNT),
        "one sample": lambda: np.array([T]),
    }[kind]().astype(np.int32)


KINDS = (
    "lognormal", "heavy tail", "uniform", "bimodal", "zipf", "triples", "quarter to half",
    "all equal", "all of a pack", "a pack or one token", "one sample",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_as_few_packs_as_trl(kind):
    lengths = lengths_of(kind, np.random.default_rng(0))
    rows = [np.zeros(length, np.int8) for length in lengths]
    data = datasets.Dataset.from_dict({"input_ids": rows})
    theirs = trl.pack_dataset(data, T, "bfd", {"batch_size": len(lengths)})
    ours = pack(lengths, T)
    assert len(ours) <= len(theirs)
    assert ours.sums(lengths).max() <= T and sorted(ours.ids.tolist()) == list(range(len(lengths)))
    assert len(ours) >= -(-int(lengths.sum()) // T)
