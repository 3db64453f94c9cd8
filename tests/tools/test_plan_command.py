"""``varlen-sft plan`` on a prepared set: figures, files, errors."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.helpers import tiny_hf_config
from varlen_sft import cli
from varlen_sft.data.costs import ModelSizes
from varlen_sft.data.sample import Sample
from varlen_sft.data.store_write import write_store
from varlen_sft.models.config import LlamaConfig

LENGTHS = (9, 5, 5, 3)  # rows; a sample has one token more
SUPERVISED = 2  # of each, the last ones


def sample(rows: int) -> Sample:
    weights = np.zeros(rows + 1, dtype=np.float32)
    weights[-SUPERVISED:] = 1
    ids = np.arange(rows + 1, dtype=np.int32)
    return Sample(ids, weights, np.zeros(rows + 1, dtype=np.uint8))


@pytest.fixture
def prefix(tmp_path):
    write_store(tmp_path / "chats", [sample(rows) for rows in LENGTHS])
    return tmp_path / "chats"


@pytest.fixture
def plan(capsys):
    def run(*words) -> tuple[int, str, str]:
        return cli.main(["plan", *map(str, words)]), *capsys.readouterr()

    return run


def test_packs_steps_and_shares_are_told(prefix, plan, tmp_path):
    code, out, _ = plan(prefix, "--max-tokens", 10, "--json", tmp_path / "plan.json")
    assert code == 0
    assert "4 of 22 tokens, 8 supervised (36.4%)" in out
    assert "3 of at most 10 tokens (planned), 73.33% full" in out
    told = json.loads((tmp_path / "plan.json").read_text())
    assert (told["samples"], told["tokens"], told["supervised"]) == (4, 22, 8)
    assert told["steps"] == 3 and told["flops"] is None


def test_ranks_share_a_step_and_a_model_gives_flops(prefix, plan, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_hf_config()))
    more = ("--ranks", 2, "--epochs", 3, "--model", folder, "--html", tmp_path / "plan.html")
    code, out, _ = plan(prefix, "--max-tokens", 10, *more)
    assert code == 0 and "2 ranks x 1 micro-batch" in out and "FLOPs per epoch" in out
    page = (tmp_path / "plan.html").read_text()
    assert "2 ranks x 1 micro-batch" in page and "http://" not in page and "https://" not in page
    sizes = ModelSizes.of(LlamaConfig.from_folder(folder))
    plan(prefix, "--max-tokens", 10, *more, "--json", tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text())["cost_a"] == sizes.a


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ("--max-tokens", 8),
            "chats, row 1: the sample takes 9 rows of a pack, which has 8; too long: 1 of 4.*"
            "--overlong drop, truncate or split",
        ),
        (("--max-tokens", 10, "--ranks", 9), "an epoch has 3 packs, fewer than 9 ranks"),
        (
            ("--max-tokens", 10, "--ranks", 2, "--packs-per-step", 3),
            "multiple of .* = 2 x 1, got 3",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(prefix, plan, words, reason):
    code, out, err = plan(prefix, *words)
    assert code == 2 and not out
    assert re.search(reason, err), err


def test_files_are_named_when_written_or_not(prefix, plan, tmp_path):
    html, figures = tmp_path / "plan.html", tmp_path / "plan.json"
    _, out, _ = plan(prefix, "--max-tokens", 10, "--html", html, "--json", figures)
    assert out.splitlines()[-2:] == [f"written: {html}", f"written: {figures}"]
    assert html.read_text().startswith("<!DOCTYPE html>")
    missing = tmp_path / "missing" / "plan.json"
    code, out, err = plan(prefix, "--max-tokens", 10, "--json", missing)
    assert code == 2 and not out
    assert "missing/plan.json: cannot be written: No such file or directory" in err


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def change(path, at: int, to: bytes):
    path.write_bytes(path.read_bytes()[:at] + to + path.read_bytes()[at + len(to) :])


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".bin", cut),
        (".idx", cut),
        (".idx", lambda path: change(path, 9, b"\2")),  # its version
        (".weights", cut),
        (".roles", lambda path: path.unlink()),
        (".manifest.json", lambda path: path.write_text("{}")),
        (".manifest.json", lambda path: path.write_text(path.read_text().replace("26", "27"))),
        (".manifest.json", lambda path: path.unlink()),
    ],
)
def test_a_damaged_set_is_named_and_nothing_written(prefix, plan, tmp_path, suffix, damage):
    path = prefix.with_name(f"chats{suffix}")
    damage(path)
    words = ("--html", tmp_path / "plan.html", "--json", tmp_path / "plan.json")
    code, out, err = plan(prefix, "--max-tokens", 10, *words)
    assert code == 2 and not out and f"chats{suffix}: " in err, err
    assert not list(tmp_path.glob("plan.*"))


def test_a_sample_without_a_row_is_named(tmp_path, plan):
    write_store(tmp_path / "one", [sample(3), sample(0)])
    code, out, err = plan(tmp_path / "one", "--max-tokens", 10)
    assert code == 2 and not out
    assert "one, row 2: a sample must have 2 tokens or more, has 1" in " ".join(err.split())
