"""One run at a time on a PREFIX; a lock ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.prepared import contents, made
from varlen_sft import cli
from varlen_sft.data.prepare import merge
from varlen_sft.data.prepare_lock import empty, locked
from varlen_sft.errors import InputError, RunError

HOLDER = """
import sys, time
from pathlib import Path
from varlen_sft.data.prepare_lock import locked
with locked(Path(sys.argv[1]), eval(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holding():
    """Starts processes that hold a folder, and ends them."""
    started = []

    def hold(folder: Path, shard: object = None) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(folder), str(shard)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_by_name_until_the_first_is_gone(
    tmp_path, model, data, holding, capsys
):
    out, parts = tmp_path / "set", tmp_path / "set.parts"
    first = holding(parts)
    told = (
        f"{parts}: another prepare or merge is at work here (process {first.pid} on "
        f"{os.uname().nodename}): wait for it, or take another PREFIX"
    )
    for shard in (None, (1, 2)):
        with pytest.raises(RunError) as caught:
            made(out, model, data, shard=shard, force=True)
        assert str(caught.value) == told
    with pytest.raises(RunError, match="another prepare or merge is at work here"):
        merge(out)
    command = ["prepare", str(data), "--model", str(model), "--out", str(out)]
    assert cli.main(command) == 1
    assert capsys.readouterr().err == f"varlen-sft: error: {told}\n"
    assert contents(out) == {} and os.listdir(parts) == ["lock"]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert made(out, model, data).state == "made"  # at once: nothing stale is in the way
    assert not parts.exists()


def test_shards_work_beside_each_other_but_not_twice(tmp_path, model, data, holding):
    out, parts = tmp_path / "set", tmp_path / "set.parts"
    parts.mkdir()
    (parts / "lock").write_text("process 1 of a run that was killed")
    first = holding(parts, (1, 3))
    with pytest.raises(InputError, match="no such file"):  # which takes no lock with it
        made(out, model, tmp_path / "none.jsonl", shard=(2, 3))
    assert sorted(os.listdir(parts)) == ["lock", "lock.1-of-3", "lock.2-of-3"]
    assert made(out, model, data, shard=(2, 3)).state == "shard"
    assert made(out, model, data, shard=(1, 2)).state == "shard"
    with pytest.raises(RunError, match=rf"\(process {first.pid} on .*\): wait for it"):
        made(out, model, data, shard=(1, 3))
    for attempt in (lambda: made(out, model, data), lambda: merge(out)):
        with pytest.raises(RunError, match=r"is at work here \(on a shard\): wait"):
            attempt()
    first.kill()
    first.wait()
    made(out, model, data, shard=(1, 3))
    made(tmp_path / "whole", model, data)
    with pytest.raises(InputError, match="chunks are missing"):
        merge(out)
    made(out, model, data, shard=(3, 3))
    merge(out)
    assert contents(out) == contents(tmp_path / "whole") and not parts.exists()


def test_what_was_made_for_nothing_is_removed(tmp_path, model, data):
    with pytest.raises(InputError, match="no such file"):
        made(tmp_path / "new" / "newer" / "set", model, tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no such file"):
        made(tmp_path / "set", model, tmp_path / "none.jsonl", shard=(1, 2))
    assert os.listdir(tmp_path) == ["chats.jsonl"]
    with locked(tmp_path / "set.parts"):
        (tmp_path / "set.parts" / "00000000.part").touch()
    assert sorted(os.listdir(tmp_path / "set.parts")) == ["00000000.part", "lock"]
    with locked(tmp_path / "set.parts"):
        (tmp_path / "set.parts" / "new-1").mkdir()
        empty(tmp_path / "set.parts")
        assert os.listdir(tmp_path / "set.parts") == ["lock"]
    assert os.listdir(tmp_path) == ["chats.jsonl"]


def test_a_lock_that_its_holder_removed_locks_nobody_out(tmp_path, monkeypatch):
    folder = tmp_path / "set.parts"
    lock = folder / "lock"
    real = fcntl.flock
    removed = []

    def flock(file, how):
        real(file, how)
        if not removed:  # between the two calls of the one that comes, the one that was goes
            lock.unlink()
            removed.append(file)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(folder):
        with pytest.raises(RunError), locked(folder):
            pytest.fail("held twice")
    assert removed and not folder.exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(RuntimeWarning, match=r"lock: this file system has no locks \(No locks"):
        with locked(tmp_path / "set.parts"):
            pass
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/set.parts cannot be written: .*Not a directory"):
        with locked(tmp_path / "file" / "set.parts"):
            pass
