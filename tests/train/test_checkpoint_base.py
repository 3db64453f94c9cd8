"""Checkpoints of runs that train a part of a model hold it, and know the rest by its hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.train.disturbed import kept, steps, train
from tests.train.ranks import on_ranks
from tests.train.setups import llama_folder, small_run
from varlen_sft.errors import InputError
from varlen_sft.models.checkpoint import INDEX, WEIGHTS, weights_fingerprint
from varlen_sft.models.llama import LlamaForSFT

LORA = ("--lora_rank", "2")
CONSTANT = ("--schedule", "constant", "--warmup", "0")
"""A rate that does not know how long the run is."""
FROZEN = ("--frozen", "['embed_tokens.*', 'layers.0.*']")


@pytest.fixture
def place(tmp_path):
    small_run(tmp_path)  # writes the files
    return tmp_path


def held(folder: Path, step: int = 4) -> set[str]:
    """Names of the model's tensors in a checkpoint."""
    path = folder / "out" / "checkpoints" / f"step-{step:08}" / "checkpoint.json"
    names = json.loads(path.read_text())["tensors"]
    return {name.removeprefix("model.") for name in names if name.startswith("model.")}


def base(folder: Path, step: int = 4) -> str | None:
    path = folder / "out" / "checkpoints" / f"step-{step:08}" / "model.json"
    return json.loads(path.read_text())["base"] if path.exists() else None


def sha256(*contents: bytes) -> str:
    digests = b"".join(hashlib.sha256(content).digest() for content in contents)
    return hashlib.sha256(digests).hexdigest()


def adapter(folder: Path) -> bytes:
    return (folder / "out" / "model" / "adapter_model.safetensors").read_bytes()


def test_of_a_lora_run_it_holds_the_adapter_and_goes_on_bit_for_bit(place, tmp_path_factory):
    train(place, *LORA, *CONSTANT, "--steps", "8")
    names = held(place, 8)
    assert len(names) == 2 * 7 * 2 and all("lora_" in name for name in names)
    assert base(place, 8) == sha256((place / "llama" / WEIGHTS).read_bytes())
    again = tmp_path_factory.mktemp("again")
    small_run(again)
    train(again, *LORA, *CONSTANT, "--steps", "4")
    train(again, *LORA, *CONSTANT, "--steps", "8")
    assert (adapter(again), steps(again)) == (adapter(place), steps(place))
    assert list(steps(again)) == list(range(1, 9))


@pytest.mark.parametrize("options", [LORA, FROZEN])
def test_other_frozen_weights_are_refused_and_nothing_changes(place, options):
    train(place, *options, "--steps", "4")
    file = place / "llama" / WEIGHTS
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    told = f"step-00000004: holds only what is trained.* was {sha256(before)}, is "
    with pytest.raises(InputError, match=told):
        train(place, *options, "--steps", "6")
    file.write_bytes(before)
    (place / "llama").rename(place / "moved")  # where it lies does not matter
    assert train(place, *options, "--steps", "6", "--name", str(place / "moved")) == "finished"
    assert kept(place) == [4, 6]


def test_frozen_parts_are_left_out_unless_no_file_has_them(place, tmp_path_factory):
    train(place, *FROZEN, "--steps", "4")
    model = LlamaForSFT.from_pretrained(place / "llama")
    all_names = {name for name, _ in model.named_parameters()}
    frozen = {name for name in all_names if name.startswith(("embed_tokens.", "layers.0."))}
    assert held(place) == all_names - frozen and base(place)
    random = tmp_path_factory.mktemp("random")
    small_run(random)
    train(random, *FROZEN, "--steps", "4", "--random_init", "true")
    assert held(random) == all_names and base(random) is None
    with pytest.raises(InputError, match="the checkpoint lacks model.embed_tokens.weight and"):
        train(place, "--steps", "6")  # nothing is frozen any more


@pytest.mark.e2e
def test_two_ranks_go_on_with_shards_of_an_adapter_where_one_was(place):
    options = (*LORA, *CONSTANT)
    train(place, *options, "--steps", "4")
    arguments = (*options, "--strategy", "fsdp", "--steps", "8")
    assert on_ranks(2, train, place, *arguments) == ["finished"] * 2
    assert held(place, 8) == held(place, 6) and base(place, 8) == base(place, 6)
    assert list(steps(place)) == list(range(1, 9))


def test_a_fingerprint_is_of_the_contents_of_all_files_of_the_weights(tmp_path):
    one = llama_folder(tmp_path / "one")
    assert weights_fingerprint(one) == sha256((one / WEIGHTS).read_bytes())
    (one / "adapter_model.safetensors").write_bytes(b"of somebody else")
    assert weights_fingerprint(one) == sha256((one / WEIGHTS).read_bytes())
    parts = tmp_path / "parts"
    parts.mkdir()
    names = ["b.safetensors", "a.safetensors"]
    (parts / INDEX).write_text(json.dumps({"weight_map": {"x": names[0], "y": names[1]}}))
    (parts / names[0]).write_bytes(b"b")
    with pytest.raises(InputError, match="a.safetensors: cannot be read: No such file"):
        weights_fingerprint(parts)
    (parts / names[1]).write_bytes(b"a")
    assert weights_fingerprint(parts) == sha256(b"a", b"b")
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        weights_fingerprint(tmp_path)
