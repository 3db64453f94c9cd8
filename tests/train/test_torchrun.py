"""What a signal to torchrun, or to one of its ranks, does to a run."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.train.disturbed import kept, steps
from tests.train.setups import small_run
from varlen_sft.train.config_out import dump

pytestmark = pytest.mark.e2e
WAIT_S = 120
REPOSITORY = Path(__file__).parents[2]


def start(command: Sequence[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
                                "PYTHONPATH": str(REPOSITORY)}  # fmt: skip
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)


def torchrun(words: Sequence[str]) -> list[str]:
    """As ``torchrun`` of this interpreter's own torch."""
    return [sys.executable, "-m", "torch.distributed.run", "--master-port=0",
            "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *words]  # fmt: skip


def until_step(run: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + WAIT_S
    log = folder / "out" / "log.jsonl"
    while not log.exists() or max(steps(folder), default=0) < step:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.05)


def ranks_of(run: subprocess.Popen) -> list[int]:
    return [int(p) for p in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump(small_run(tmp_path, "--steps", "100000", "--valid", "[]")))
    return path


def test_a_signal_to_torchrun_saves_and_what_is_printed_goes_on(tmp_path, file):
    words = ["--nproc-per-node=2", "-m", "varlen_sft.cli", "train", str(file)]
    with start(torchrun(words)) as run:
        until_step(run, tmp_path, 3)
        run.send_signal(signal.SIGTERM)
        said, errors = run.communicate(timeout=WAIT_S)
    done = max(steps(tmp_path))
    assert run.returncode == 1 and "SignalException" in errors  # as --help says
    assert "forcefully exiting" not in errors
    assert kept(tmp_path) == [done]
    command = said.split(f"saved after step {done}; to go on: ")[1].splitlines()[0]
    program, *rest = shlex.split(command)
    assert program == "torchrun" and rest == words
    with start(torchrun([*rest, f"--steps={done + 2}"])) as run:
        said, errors = run.communicate(timeout=WAIT_S)
    assert run.returncode == 0, errors
    assert f"goes on after step {done} of {done + 2}" in said
    assert list(steps(tmp_path)) == list(range(1, done + 3))


def test_a_signal_to_one_rank_ends_all_of_them_well(tmp_path, file):
    words = ["--nproc-per-node=2", "-m", "varlen_sft.cli", "train", str(file)]
    with start(torchrun(words)) as run:
        until_step(run, tmp_path, 3)
        os.kill(ranks_of(run)[1], signal.SIGTERM)
        said, errors = run.communicate(timeout=WAIT_S)
    assert run.returncode == 0, errors
    assert kept(tmp_path) == [max(steps(tmp_path))] and "to go on: torchrun" in said


def test_a_rank_that_dies_ends_torchrun_and_its_other_rank_says_so(tmp_path, file):
    words = ["--nproc-per-node=2", "-m", "varlen_sft.cli", "train", str(file), "--every=2"]
    with start(torchrun(words)) as run:
        until_step(run, tmp_path, 5)
        os.kill(ranks_of(run)[1], signal.SIGKILL)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and kept(tmp_path)
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
