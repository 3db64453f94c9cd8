"""What is done about checkpoints that are damaged, of something else, or cannot be written."""

from __future__ import annotations

import os
import resource
import subprocess

import pytest
import torch

from tests.train.ranks import on_ranks
from tests.train.resumable import held_by_rank_1, newest_of
from tests.train.saved import contents, made, names, saved, tensors
from varlen_sft.errors import InputError, RunError
from varlen_sft.train import checkpoint_folder
from varlen_sft.train.checkpoint import Checkpointer, RunIds


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda p: flip(p / "rank-00000.safetensors", 5000), "rank-00000.safetensors does not"),
        (lambda p: os.truncate(p / "rank-00000.safetensors", 100), "rank-00000.safetensors does"),
        (lambda p: (p / "rank-00000.safetensors").unlink(), "No such file .*rank-00000"),
        (lambda p: flip(p / "checkpoint.json", 30), "checkpoint.json does not have the checksum"),
        (lambda p: (p / "stream.json").unlink(), "No such file .*stream.json"),
        (lambda p: (p / "SHA256SUMS").unlink(), "No such file .*SHA256SUMS"),
        (lambda p: cut(p / "SHA256SUMS", "rank"), "does not list rank-00000.safetensors"),
        (lambda p: cut(p / "SHA256SUMS", "checkpoint"), "SHA256SUMS does not list checkpoint.json"),
        (lambda p: os.truncate(p / "SHA256SUMS", 60), "has a line that is no checksum"),
    ],
)  # fmt: skip
def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, harm, told):
    saved(tmp_path, made(), 1, 2)
    before = contents(tmp_path / "step-00000001")
    harm(tmp_path / "step-00000002")
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        with pytest.warns(RuntimeWarning, match=f"step-00000002 is damaged: .*{told}.*passed over"):
            assert checkpoints.latest() == tmp_path / "step-00000001"
        assert checkpoints.load(made(1), checkpoints.latest()) == 1
        assert names(tmp_path) == ["step-00000001", "step-00000002.damaged"]
        assert contents(tmp_path / "step-00000001") == before
        checkpoints.save(made(), 2)
    assert names(tmp_path) == ["step-00000002", "step-00000002.damaged"]


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path, word: str) -> None:
    path.write_text("".join(x for x in path.read_text().splitlines(True) if word not in x))


def test_a_step_that_is_damaged_again_is_set_aside_again(tmp_path):
    for seed in (0, 1):
        path = saved(tmp_path, made(seed), 1, 2)
        flip(path / "stream.json", 9)
        before = contents(path)
        with Checkpointer(tmp_path) as checkpoints, pytest.warns(RuntimeWarning, match="stream"):
            assert checkpoints.latest() == tmp_path / "step-00000001"
        assert names(tmp_path) == ["step-00000001", "step-00000002.damaged"]
        assert contents(tmp_path / "step-00000002.damaged") == before


def test_ranks_that_share_the_files_out_pass_over_the_same_checkpoints(tmp_path):
    saved(tmp_path, made(), 1, 2, 3, keep=3)
    for step, name in ((3, "run.json"), (2, "rank-00000.safetensors")):  # of rank 0, and of rank 1
        flip(tmp_path / f"step-0000000{step}" / name, 9)
    assert on_ranks(2, newest_of, tmp_path) == ["step-00000001"] * 2
    assert names(tmp_path) == ["step-00000001", "step-00000002.damaged", "step-00000003.damaged"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: flip(file, 9),
        lambda file: file.write_bytes(file.read_bytes()[:1000]),
        lambda file: file.unlink(),
    ],
    ids=["flipped", "cut", "gone"],
)
def test_a_damaged_index_is_passed_over_by_all_ranks(tmp_path, harm):
    saved(tmp_path, made(), 1, 2)
    harm(tmp_path / "step-00000002" / "checkpoint.json")
    assert on_ranks(2, newest_of, tmp_path) == ["step-00000001"] * 2


def test_nothing_good_is_an_error_not_a_fresh_start(tmp_path):
    saved(tmp_path, made(), 1, 2)
    for step in (1, 2):
        flip(tmp_path / f"step-0000000{step}/checkpoint.json", 9)
    with Checkpointer(tmp_path) as checkpoints, pytest.warns(RuntimeWarning):
        with pytest.raises(RunError, match="all checkpoints are damaged"):
            checkpoints.latest()


def test_one_that_is_given_is_checked_too(tmp_path):
    path = saved(tmp_path / "a")
    flip(path / "rank-00000.safetensors", 4000)
    state = made(1)
    before = {name: value.clone() for name, value in tensors(state).items()}
    with Checkpointer(tmp_path / "b") as checkpoints:
        with pytest.raises(InputError, match="step-00000001: is damaged: rank-00000"):
            checkpoints.load(state, path)
    assert all(torch.equal(value, before[name]) for name, value in tensors(state).items())
    path = saved(tmp_path / "c", made(), 1, 2)
    with Checkpointer(tmp_path / "c") as checkpoints:
        with pytest.raises(InputError, match="step-00000002 is newer: remove it to go on from"):
            checkpoints.load(made(), tmp_path / "c/step-00000001")
    with Checkpointer(tmp_path / "b") as checkpoints:
        assert checkpoints.load(made(1), tmp_path / "c/step-00000001") == 1


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (made(num_hidden_layers=3), "lacks model.layers.2.input_layernorm.weight and 5 more"),
        (made(num_hidden_layers=1), "has unknown model.layers.1.input_layernorm.weight and 5"),
        (made(intermediate_size=56), r"must be BF16 of shape \[112, 32\], is BF16 of \[96, 32\]"),
        (made(dtype=torch.float32), "must be F32 of shape .*, is BF16 of"),
        ({"schedule": RunIds()}, "the checkpoint lacks schedule"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(tmp_path, changed, told):
    saved(tmp_path)
    state = {**made(1), **changed}
    before = {name: value.clone() for name, value in tensors(state).items()}
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(InputError, match=f"step-00000001: .*{told}"):
            checkpoints.load(state, checkpoints.latest())
    assert all(torch.equal(value, before[name]) for name, value in tensors(state).items())


def test_another_version_is_refused_and_stays(tmp_path):
    path = saved(tmp_path)
    text = (path / "checkpoint.json").read_text()
    (path / "checkpoint.json").write_text(text.replace('"version": 1', '"version": 2'))
    subprocess.run("sha256sum *.json *.safetensors > SHA256SUMS", shell=True, cwd=path, check=True)
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(InputError, match="checkpoint.json: must be of version 1, is of 2"):
            checkpoints.latest()
    assert names(tmp_path) == ["step-00000001"]


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path):
    path = saved(tmp_path)
    before = contents(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            checkpoints.save(made(), 2)
            with pytest.raises(RunError, match="00000002.tmp: the checkpoint cannot be written: .*"
                               "File too large"):  # fmt: skip
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == ["step-00000001"] and contents(path) == before
        assert checkpoints.latest() == path
        checkpoints.save(made(), 2)
    assert names(tmp_path) == ["step-00000002"]


def test_a_folder_that_rank_0_cannot_have_is_named_on_every_rank(tmp_path):
    for name, told in on_ranks(2, held_by_rank_1, tmp_path):
        assert name == "RunError" and "another run writes its checkpoints here (process" in told


def test_a_failed_write_shows_before_anybody_waits(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="cannot be written: PermissionError"):
        with Checkpointer(tmp_path) as checkpoints:
            monkeypatch.setattr(checkpoint_folder, "sync_folder", denied)
            checkpoints.save(made(), 1)
            checkpoints._writing.exception(timeout=60)
            assert checkpoints.failed
    Checkpointer(tmp_path).close()  # the folder is free again


def denied(folder) -> None:
    raise PermissionError("PermissionError: not here")
