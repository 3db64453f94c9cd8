"""A prepared set that is not whole: one line that names the file, exit code 2, nothing written."""

from __future__ import annotations

import os
import shutil
import struct

import pytest

from tests.data.prepared import change_manifest, chats, contents, jsonl, made, model_folder
from varlen_sft import cli
from varlen_sft.data.store import Store, file_of
from varlen_sft.data.stream import OrderOptions, PackStream
from varlen_sft.data.stream_state import save_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = model_folder(folder / "model")
    made(folder / "set", model, jsonl(folder / "chats.jsonl", chats(12)))
    stream = PackStream([Store(folder / "set")], OrderOptions(max_tokens=96, packs_per_step=2))
    save_state(folder / "stream.json", stream.state_dict())
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """Of its own for each test."""
    return shutil.copytree(whole, tmp_path / "run")


def cut(suffix: str, by: int):
    def change(prefix):
        path = file_of(prefix, suffix)
        os.truncate(path, path.stat().st_size - by)

    return change


def other_version(prefix) -> None:
    path = file_of(prefix, ".idx")
    old = path.read_bytes()
    path.write_bytes(old[:9] + struct.pack("<Q", 2) + old[17:])


def no_samples(prefix) -> None:
    path = file_of(prefix, ".idx")
    path.write_bytes(path.read_bytes()[:18] + struct.pack("<QQq", 0, 1, 0))
    file_of(prefix, ".bin").write_bytes(b"")


BAD = {
    ".bin: has ": cut(".bin", 4),
    ".idx: must be of version 1, is of 2": other_version,
    ".weights: must have ": cut(".weights", 4),
    ".roles: must have ": cut(".roles", 1),
    ".manifest.json: does not match its files: it counts 99 samples": lambda prefix: (
        change_manifest(prefix, counts={"samples": 99, "tokens": 1})
    ),
    ".idx: has no samples": no_samples,
    "is of another run: fingerprint was ": lambda prefix: change_manifest(prefix, fingerprint="b"),
}


@pytest.mark.parametrize("expected", BAD)
@pytest.mark.parametrize("run", [["--state", "stream.json"], ["--max-tokens", "96",
                                 "--packs-per-step", "2"]], ids=["state", "options"])  # fmt: skip
def test_each_damage_is_named_and_nothing_is_written(folder, capsys, monkeypatch, run, expected):
    monkeypatch.chdir(folder)
    BAD[expected](folder / "set")
    before = contents(folder / "set")
    words = ["show", "set", "--model", "model", "--step", "1", "--html", "page.html", *run]
    code = cli.main(words)
    out, err = capsys.readouterr()
    if "another run" in expected and "--state" not in run:
        assert code == 0  # without a state nobody knows which set it was
        return
    assert (code, out) == (2, "")
    assert err.startswith("varlen-sft: error: ") and expected in err and err.count("\n") == 1
    assert contents(folder / "set") == before and not (folder / "page.html").exists()


@pytest.mark.parametrize(
    "run, message",
    [
        (["--max-tokens", "9", "--packs-per-step", "2"], "set, row 1: the sample takes "),
        (["--max-tokens", "96"], "--step needs the run: its --state, or else its --max-tokens"),
        (["--packs-per-step", "2"], "need both --max-tokens and --packs-per-step"),
        (["--max-tokens", "96", "--packs-per-step", "2", "--source", "none"], "none.manifest.json"),
    ],
)
def test_a_run_that_cannot_be_is_named(folder, capsys, monkeypatch, run, message):
    monkeypatch.chdir(folder)
    assert cli.main(["show", "set", "--model", "model", "--step", "1", *run]) == 2
    assert message in capsys.readouterr().err
