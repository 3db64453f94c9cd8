"""How rows are cut to chunks, what a part is of, how many rows there are, who dies with whom."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.columns import parquet
from tests.data.megatron_files import write
from tests.data.prepared import chat, chats, contents, jsonl, made
from varlen_sft.data import prepare_count, prepare_plan
from varlen_sft.data.prepare import merge
from varlen_sft.data.prepare_count import count_rows
from varlen_sft.data.prepare_folder import read_plan
from varlen_sft.data.prepare_inputs import input_files, row_size
from varlen_sft.data.prepare_parts import part_numbers, part_path, read_header
from varlen_sft.data.sources import Source
from varlen_sft.errors import InputError, RunError

ROW = """
import os, time
def slow(row):
    with open(os.path.join(os.path.dirname(__file__), f"worker.{os.getpid()}"), "w"):
        time.sleep(60)
    return row
"""
RUN = """
import sys
from pathlib import Path
from varlen_sft.data.prepare import PrepareOptions, prepare
out, model, data = sys.argv[1:]
prepare(PrepareOptions(inputs=(data,), model=Path(model), out=Path(out), workers=2, chunk_rows=6,
                       sample_processor="row:slow"))
"""


def rows_of_parts(folder: Path) -> list[int]:
    work = read_plan(folder).work
    headers = [read_header(part_path(folder, n), work) for n in sorted(part_numbers(folder))]
    return [header["counts"]["rows"] for header in headers if header]


def test_long_rows_end_a_chunk_early(tmp_path, model, monkeypatch):
    rows = [*chats(9), chat("hello " * 100, "it is."), *chats(20)]
    data = jsonl(tmp_path / "long.jsonl", rows)
    sizes = [len(line) for line in data.read_bytes().splitlines(keepends=True)]
    assert max(sizes[:9]) < 200 < 600 < sizes[9]
    made(tmp_path / "whole", model, data)
    monkeypatch.setattr(prepare_plan, "CHUNK_SIZE", 700)
    made(tmp_path / "set", model, data, shard=(1, 1), workers=2, chunk_rows=6)
    # Six rows are less than 700 bytes but for those around the long one.
    expected, size, count = [], 0, 0
    for one in sizes:
        size, count = size + one, count + 1
        if count == 6 or size >= 700:
            expected.append(count)
            size = count = 0
    assert rows_of_parts(tmp_path / "set.parts") == [*expected, count] if count else expected
    assert 4 in expected and 6 in expected
    made(tmp_path / "set", model, data, chunk_rows=6)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_the_size_of_a_row_is_that_of_its_text_and_tokens():
    assert row_size(b"12345") == 5
    row = {"messages": [{"role": "user", "content": "hi", "weight": 0.5}], "none": None}
    assert row_size(row) == 8 + (4 + 4) + (7 + 2) + (6 + 8) + (4 + 8)
    assert row_size({"input_ids": np.zeros(10, np.int32)}) == 9 + 40
    assert row_size({"input_ids": [1, 2, 3]}) == 9 + 24


def test_parts_of_other_work_are_no_parts(tmp_path, model, data):
    """As a worker leaves them whose parent was killed, when the next run has begun already."""
    made(tmp_path / "old", model, data, shard=(1, 1), max_tokens=99)
    made(tmp_path / "set", model, data, shard=(1, 2))
    made(tmp_path / "whole", model, data)
    for chunk in range(7):
        stray = part_path(tmp_path / "old.parts", chunk)
        part_path(tmp_path / "set.parts", chunk).write_bytes(stray.read_bytes())
    assert made(tmp_path / "set", model, data).chunks == (7, 7)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_parts_without_a_plan_are_no_parts(tmp_path, model, data):
    """As a run leaves them that is killed when it removes its folder."""
    made(tmp_path / "set", model, data, shard=(1, 1), max_tokens=99)
    (tmp_path / "set.parts" / "plan.json").unlink()
    assert made(tmp_path / "set", model, data).chunks == (7, 7)
    assert not (tmp_path / "set.parts").exists()


def test_merge_names_the_row_that_cannot_be_used_and_not_one_too_long(tmp_path, model):
    rows = chats(12)
    rows[7]["messages"][1]["content"] = "hello " * 200
    rows[9]["messages"][0]["role"] = "robot"
    bad = jsonl(tmp_path / "bad.jsonl", rows)
    options = {"max_tokens": 60, "overlong": "drop", "on_error": "skip"}
    made(tmp_path / "set", model, bad, shard=(1, 1), **options)
    with pytest.raises(InputError, match=r"bad.jsonl, row 10: message 1 has the unknown role"):
        merge(tmp_path / "set")
    merge(tmp_path / "set", on_error="skip")
    left_out = contents(tmp_path / "set")[".rejects.jsonl"].decode().splitlines()
    assert ['"row": 8' in left_out[0], '"row": 10' in left_out[1]] == [True, True]


def test_a_plan_without_parts_is_in_nobodys_way(tmp_path, model, data):
    bad = jsonl(tmp_path / "bad.jsonl", [{"messages": []}, *chats(3)])
    with pytest.raises(InputError, match=r"bad.jsonl, row 1: "):
        made(tmp_path / "set", model, bad, shard=(1, 1))
    assert (tmp_path / "set.parts" / "plan.json").is_file()
    assert made(tmp_path / "set", model, data).state == "made"


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_workers_die_with_the_one_that_started_them(tmp_path, model, data):
    (tmp_path / "row.py").write_text(ROW)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    command = [sys.executable, "-c", RUN, tmp_path / "set", model, data]
    process = subprocess.Popen(list(map(str, command)), env=environment)
    deadline = time.monotonic() + 60
    while len(workers := list(tmp_path.glob("worker.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(path.suffix[1:]) for path in workers]
    assert len(pids) == 2 and all(map(is_running, pids))
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, pids))


def test_a_worker_that_fails_says_at_which_rows(tmp_path, model, data, monkeypatch, capfd):
    (tmp_path / "ending.py").write_text("import os\ndef row(row):\n    os._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError) as caught:
        made(tmp_path / "set", model, data, sample_processor="ending:row")
    assert str(caught.value) == (
        f"a worker failed at chunk 0, rows 1 to 6 of {data}; what is finished is kept: run the "
        "same again to go on"
    )


def count(path: Path) -> int | None:
    source = Source.parse(str(path))
    lines = path.read_bytes().count(b"\n") if path.is_file() else 1000  # also in other files
    return count_rows(source, input_files(source), lines)


def test_how_many_rows_there_are_about(tmp_path, monkeypatch, data):
    (tmp_path / "a.parquet").write_bytes(parquet(chats(20)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data.read_bytes()))
    (tmp_path / "c.json").write_text("[{}, {}]\n")
    (tmp_path / "d.gz").write_bytes(gzip.compress(b"[{}]"))
    (tmp_path / "e.gz").write_bytes(gzip.compress(b"{}\n" * 99)[:-20])  # which is told later
    names = ["chats.jsonl", "a.parquet", "b.jsonl.gz", "c.json", "d.gz", "e.gz"]
    assert [count(tmp_path / name) for name in names] == [40, 20, 40, None, None, None]
    assert count(write(tmp_path / "f", [[[1, 2]], [[3]]])) == 2
    many = jsonl(tmp_path / "many.jsonl", [chat(f"{i * 7919}", "yes") for i in range(30000)])
    (tmp_path / "many.gz").write_bytes(gzip.compress(many.read_bytes()))
    monkeypatch.setattr(prepare_count, "_SAMPLE", 1 << 19)
    assert 21000 < count(tmp_path / "many.gz") < 39000  # estimated from a sixth of it


def test_rows_of_arrow_are_counted(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(chats(13))
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select(range(3))).save_to_disk(tmp_path / "two")
    assert count(tmp_path / "one") == count(next((tmp_path / "one").glob("*.arrow"))) == 13
    assert count(Path(f"{tmp_path / 'two'}@test")) == 3
