"""prepare: the bytes do not depend on how many worked, and hold what tokenize_source makes."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.columns import parquet
from tests.data.megatron_files import write
from tests.data.prepared import SUFFIXES, chat, chats, contents, jsonl, made
from varlen_sft import cli
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.load import tokenize_source
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.prepare import merge
from varlen_sft.data.store import Store
from varlen_sft.errors import InputError, RunError

PROCESSOR = """
import os, sys
def note(row):
    path = os.path.join(os.path.dirname(__file__), "seen")
    heavy = {"torch", "transformers", "pyarrow", "rich"} & sys.modules.keys()
    # Not ru_maxrss, in which a child inherits the peak of its parent.
    with open("/proc/self/status") as status:
        (kilobytes,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {kilobytes} {sorted(heavy)}\\n")
    return row
"""


def expected(model: Path, *sources: object, **options) -> list:
    tokenizer = ChatTokenizer.from_folder(model)
    streams = [tokenize_source(str(source), tokenizer, **options) for source in sources]
    return [sample for stream in streams for _, samples in stream for sample in samples]


def assert_holds(prefix: Path, samples: list) -> None:
    store = Store(prefix)
    assert len(store) == len(samples) > 0
    for i, wanted in enumerate(samples):
        found = store.sample(i)
        for name in ("input_ids", "token_weights", "roles"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, model, data):
    found = []
    for workers in (1, 2, 3):
        out = tmp_path / f"out{workers}" / "set"
        done = made(out, model, data, workers=workers)
        assert (done.state, done.chunks) == ("made", (7, 7))
        assert sorted(os.listdir(out.parent)) == sorted(f"set{suffix}" for suffix in SUFFIXES)
        found.append(contents(out))
    assert found[0] == found[1] == found[2]
    assert_holds(out, expected(model, data))
    Store(out).verify()


def test_all_kinds_of_inputs_in_their_order(tmp_path, model, data):
    (tmp_path / "b.parquet").write_bytes(parquet(chats(20)))
    (tmp_path / "c.json").write_text(json.dumps([{"text": "hello"}, {"text": "world it is"}]))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(data.read_bytes()))
    inputs = [data, tmp_path / "b.parquet", tmp_path / "c.json", tmp_path / "d.jsonl.gz"]
    inputs.append(f"pretrain:{write(tmp_path / 'e', [[[1, 2, 3]], [[4, 5]]])}")
    done = made(tmp_path / "set", model, *inputs, workers=2)
    assert_holds(tmp_path / "set", expected(model, *inputs))
    assert [entry["rows"] for entry in done.manifest["inputs"]] == [40, 20, 2, 40, 2]
    counts = done.manifest["counts"]
    assert (counts["rows"], counts["samples"]) == (104, 104)
    # A prepared set is an input too, with its weights.
    made(tmp_path / "again", model, tmp_path / "set")
    for suffix in (".bin", ".idx", ".weights"):
        assert contents(tmp_path / "again")[suffix] == contents(tmp_path / "set")[suffix]


def test_settings_reach_the_workers(tmp_path, model, data):
    masks = MaskOptions(prompt_weight=0.25)
    options = {"max_tokens": 30, "overlong": "drop"}
    done = made(tmp_path / "set", model, data, masks=masks, **options)
    assert_holds(tmp_path / "set", expected(model, data, options=masks, on_error="skip", **options))
    weights = np.frombuffer(contents(tmp_path / "set")[".weights"], "<f4")
    assert set(np.unique(weights)) == {0.25, 1}
    counts = done.manifest["counts"]
    assert (counts["overlong_dropped"], counts["samples"]) == (10, 30)
    targets = sum(int((s.token_weights[1:] > 0).sum()) for s in map(Store(tmp_path / "set").sample,
                  range(counts["samples"])))  # fmt: skip
    assert counts["targets"] == targets == Store(tmp_path / "set").supervised.sum()


def test_counts_are_of_all_chunks(tmp_path, model):
    rows = chats()
    for i in (1, 8, 9, 30):
        rows[i]["messages"][0]["content"] += "<|im_end|>"
    counts = made(tmp_path / "set", model, jsonl(tmp_path / "d.jsonl", rows)).manifest["counts"]
    assert (counts["spelled_control"], counts["rows"], counts["checked"]) == (4, 40, 1)
    told = []
    made(tmp_path / "again", model, tmp_path / "d.jsonl", progress=lambda *a: told.append(a))
    assert [one for one in told if one[0] == "rows"] == [
        *(("rows", done, 40) for done in (6, 12, 18, 24, 30, 36, 40)), ("rows", 40, 40)
    ]  # fmt: skip
    size = (tmp_path / "d.jsonl").stat().st_size
    assert told[0] == ("hash", size, size) and told[-1] == ("write", 7, 7)


def test_tokens_and_mask(tmp_path, model, data):
    done = made(tmp_path / "set", model, data, layout="tokens+mask")
    samples = expected(model, data)
    assert_holds(tmp_path / "set", samples)
    words = np.frombuffer(contents(tmp_path / "set")[".bin"], "<i4")
    halves = [half for s in samples for half in (s.input_ids, [*s.token_weights[1:], 0])]
    np.testing.assert_array_equal(words, np.concatenate(halves))
    assert done.manifest["readers"]["varlen_sft"]["targets"] == done.manifest["counts"]["targets"]
    with pytest.raises(InputError, match="so neither equal_sample_weight nor such a prompt_weight"):
        made(tmp_path / "no", model, data, layout="tokens+mask", masks=MaskOptions(prompt_weight=2))
    half = jsonl(tmp_path / "half.jsonl", [*chats(2), chat("a", "b", weight=0.5)])
    with pytest.raises(InputError, match=r"half.jsonl, row 3: .* a token weighs 0.5: take"):
        made(tmp_path / "no", model, half, layout="tokens+mask")
    assert contents(tmp_path / "no") == {} and not (tmp_path / "no.parts").exists()


def test_a_rerun_says_so_and_another_fingerprint_is_refused(tmp_path, model, data, capsys):
    out = tmp_path / "set"
    made(out, model, data)
    before, times = contents(out), os.stat(f"{out}.bin").st_mtime_ns
    done = made(out, model, data, workers=2)
    assert (done.state, done.chunks) == ("there", (0, 0))
    assert os.stat(f"{out}.bin").st_mtime_ns == times
    with pytest.raises(InputError) as caught:
        made(out, model, data, max_tokens=30, overlong="drop")
    assert str(caught.value) == (
        f"{out}.manifest.json: a set of another fingerprint is in the way (it differs in "
        "max_tokens, overlong); --force replaces it"
    )
    with pytest.raises(InputError, match=r"differs in inputs\)"):
        made(out, model, jsonl(tmp_path / "other.jsonl", chats(39)))
    assert contents(out) == before
    made(out, model, data, max_tokens=30, overlong="drop", force=True)
    assert contents(out)[".bin"] != before[".bin"]
    os.truncate(f"{out}.roles", 3)
    with pytest.raises(InputError, match=r"set.roles: must have"):  # and not: it is there already
        made(out, model, data, max_tokens=30, overlong="drop")


def test_files_of_others_are_not_overwritten(tmp_path, model, data):
    write(tmp_path / "set", [[[1, 2]]])
    before = contents(tmp_path / "set")
    made(tmp_path / "set", model, data, shard=(1, 1), force=True)
    os.rename(tmp_path / "set.parts", tmp_path / "host.parts")
    for attempt in (made, lambda out, *_: merge(out, [tmp_path / "host.parts"])):
        with pytest.raises(InputError, match=r"set.bin: a file without a manifest is in the way"):
            attempt(tmp_path / "set", model, data)
    assert contents(tmp_path / "set") == before
    merge(tmp_path / "set", [tmp_path / "host.parts"], force=True)
    assert_holds(tmp_path / "set", expected(model, data))


def test_a_moved_input_is_the_same_input(tmp_path, model, data):
    made(tmp_path / "set", model, data)
    os.rename(data, tmp_path / "moved.jsonl")
    assert made(tmp_path / "set", model, tmp_path / "moved.jsonl").state == "there"


def test_shards_merge_to_the_bytes_of_one_process(tmp_path, model, data):
    made(tmp_path / "whole", model, data)
    out = tmp_path / "set"
    for i in (3, 1):
        assert made(out, model, data, shard=(i, 3)).state == "shard"
    with pytest.raises(InputError, match=r"2 of 7 chunks are missing \(1, 4\): of n shards, chunk"):
        merge(out)
    assert made(out, model, data, shard=(2, 3)).chunks == (2, 2)
    assert merge(out).state == "made"
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "set.parts").exists()


def test_shards_from_several_folders(tmp_path, model, data):
    made(tmp_path / "whole", model, data)
    for i in range(1, 6):  # the last has no chunk
        made(tmp_path / f"host{i % 2}", model, data, shard=(i, 5), chunk_rows=12)
    folders = [tmp_path / f"host{i}.parts" for i in (0, 1)]
    made(tmp_path / "other", model, data, shard=(4, 4), max_tokens=99, chunk_rows=12)
    with pytest.raises(InputError, match=r"other.parts: is of another .* differs in max_tokens"):
        merge(tmp_path / "set", [*folders, tmp_path / "other.parts"])
    merge(tmp_path / "set", folders)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    with pytest.raises(InputError, match=r"none.parts/plan.json: no such file: no parts"):
        merge(tmp_path / "none")


def test_workers_stay_small_and_without_torch(tmp_path, model, data, monkeypatch):
    (tmp_path / "noting.py").write_text(PROCESSOR)
    monkeypatch.syspath_prepend(tmp_path)
    made(tmp_path / "set", model, data, workers=2, sample_processor="noting:note")
    lines = [line.split(maxsplit=2) for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(lines) == 40 and len({pid for pid, *_ in lines}) == 2
    assert str(os.getpid()) not in {pid for pid, *_ in lines}
    assert {heavy for *_, heavy in lines} == {"[]"}
    assert max(int(kilobytes) for _, kilobytes, _ in lines) < 200 * 1024


def test_what_is_no_input_is_named(tmp_path, model, data):
    with pytest.raises(InputError, match=r"/dev/null: is no regular file: an input is read twice"):
        made(tmp_path / "set", model, "/dev/null")
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        made(tmp_path / "set", model, data, tmp_path / "none.jsonl")
    for name, rows in (("empty", []), ("blank", [{"text": ""}])):
        jsonl(tmp_path / f"{name}.jsonl", rows)
        with pytest.raises(InputError, match=rf"{name}.jsonl: {len(rows)} rows give no samples"):
            made(tmp_path / "set", model, tmp_path / f"{name}.jsonl", on_error="skip")
    assert contents(tmp_path / "set") == {} and not (tmp_path / "set.parts").exists()


def test_an_input_that_changes_meanwhile_is_refused(tmp_path, model, data):
    def change(stage, done, total):
        if stage == "rows" and done == 6:
            jsonl(data, chats(41))

    with pytest.raises(RunError, match="an input was changed while it was read"):
        made(tmp_path / "set", model, data, progress=change)
    assert contents(tmp_path / "set") == {}


def test_the_command_line(tmp_path, model, data, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    out = tmp_path / "set"
    command = ("prepare", data, "--model", model, "--out", out)
    code, said, _ = run(*command, "--workers", 2)
    assert code == 0 and f"{out}: 40 samples, " in said and "what a reader of it trains:" in said
    assert "was prepared already" in run(*command)[1]
    code, _, error = run(*command, "--max-tokens", 9)
    assert code == 2 and error.count("\n") == 1 and "--force replaces it" in error
    assert run(*command, "--overlong", "drop")[::2] == (
        2, "varlen-sft: error: overlong='drop' needs max_tokens\n")  # fmt: skip
    for i in (1, 2):
        code, said, _ = run(*command[:-1], tmp_path / "sharded", "--shard", f"{i}/2")
        assert code == 0 and f"varlen-sft merge {tmp_path / 'sharded'}" in said
    assert run("merge", tmp_path / "sharded")[0] == 0
    assert contents(tmp_path / "sharded") == contents(out)
    with pytest.raises(SystemExit) as stop:
        run(*command, "--shard", "3/2")
    assert stop.value.code == 2
