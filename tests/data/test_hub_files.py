"""Data sets of the hub in prepare: the files that `datasets` keeps of them, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.prepared import chats, contents, made, model_folder
from varlen_sft.data.hub_files import hub_files
from varlen_sft.data.sources import Source
from varlen_sft.errors import InputError

datasets = pytest.importorskip("datasets")

CACHED = "owner___some_chats/default/0.0.0/8a1b2c"
PREPARE = """
import sys
from pathlib import Path
from varlen_sft.data.prepare import PrepareOptions, prepare
for out in sys.argv[3:]:
    out, _, source = out.partition("=")
    try:
        done = prepare(PrepareOptions(inputs=(source,), model=Path(sys.argv[1]), out=Path(out),
                                      chunk_rows=6, workers=2))
        files = done.manifest["made_of"]["inputs"][0]["files"]
        print(done.manifest["inputs"], [name for name, _ in files])
    except ValueError as error:
        print(str(error).replace(sys.argv[2], "CACHE"))
"""


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache of `datasets` with one data set of two splits, as load_dataset leaves it."""
    folder = tmp_path / "cache" / CACHED
    folder.mkdir(parents=True)
    info = None
    for split, rows in (("train", chats(20)), ("test", chats(3))):
        data = datasets.Dataset.from_list(rows, split=split)
        data.save_to_disk(tmp_path / split)
        os.rename(next((tmp_path / split).glob("*.arrow")), folder / f"some_chats-{split}.arrow")
        info = json.loads((tmp_path / split / "dataset_info.json").read_text())
    sizes = {"train": 20, "test": 3}
    info["splits"] = {
        name: {"name": name, "num_bytes": 1, "num_examples": size, "dataset_name": "some_chats"}
        for name, size in sizes.items()
    }
    info |= {"builder_name": "json", "dataset_name": "some_chats", "config_name": "default"}
    info["version"] = {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path / "cache"


def test_what_is_cached_is_prepared_as_its_files_are(tmp_path, cache):
    model = model_folder(tmp_path / "model")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache),
        "HF_HOME": str(tmp_path / "home"),
    }
    arguments = [model, cache, *(f"{tmp_path / name}={source}" for name, source in (
        ("set", "hub:owner/some_chats@train"),
        ("set", "hub:owner/some_chats@train"),
        ("two", "hub:owner/some_chats"),
        ("part", "hub:owner/some_chats@train[:10%]"),
        ("none", "hub:owner/nothing"),
    ))]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PREPARE, *map(str, arguments)], env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = "[{'rows': 20, 'source': 'hub:owner/some_chats@train'}] ['some_chats-train.arrow']"
    assert lines[:2] == [said, said]
    assert lines[2].endswith("has the splits test, train: one must be named (NAME@SPLIT)") or (
        lines[2].endswith("has the splits train, test: one must be named (NAME@SPLIT)")
    )
    assert lines[3].startswith("hub:owner/some_chats: the split 'train[:10%]' is no whole one")
    assert lines[4].startswith("hub:owner/nothing: cannot be loaded: ")
    made(tmp_path / "files", model, cache / CACHED / "some_chats-train.arrow")
    for suffix in (".bin", ".idx", ".weights", ".roles"):
        assert contents(tmp_path / "set")[suffix] == contents(tmp_path / "files")[suffix]


def test_without_datasets_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="hub:a/b: needs datasets: pip install datasets"):
        hub_files(Source("a/b", hub=True))
