"""prepare, stopped: by kill -9, a bad row, a full disk. What was there stays; it can go on."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.data.prepared import chat, chats, contents, jsonl, made
from varlen_sft.data.prepare import merge
from varlen_sft.data.prepare_parts import part_path
from varlen_sft.data.store import Store
from varlen_sft.errors import InputError, RunError

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from varlen_sft.data.prepare import PrepareOptions, prepare
out, model, data, workers, kind, stop = sys.argv[1:]
left = int(stop)
def count_down():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
def killing(function):
    def killing_now(*arguments, **options):
        count_down()
        return function(*arguments, **options)
    return killing_now
if kind == "replace":  # workers move their parts themselves
    os.replace = killing(os.replace)
if kind == "rmtree":
    shutil.rmtree = killing(shutil.rmtree)
options = PrepareOptions(inputs=(data,), model=Path(model), out=Path(out), workers=int(workers),
                         chunk_rows=6, force=True)
prepare(options, lambda stage, *_: stage == kind and count_down())
"""

DYING = """
import os, signal
def once(row):
    armed = os.path.join(os.path.dirname(__file__), "armed")
    if "what is 20?" in row["messages"][0]["content"] and os.path.exists(armed):
        os.unlink(armed)
        os.kill(os.getpid(), signal.SIGKILL)
    return row
"""


def killed(out: Path, model: Path, data: Path, kind: str, stop: int, workers: int = 1) -> None:
    arguments = [out, model, data, workers, kind, stop]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)])
    assert done.returncode == -signal.SIGKILL


def test_killed_while_it_tokenises_it_goes_on(tmp_path, model, data, whole):
    out = tmp_path / "set"
    killed(out, model, data, "rows", 0)  # after the first chunk
    assert part_path(tmp_path / "set.parts", 0).is_file() and contents(out) == {}
    killed(out, model, data, "rows", 2, workers=2)
    done = made(out, model, data)
    assert done.chunks[0] == 7 and 1 <= done.chunks[1] <= 4
    assert contents(out) == whole
    assert not (tmp_path / "set.parts").exists()


def test_killed_while_files_are_moved_it_goes_on(tmp_path, model, data, whole):
    out, parts = tmp_path / "set", tmp_path / "set.parts"
    made(out, model, data, max_tokens=99)
    old = contents(out)
    killed(out, model, data, "replace", 0)  # before the plan of the work
    killed(out, model, data, "write", 6)  # before the files are complete
    assert contents(out) == old and len(list(parts.glob("*.part"))) == 7
    killed(out, model, data, "replace", 0)  # before .bin: only the old manifest is gone
    assert contents(out) == {s: old[s] for s in old if s != ".manifest.json"}
    killed(out, model, data, "replace", 4)  # before the manifest
    assert contents(out) == {s: whole[s] for s in whole if s != ".manifest.json"}
    with pytest.raises(InputError, match="has not finished it"):
        Store(out)
    killed(out, model, data, "rmtree", 1)  # when all is done; the first removes what was stale
    assert contents(out) == whole and parts.is_dir()
    assert made(out, model, data).state == "there"
    assert contents(out) == whole and not parts.exists()


def test_a_worker_that_is_killed_is_told(tmp_path, model, data, monkeypatch):
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"sample_processor": "dying:once", "workers": 2}
    made(tmp_path / "undisturbed", model, data, **options)
    (tmp_path / "armed").touch()
    with pytest.raises(
        RunError, match=r"a worker was killed by signal 9 \(.* at chunk 3, rows 19 to 24"
    ):
        made(tmp_path / "set", model, data, **options)
    assert made(tmp_path / "set", model, data, **options).chunks[1] < 7
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed")


def test_the_first_bad_row_is_named_and_nothing_is_written(tmp_path, model, whole):
    rows = chats()
    for bad in (33, 20, 22):
        rows[bad]["messages"][0]["role"] = "robot"
    data = jsonl(tmp_path / "bad.jsonl", rows)
    out = tmp_path / "set"
    made(out, model, jsonl(tmp_path / "chats.jsonl", chats()))
    for workers in (1, 3):
        with pytest.raises(InputError) as caught:
            made(out, model, data, workers=workers, force=True)
        assert str(caught.value).startswith(f"{data}, row 21: message 1 has the unknown role")
        assert contents(out) == whole


def test_skipped_rows_are_listed(tmp_path, model, data):
    rows = chats()
    rows[20]["messages"][0]["role"] = rows[33]["messages"][1]["role"] = "robot"
    bad = jsonl(tmp_path / "bad.jsonl", rows)
    out = tmp_path / "set"
    with pytest.raises(InputError, match=r"bad.jsonl, row 21: "):
        made(out, model, bad)
    done = made(out, model, bad, on_error="skip", workers=2)
    assert done.chunks == (7, 3)  # those before row 21, and the one after it, were kept
    left_out = [json.loads(line) for line in contents(out)[".rejects.jsonl"].splitlines()]
    assert [(line["file"], line["row"]) for line in left_out] == [(str(bad), 21), (str(bad), 34)]
    assert "message 1 has the unknown role 'robot'" in left_out[0]["reason"]
    counts = done.manifest["counts"]
    assert (counts["rows"], counts["rejected"], counts["samples"]) == (40, 2, 38)
    assert done.manifest["rejects"] == 2
    # The parts of a run that skipped are no licence for one that must not.
    made(tmp_path / "other", model, bad, on_error="skip", shard=(1, 1))
    with pytest.raises(InputError, match=r"bad.jsonl, row 21: "):
        made(tmp_path / "other", model, bad)
    with pytest.raises(InputError, match=r"bad.jsonl, row 21: "):
        merge(tmp_path / "other")
    merge(tmp_path / "other", on_error="skip")
    assert contents(tmp_path / "other") == contents(out)
    made(out, model, data, force=True)
    assert ".rejects.jsonl" not in contents(out)


def test_a_first_bad_row_leaves_nothing(tmp_path, model):
    data = jsonl(tmp_path / "bad.jsonl", [{"messages": []}, *chats(3)])
    with pytest.raises(InputError, match=r"bad.jsonl, row 1: "):
        made(tmp_path / "set", model, data)
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_a_source_that_is_damaged_is_named_after_the_rows_before(tmp_path, model):
    text = json.dumps([*chats(9), chat("a", "b")])
    path = tmp_path / "rows.json"
    path.write_text(text[:-3])
    with pytest.raises(InputError, match=r"rows.json, row 10: not JSON"):
        made(tmp_path / "set", model, path)
    rows = chats(9)
    rows[8]["messages"].pop()
    path.write_text(json.dumps(rows)[:-1])
    with pytest.raises(InputError, match=r"rows.json, row \d+: not JSON"):
        made(tmp_path / "set", model, path, force=True)
    assert contents(tmp_path / "set") == {}


@contextmanager
def full_disk(size: int):
    """No file can grow beyond so many bytes, here and in the processes that are started."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("size", [1900, 4000])
def test_a_full_disk_leaves_what_was_there(tmp_path, model, data, whole, size):
    out = tmp_path / "set"
    made(out, model, data, max_tokens=99)
    before = contents(out)
    where = "set.parts" if size == 1900 else "set"  # a part is larger than 1900, .bin than 4000
    with full_disk(size), pytest.raises(RunError, match=rf"{where}:? cannot be written: .*large"):
        made(out, model, data, force=True)
    assert contents(out) == before
    left = [path for path in (tmp_path / "set.parts").rglob("*") if path.name != "lock"]
    assert {path.suffix for path in left} <= {".json", ".part"}
    done = made(out, model, data, force=True)
    assert done.chunks == (7, 7 if size == 1900 else 0)
    assert contents(out) == whole


def test_damaged_parts_are_made_again(tmp_path, model, data, whole):
    out, folder = tmp_path / "set", tmp_path / "set.parts"
    made(out, model, data, shard=(1, 1))
    os.truncate(part_path(folder, 2), 100)
    part_path(folder, 3).write_bytes(b"")
    (folder / "00000001.part.1.tmp").write_bytes(b"half")
    assert made(out, model, data, shard=(1, 1)).chunks == (7, 2)
    damaged = bytearray(part_path(folder, 5).read_bytes())
    damaged[-1] ^= 1
    part_path(folder, 5).write_bytes(damaged)
    with pytest.raises(RunError, match=r"00000005.part was damaged and is removed"):
        made(out, model, data)
    assert contents(out) == {}
    assert made(out, model, data).chunks == (7, 1)
    assert contents(out) == whole


def test_unfinished_work_of_another_fingerprint_is_not_lost(tmp_path, model, data, whole):
    out = tmp_path / "set"
    made(out, model, data, shard=(1, 7))
    with pytest.raises(InputError) as caught:
        made(out, model, data, max_tokens=99)
    assert str(caught.value) == (
        f"{out}.parts: unfinished work of another fingerprint is in the way (it differs in "
        "max_tokens); --force removes it"
    )
    assert made(out, model, data).chunks == (7, 6)
    assert contents(out) == whole
