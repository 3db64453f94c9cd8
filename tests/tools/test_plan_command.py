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


def plan(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["plan", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_packs_steps_and_shares_are_told(prefix, capsys, tmp_path):
    code, out, _ = plan(capsys, prefix, "--max-tokens", 10, "--json", tmp_path / "plan.json")
    assert code == 0
    assert "4 of 22 tokens, 8 supervised (36.4%)" in out
    assert "3 of at most 10 tokens (planned), 73.33% full" in out
    told = json.loads((tmp_path / "plan.json").read_text())
    assert (told["samples"], told["tokens"], told["supervised"]) == (4, 22, 8)
    assert told["steps"] == 3 and told["flops"] is None


def test_ranks_share_a_step_and_a_model_gives_flops(prefix, capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_hf_config()))
    more = ("--ranks", 2, "--epochs", 3, "--model", folder, "--html", tmp_path / "plan.html")
    code, out, _ = plan(capsys, prefix, "--max-tokens", 10, *more)
    assert code == 0 and "2 ranks x 1 micro-batches" in out and "FLOPs per epoch" in out
    page = (tmp_path / "plan.html").read_text()
    assert "2 ranks x 1 micro-batches" in page and "http://" not in page and "https://" not in page
    sizes = ModelSizes.of(LlamaConfig.from_folder(folder))
    (tmp_path / "one.json").unlink(missing_ok=True)
    plan(capsys, prefix, "--max-tokens", 10, *more, "--json", tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text())["cost_a"] == sizes.a


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--max-tokens", 8), "sample 0 has length 9, must be at most max_tokens"),
        (("--max-tokens", 10, "--ranks", 9), "the epoch has 3 packs, fewer than 9 ranks"),
        (
            ("--max-tokens", 10, "--ranks", 2, "--packs-per-step", 3),
            "multiple of .* = 2 x 1, got 3",
        ),
    ],
)
def test_what_cannot_be_planned_is_named(prefix, capsys, words, reason):
    code, out, err = plan(capsys, prefix, *words)
    assert code == 2 and not out
    assert re.search(reason, err), err


def test_a_damaged_set_is_named(prefix, capsys):
    (prefix.parent / "chats.weights").write_bytes(b"1234")
    code, _, err = plan(capsys, prefix, "--max-tokens", 10)
    assert code == 2 and "chats.weights" in err
