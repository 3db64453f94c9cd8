"""TensorBoard's files are read back; of W&B the calls are seen, on a package that stands for it."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.train.test_metrics import FULL, RECORD
from tests.train.test_run import log, stop_after, train
from tests.train.test_run import numbers as steps_of
from varlen_sft.errors import InputError
from varlen_sft.train.checkpoint_state import RunIds
from varlen_sft.train.config import LogConfig
from varlen_sft.train.trackers import TensorBoard, numbers, open_trackers, require_trackers


def test_a_tracker_gets_what_is_known_by_name():
    found = numbers(FULL)
    assert found["train/loss"] == FULL.loss and found["train/loss_stop"] == 0.0123
    assert (found["train/loss_user"], found["train/loss_assistant"]) == (2.5, 1.1)
    assert (found["speed/mfu"], found["memory/peak_gb"]) == (0.3951, 78.13)
    assert found["speed/real_tokens_per_s"] == 1000 and found["speed/stall"] == 0.025
    unknown = {"train/loss_stop", "speed/tflops", "speed/naive_tflops", "speed/mfu"}
    roles = {"train/loss_user", "train/loss_assistant"}
    assert found.keys() - numbers(RECORD).keys() == unknown | roles


# -------------------------------------------------------------------- packages


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
@pytest.mark.parametrize("folder", [True, False])
def test_a_missing_package_is_named_before_anything_is_done(package, folder, tmp_path, monkeypatch):
    place = tmp_path / "started in"
    (place / (package if folder else "other")).mkdir(parents=True)  # as W&B leaves them
    found = PathFinder.find_spec(package, [str(place)])
    assert (found is not None) == folder  # Python takes any folder for a package
    everywhere = importlib.util.find_spec
    only_here = lambda name: found if name == package else everywhere(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", only_here)
    value = "true" if package == "tensorboard" else "project"
    named = f"log.{package} needs the package {package}, which is not installed: pip install"
    with pytest.raises(InputError, match=named):
        train(tmp_path, f"--log.{package}", value)
    assert not (tmp_path / "out").exists()
    require_trackers(LogConfig())


# ----------------------------------------------------------------- TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each name, as TensorBoard shows them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)]
            for name in found.Tags()["scalars"]}  # fmt: skip


def test_tensorboard_draws_steps_that_a_run_did_twice_once(tmp_path):
    pytest.importorskip("tensorboard")
    first = TensorBoard(tmp_path, {"optim.lr": 0.5}, 0)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step)})
    first.close(failed=True)
    again = TensorBoard(tmp_path, {"optim.lr": 0.5}, 2)  # its checkpoint was after step 2
    again.log(3, {"train/loss": 30.0})
    again.close(failed=False)
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


# ------------------------------------------------------------------------- W&B


class FakeWandb(ModuleType):
    """Keeps what is called; runs get the ids 'run-1', 'run-2', ... unless they are told one."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[Any] = []
        self.refuses: str | None = None

    Settings = SimpleNamespace

    def init(self, **given: Any) -> Any:
        if self.refuses is not None:
            raise self.Error(self.refuses)
        run = SimpleNamespace(
            given=given, id=given["id"] or f"run-{len(self.runs) + 1}", logged=[], metrics=[],
            ended=None,
        )  # fmt: skip
        run.log = run.logged.append
        run.define_metric = lambda *name, **how: run.metrics.append((*name, how))
        run.finish = lambda exit_code: setattr(run, "ended", exit_code)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    fake.__spec__ = SimpleNamespace(origin="wandb.py")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_wandb_run_that_goes_on_is_the_same_run(wandb, tmp_path, monkeypatch):
    arguments = ("--wandb", "chats", "--samples", "0", "--valid_every", "4", "--every", "4")
    with monkeypatch.context() as patched:
        stop_after(patched, 2, signal.SIGTERM)
        assert train(tmp_path, *arguments)[0] == "asked"
    done = len(log(tmp_path))
    newest = max((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert json.loads((newest / "ids.json").read_text()) == {"wandb": "run-1"}
    assert train(tmp_path, *arguments)[0] == "finished"
    first, second = wandb.runs
    assert first.given["id"] is None and second.given["id"] == first.id == "run-1"
    for run in wandb.runs:
        assert run.given["project"] == "chats" and run.given["dir"] == str(tmp_path / "out")
        assert run.given["config"]["log.wandb"] == "chats"
        assert run.metrics == [("step", {}), ("*", {"step_metric": "step"})]
        assert run.ended == 0
    logged = [*first.logged, *second.logged]
    steps = [line for line in logged if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 7)) and 2 <= done < 6
    assert [line["train/loss"] for line in steps] == [step["loss"] for step in log(tmp_path)]
    valid = [(line["step"], line["valid/loss"]) for line in logged if "valid/loss" in line]
    assert valid == [(v["step"], v["loss"]) for v in log(tmp_path, "validation")]


def test_trackers_get_what_the_log_has_and_change_no_bit(wandb, tmp_path):
    pytest.importorskip("tensorboard")
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    options = ("--samples", "0", "--valid_every", "4")
    for folder, more in ((plain, ()), (tracked, ("--wandb", "chats", "--tensorboard", "true"))):
        folder.mkdir()
        assert train(folder, *options, *more)[0] == "finished"
    assert steps_of(plain) == steps_of(tracked)
    model = Path("out") / "model" / "model.safetensors"
    assert (plain / model).read_bytes() == (tracked / model).read_bytes()
    drawn, steps = scalars(tracked / "out" / "tensorboard"), log(tracked)
    losses = [(step["step"], pytest.approx(step["loss"], rel=1e-6)) for step in steps]  # fp32
    assert drawn["train/loss"] == losses and len(losses) == 6
    assistant = [(s["step"], pytest.approx(s["role_loss"]["assistant"], rel=1e-6)) for s in steps]
    assert drawn["train/loss_assistant"] == assistant
    valid = [(v["step"], pytest.approx(v["loss"], rel=1e-6)) for v in log(tracked, "validation")]
    assert drawn["valid/loss"] == valid and [step for step, _ in valid] == [4, 6]
    assert "train/loss_stop" in drawn and "speed/tflops" in drawn and "speed/mfu" not in drawn


def test_wandb_hears_that_a_run_failed_and_its_refusal_is_told(wandb, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise InputError("no such row")

    with monkeypatch.context() as patched:
        patched.setattr("varlen_sft.train.journal.numbers", fail)
        with pytest.raises(InputError, match="no such row"):
            train(tmp_path, "--wandb", "chats")
    assert [run.ended for run in wandb.runs] == [1]
    wandb.refuses = "No API key configured."
    with pytest.raises(
        InputError, match="log.wandb: W&B does not take the run: No API key.*offline"
    ):
        open_trackers(LogConfig(wandb="chats"), tmp_path, {}, RunIds(), 0)
