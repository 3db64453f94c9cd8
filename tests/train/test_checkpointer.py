from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.train.saved import Tensors, contents, made, names, saved, tensors
from varlen_sft.data.stream_state import load_state
from varlen_sft.errors import RunError
from varlen_sft.train import checkpoint_folder
from varlen_sft.train.checkpoint import Checkpointer


def test_everything_comes_back(tmp_path):
    there, here = made(0, updates=3), made(1)
    there["ids"]["wandb"] = "abc"
    next(iter(there["stream"]))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    random.gauss(0, 1), np.random.normal()  # both keep a second number for the next call
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(there, 3)
        drawn = random.gauss(0, 1), np.random.normal(), torch.rand(1), random.random()
        checkpoints.wait()
        assert checkpoints.latest() == tmp_path / "step-00000003"
        assert checkpoints.load(here, checkpoints.latest()) == 3
    again = random.gauss(0, 1), np.random.normal(), torch.rand(1), random.random()
    assert drawn == again
    expected, found = tensors(there), tensors(here)
    assert expected.keys() == found.keys() and len(expected) > 50
    for name, value in expected.items():
        assert torch.equal(value, found[name]) and value.dtype == found[name].dtype, name
    assert here["run"] == there["run"] and here["ids"] == {"wandb": "abc"}
    assert here["stream"].state_dict() == there["stream"].state_dict()


def test_what_is_saved_is_the_state_at_the_call(tmp_path, monkeypatch):
    state = made()
    before = {name: value.clone() for name, value in tensors(state).items()}
    with Checkpointer(tmp_path) as checkpoints:
        write = checkpoints._ranks.save

        def late(staged, writer):
            with torch.no_grad():
                for value in tensors(state).values():
                    value.fill_(7)
            state["run"].step = 99
            write(staged, writer)

        monkeypatch.setattr(checkpoints._ranks, "save", late)
        checkpoints.save(state, 1)
        checkpoints.wait()
        monkeypatch.undo()
        here = made(1)
        checkpoints.load(here, checkpoints.latest())
    assert all(torch.equal(value, before[name]) for name, value in tensors(here).items())
    assert here["run"].step == 1


def test_lists_within_a_state_are_those_of_the_call(tmp_path, monkeypatch):
    state = Tensors(counts={"given": [1]})
    with Checkpointer(tmp_path) as checkpoints:
        write = checkpoints._ranks.save
        gate = threading.Event()
        monkeypatch.setattr(
            checkpoints._ranks, "save", lambda *given: (gate.wait(60), write(*given))
        )
        checkpoints.save({"a": state}, 1)
        state["counts"]["given"].append(2)
        gate.set()
    written = json.loads((tmp_path / "step-00000001/a.json").read_text())
    assert written == {"counts": {"given": [1]}}


def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpoints:
        write = checkpoints._ranks.save
        gate = threading.Event()
        monkeypatch.setattr(
            checkpoints._ranks, "save", lambda *given: (gate.wait(60), write(*given))
        )
        checkpoints.save(made(), 1)
        assert names(tmp_path) == [] and not checkpoints.failed  # and we are here
        gate.set()
        checkpoints.save(made(), 2)  # waits for the first
        assert "step-00000001" in names(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    found: list[tuple[Path, int]] = []
    sync = os.fsync

    def noted(file: int) -> None:
        found.append((Path(os.readlink(f"/proc/self/fd/{file}")), os.fstat(file).st_size))
        sync(file)

    monkeypatch.setattr(os, "fsync", noted)
    path = saved(tmp_path)
    *files, (inner, _), (outer, _) = found
    before = tmp_path / "step-00000001.tmp"
    assert dict(files) == {before / name: len(data) for name, data in contents(path).items()}
    assert (inner, outer) == (before, tmp_path)


def test_the_files_are_plain_and_hold_no_pickle(tmp_path):
    state = made()
    path = saved(tmp_path, state)
    assert sorted(contents(path)) == [
        "SHA256SUMS", "checkpoint.json", "rank-00000.safetensors", "run.json", "stream.json"
    ]  # fmt: skip
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=path,
                   check=True)  # fmt: skip
    weights = load_file(path / "rank-00000.safetensors")
    model = state["model"].state_dict()
    assert "lm_head.weight" not in model  # tied: held once
    for name, value in model.items():
        assert torch.equal(weights[f"model.{name}"], value), name
    assert load_state(path / "stream.json") == state["stream"].state_dict()
    index = json.loads((path / "checkpoint.json").read_text())
    assert (index["version"], index["step"], index["ranks"]) == (1, 1, 1)


def test_every_dtype_and_shape_comes_back_from_aligned_places(tmp_path):
    dtypes = (torch.uint8, torch.bool, torch.bfloat16, torch.float16, torch.int16, torch.float32,
              torch.int32, torch.float64, torch.int64, torch.int8)  # fmt: skip
    shapes = ((3,), (), (0, 5), (2, 3, 1))
    there = Tensors(
        {f"{dtype} {shape}": torch.randint(0, 2, shape).to(dtype)
         for dtype in dtypes for shape in shapes}
    )  # fmt: skip
    there["strided"] = torch.arange(12.0).view(3, 4).t()[1:]
    here = Tensors({name: torch.full_like(value, 1) for name, value in there.items()})
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save({"all": there}, 1)
        checkpoints.wait()
        checkpoints.load({"all": here}, checkpoints.latest())
    for name, value in there.items():
        assert torch.equal(here[name], value) and here[name].dtype == value.dtype, name
    index = json.loads((tmp_path / "step-00000001/checkpoint.json").read_text())
    for name, facts in index["tensors"].items():
        size = there[name.removeprefix("all.")].itemsize
        assert facts["parts"][0]["start"] % size == 0, name


def test_the_newest_are_kept(tmp_path):
    saved(tmp_path, made(), 2, 4, 10, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000010"]
    saved(tmp_path, made(), 99999999, 100000000, keep=1)
    assert names(tmp_path) == ["step-100000000"]
    assert Checkpointer(tmp_path).latest() == tmp_path / "step-100000000"


def test_a_step_that_is_saved_again_replaces_its_checkpoint(tmp_path):
    saved(tmp_path, made(0), 1, 2)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(made(5), 2)
        checkpoints.wait()
        here = made(1)
        checkpoints.load(here, checkpoints.latest())
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    for name, value in tensors(made(5)).items():
        assert torch.equal(value, tensors(here)[name]), name


def test_an_earlier_step_removes_no_later_one(tmp_path):
    saved(tmp_path, made(), 8, 10)
    saved(tmp_path, made(), 3, 5, keep=1)
    assert names(tmp_path) == ["step-00000005", "step-00000008", "step-00000010"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    path = saved(tmp_path, made(), 7)
    (tmp_path / "step-00000009.tmp").mkdir()
    (tmp_path / "step-00000009.tmp/rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000005.old.tmp").mkdir()
    (tmp_path / "other.tmp").mkdir()
    with Checkpointer(tmp_path) as checkpoints:
        assert names(tmp_path) == ["other.tmp", "step-00000007"]
        assert checkpoints.latest() == path


def test_killed_while_a_step_is_replaced_the_one_before_counts(tmp_path, monkeypatch):
    path = saved(tmp_path, made(), 7, keep=1)
    before, rename = contents(path), Path.rename

    def killed(source: Path, target: Path) -> Path:
        if target == path:
            raise KeyboardInterrupt
        return rename(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        checkpoint_folder.publish(tmp_path / "step-00000007.tmp", path)
    assert names(tmp_path) == ["step-00000007.replaced.tmp"]
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.latest() == path
    assert contents(path) == before


def test_states_that_cannot_be_saved_are_refused_in_the_call(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        for state, error, told in (
            ({"a": Tensors({1: 2})}, TypeError, "keys of a must be strings, got 1"),
            (
                {"a": Tensors(x=[torch.ones(1)])},
                TypeError,
                "the state of a must be tensors",
            ),
            ({"a": Tensors(x=object())}, TypeError, "the state of a must be tensors"),
            ({"a.b": Tensors()}, ValueError, "a state's name must have no dot, got 'a.b'"),
        ):
            with pytest.raises(error, match=told):
                checkpoints.save(state, 1)
        checkpoints.save({"a": Tensors(x=torch.ones(2, dtype=torch.complex64))}, 1)
        with pytest.raises(RunError, match="a.x must be of a dtype of safetensors, is torch"):
            checkpoints.wait()
    assert names(tmp_path) == []
    for options in ({"keep": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="keep and every must be at least 1"):
            Checkpointer(tmp_path, **options)


def test_one_run_at_a_time(tmp_path):
    code = "import sys; from varlen_sft.train.checkpoint import Checkpointer; "
    with Checkpointer(tmp_path):
        other = subprocess.run(
            [sys.executable, "-c", f"{code} Checkpointer({str(tmp_path)!r})"],
            capture_output=True, text=True,
        )  # fmt: skip
    assert f"another run writes its checkpoints here (process {os.getpid()} on" in other.stderr
    with Checkpointer(tmp_path):
        pass


def test_an_error_on_its_way_still_lets_the_write_finish(tmp_path):
    with pytest.raises(KeyError), Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(made(), 1)
        raise KeyError
    assert names(tmp_path) == ["step-00000001"]
    assert Checkpointer(tmp_path).latest() is not None


def test_nothing_there_is_a_fresh_start(tmp_path):
    with Checkpointer(tmp_path / "new/run", every=3) as checkpoints:
        assert checkpoints.latest() is None
        assert [step for step in range(1, 8) if checkpoints.due(step)] == [3, 6]
    assert not Checkpointer(tmp_path).due(3)
