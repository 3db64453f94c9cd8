"""The record of other packages' signatures, held against the packages themselves, which never run.

The adapters are tested on functions made from this record (``attention_packages``).
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.ops import packages
from tests.ops.attention_packages import RECORD

IN_THE_INDEX = [entry for entry in RECORD if entry["sha256"]]


@pytest.mark.parametrize("entry", IN_THE_INDEX, ids=lambda entry: entry["package"])
def test_the_record_is_what_the_package_says(entry, request):
    cache = request.config.cache.mkdir("packages")
    archive = packages.fetch(entry["package"], entry["version"], entry["sha256"], cache)
    if isinstance(archive, str):
        pytest.skip(archive)
    source = packages.read(archive, entry["file"])
    assert packages.signature(source, entry["function"]) == entry["signature"]


def test_the_record_is_what_the_installed_torch_says():
    entry = next((e for e in RECORD if version("torch").split("+")[0] == e["version"]), None)
    if entry is None:
        pytest.skip(f"no record of torch {version('torch')}")
    source = Path(importlib.util.find_spec("torch.nn.attention.varlen").origin).read_text()
    assert packages.signature(source, "varlen_attn") == entry["signature"]


def test_a_signature_is_read_with_its_defaults_and_kinds_and_without_annotations():
    source = "import nowhere\ndef f(a: int, b: T = (-1, 2), *, c: str | None = None) -> T: ..."
    assert packages.signature(source, "f") == "(a, b=(-1, 2), *, c=None)"
