"""What other readers of a prepared set make of it, and what its manifest says of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from tests.data.prepared import contents
from tests.data.test_store import DOCUMENTS, SAMPLES
from varlen_sft.data.store import LAYOUTS, Store
from varlen_sft.data.store_write import StoreWriter, write_store


def test_the_manifest_says_what_each_reader_trains(tmp_path):
    for layout in LAYOUTS:
        write_store(tmp_path / layout, SAMPLES, layout=layout)
    found = {layout: Store(tmp_path / layout).manifest for layout in LAYOUTS}
    assert found["sidecar"]["counts"] == {"samples": 3, "tokens": 9, "targets": 4}
    targets = {
        layout: [reader["targets"] for reader in manifest["readers"].values()]
        for layout, manifest in found.items()
    }
    # Shifted twice, [5, 70000, 7] would train 70000 and [1, 2, 3, 4] only 2 and 3.
    assert targets == {"sidecar": [8, 4], "tokens+mask": [17, 4, 3, 4]}
    names = list(found["tokens+mask"]["readers"])
    assert names[1:3] == [
        "Megatron SFT, mask[i] with the label tokens[i + 1]",
        "a reader of mask[1:] with the labels tokens[1:]",
    ]


def test_a_mask_ends_with_its_sample_also_among_many(tmp_path):
    writer = StoreWriter(tmp_path / "set", tmp_path, "tokens+mask")
    writer.add(np.array([2, 3, 1]), np.arange(1, 7), np.ones(6), np.zeros(6))
    writer.finish({"fingerprint": "f00d"})
    words = np.frombuffer(contents(tmp_path / "set")[".bin"], "<i4").tolist()
    assert words == [1, 2, 1, 0, 3, 4, 5, 1, 1, 0, 6, 0]
    assert Store(tmp_path / "set").supervised.tolist() == [1, 2, 0]
    assert [one["targets"] for one in writer._readers().values()] == [3, 3, 1, 11]


def test_each_reader_trains_what_the_manifest_says(tmp_path):
    write_store(tmp_path / "set", SAMPLES, layout="tokens+mask")
    words = [np.array(document) for document in DOCUMENTS["tokens+mask"]]
    halves = [np.split(document, 2) for document in words]
    # As Megatron packs: documents in a row, labels shifted over all of them, the mask as it is.
    tokens, mask = (np.concatenate(half) for half in zip(*halves, strict=True))
    theirs = np.roll(tokens, -1)[mask > 0].tolist()
    assert theirs == [7, 2, 3, 4]  # nothing of the next document
    twice = [ids[1:][bits[1:] > 0].tolist() for ids, bits in halves]
    assert twice == [[70000], [], [2, 3]]
    readers = list(Store(tmp_path / "set").manifest["readers"].values())
    assert [one["targets"] for one in readers[1:3]] == [len(theirs), sum(map(len, twice))]
    ours = [Store(tmp_path / "set").sample(i) for i in range(3)]
    trained = [one.input_ids[1:][one.token_weights[1:] > 0] for one in ours]
    assert np.concatenate(trained).tolist() == theirs


READ_BY_MEGATRON = """
import importlib.util, sys, types
def stand_in(name, **names):
    module = types.ModuleType(name)
    module.__dict__.update(names, __path__=[])
    sys.modules[name] = module
for name in ("megatron", "megatron.core", "megatron.core.datasets"):
    stand_in(name)
class Off:
    is_enabled = staticmethod(lambda: False)
stand_in("megatron.core.msc_utils", MultiStorageClientFeature=Off)
stand_in("megatron.core.utils", log_single_rank=lambda *a, **k: None)
for name in ("object_storage_utils", "indexed_dataset"):
    name, path = f"megatron.core.datasets.{name}", f"{sys.argv[1]}/core/datasets/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
data = sys.modules["megatron.core.datasets.indexed_dataset"].IndexedDataset(sys.argv[2])
print([data[i].tolist() for i in range(len(data))], data.document_indices.tolist())
"""


def test_megatron_cores_own_reader_returns_the_same_tokens(tmp_path):
    found = importlib.util.find_spec("megatron")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs Megatron-Core: pip install --no-deps megatron-core")
    for layout in LAYOUTS:
        write_store(tmp_path / layout, SAMPLES, layout=layout)
        done = subprocess.run(
            [sys.executable, "-c", READ_BY_MEGATRON, list(found.submodule_search_locations)[0],
             str(tmp_path / layout)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == f"{DOCUMENTS[layout]} [0, 1, 2, 3]\n"
