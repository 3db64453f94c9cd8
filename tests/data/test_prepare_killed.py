"""prepare, killed at any instant: at what it does to files, and by the clock. It always goes on."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.data.prepared import chats, contents, jsonl, made
from varlen_sft.data.prepare import merge
from varlen_sft.errors import InputError

RUN = """
import os, signal, sys
from pathlib import Path
from varlen_sft.data.prepare import PrepareOptions, prepare
out, model, data, workers, shard, processor, stop = sys.argv[1:]
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
seen = 0
def hook(event, arguments):
    global seen
    if event in EVENTS and str(arguments[0]).startswith(out):
        seen += 1
        if seen > int(stop):
            os.kill(os.getpid(), signal.SIGKILL)
options = PrepareOptions(inputs=(data,), model=Path(model), out=Path(out), chunk_rows=6,
    workers=int(workers), shard=eval(shard), sample_processor=eval(processor))
if int(stop) >= 0:
    sys.addaudithook(hook)
prepare(options)
"""
WORKER = """
import os, signal, sys
from pathlib import Path
armed = Path(__file__).with_name("armed")
left = int(armed.read_text()) if armed.exists() else None
def hook(event, arguments):
    global left
    if left is not None and event in ("open", "os.rename") and ".part." in str(arguments[0]):
        left -= 1
        if left < 0 and armed.exists():
            armed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
def row(row):
    return row
"""


def run(out: Path, model: Path, data: Path, workers: int = 1, *, shard=None, processor=None,
        stop: int = -1, **options) -> subprocess.Popen:  # fmt: skip
    """A run in a process of its own, which kills itself before so many events of files."""
    arguments = [out, model, data, workers, shard, repr(processor), stop]
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)


def kill_at_events(folder: Path, model: Path, data: Path, stops: Iterable[int], whole) -> None:
    """Kill at each of these events a run that is new, and go on; until one gets to its end."""
    for stop in stops:
        out = folder / str(stop) / "set"
        out.parent.mkdir(parents=True)
        code = run(out, model, data, 1 + stop % 3, stop=stop).wait()
        assert code in (0, -signal.SIGKILL)
        done = made(out, model, data, workers=1 + (stop + 1) % 3)
        assert done.state == "made" or stop > 40
        assert contents(out) == whole
        assert not Path(f"{out}.parts").exists()
        if code == 0:
            return


def test_killed_at_some_events_of_files_it_goes_on(tmp_path, model, data, whole):
    stops = random.Random(3).sample(range(60), 5)
    kill_at_events(tmp_path / "runs", model, data, sorted(stops), whole)


@pytest.mark.e2e
def test_killed_at_every_event_of_files_it_goes_on(tmp_path, model, data, whole):
    kill_at_events(tmp_path / "runs", model, data, itertools.count(), whole)


@pytest.mark.parametrize("event", [0, 1, 5])  # before a part is begun, before it is moved, later
def test_a_worker_killed_at_an_event_of_files_is_gone_on_from(
    tmp_path, model, data, event, monkeypatch
):
    (tmp_path / "killing.py").write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    made(tmp_path / "undisturbed", model, data, sample_processor="killing:row")
    out = tmp_path / "set"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    (tmp_path / "armed").write_text(str(event))
    process = run(out, model, data, 2, processor="killing:row", env=environment)
    assert process.wait() == 1 and not (tmp_path / "armed").exists()
    made(out, model, data, workers=2, sample_processor="killing:row")
    assert contents(out) == contents(tmp_path / "undisturbed")


def workers_of(process: int) -> list[int]:
    """Its children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == process:
            found.append(int(path.parent.name))
    return found


def kill_by_the_clock(out: Path, model: Path, data: Path, kills: int, seed: int, whole) -> None:
    """Kill runs, or one of their workers, after random times; each goes on from the one before."""
    draw = random.Random(seed)
    while kills:
        process = run(out, model, data, draw.choice([1, 2, 3]))
        time.sleep(draw.uniform(0.1, 1.0))
        if process.poll() is None:
            os.kill(draw.choice([process.pid, *workers_of(process.pid)]), signal.SIGKILL)
        code = process.wait()
        assert code in (-signal.SIGKILL, 1, 0)  # 1: it told that its worker was killed
        kills -= code != 0
        if code == 0:  # begin again
            assert contents(out) == whole
            for suffix in whole:
                os.unlink(f"{out}{suffix}")


@pytest.mark.e2e
def test_killed_by_the_clock_it_goes_on(tmp_path, model):
    data = jsonl(tmp_path / "chats.jsonl", chats(1500))
    made(tmp_path / "undisturbed", model, data)
    whole = contents(tmp_path / "undisturbed")
    kill_by_the_clock(tmp_path / "set", model, data, 40, 1, whole)
    made(tmp_path / "set", model, data)
    assert contents(tmp_path / "set") == whole


@pytest.mark.e2e
def test_shards_killed_by_the_clock_merge_to_the_bytes_of_one_process(tmp_path, model):
    data = jsonl(tmp_path / "chats.jsonl", chats(1500))
    made(tmp_path / "undisturbed", model, data)
    draw = random.Random(1)
    for i in (1, 2, 3):
        for _ in range(6):
            process = run(tmp_path / "set", model, data, i, shard=(i, 3))
            time.sleep(draw.uniform(0.1, 0.7))
            process.kill()
            process.wait()
        with pytest.raises(InputError, match="no shard has been|chunks are missing|no parts of"):
            merge(tmp_path / "set")
        made(tmp_path / "set", model, data, shard=(i, 3), workers=i)
    merge(tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")
