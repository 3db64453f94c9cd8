"""``varlen-sft bench --ablation`` on a tiny Llama: four runs, a table, a page."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from statistics import median

import numpy as np
import pytest
import torch

from tests.data.prepared import made
from tests.tools.test_report import Page
from tests.train.setups import small_run
from varlen_sft import cli
from varlen_sft.data.batch import PackedBatch, collate
from varlen_sft.data.costs import ModelSizes
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import Sample
from varlen_sft.data.store import Store
from varlen_sft.errors import InputError
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.tools.ablation_data import EveryToken, check_sets, held_out, on_completions
from varlen_sft.tools.ablation_show import sparkline
from varlen_sft.train.config_out import dump
from varlen_sft.train.distributed import World
from varlen_sft.train.flops import naive_flops, step_flops
from varlen_sft.train.loop import mean_loss
from varlen_sft.train.setup import open_stream, prepare_sets, valid_steps
from varlen_sft.train.stages import as_one_document

STEPS = 6
NAMES = ["answers, isolated", "answers, whole pack", "every token, isolated",
         "every token, whole pack"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files of ``small_run`` and what the command wrote and printed."""
    folder = tmp_path_factory.mktemp("ablation")
    config = small_run(folder, "--lr", "0.01", "--isolate", "false", "--steps", "1000")
    (folder / "run.yaml").write_text(dump(config))
    words = ["bench", "--ablation", folder / "run.yaml", "--steps", STEPS, "--warmup", 0.5]
    done = subprocess.run(
        [sys.executable, "-m", "varlen_sft.cli", *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def found(place) -> dict:
    return json.loads((place / "out" / "ablation" / "ablation.json").read_text())


@pytest.fixture(scope="module")
def sets(place) -> dict[str, str]:
    return prepare_sets(small_run(place), place / "llama")


def test_four_runs_of_the_same_samples(found, place):
    assert [arm["name"] for arm in found["arms"]] == NAMES
    assert sorted(p.name for p in (place / "out").iterdir()) == ["ablation", "prepared"]
    for arm in found["arms"]:
        assert [step["step"] for step in arm["steps"]] == list(range(1, STEPS + 1))
    tokens, supervised, squares = (
        [[step[name] for step in arm["steps"]] for arm in found["arms"]]
        for name in ("real_tokens", "supervised_tokens", "squares")
    )
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]
    assert supervised[0] == supervised[1] and supervised[2] == supervised[3] == tokens[0]
    assert squares[0] == squares[2] and squares[1] == squares[3]
    assert all(one < whole for one, whole in zip(*squares[:2], strict=True))


def test_first_losses_are_those_of_the_folders_weights(found, place, sets):
    model = LlamaForSFT.from_pretrained(place / "llama")
    step = next(iter(open_stream(small_run(place), sets, place / "llama")))
    one_document = [as_one_document(batch) for batch in step.batches]
    for arm, batches in zip(found["arms"], (step.batches, one_document), strict=False):
        assert math.isclose(arm["steps"][0]["loss"], mean_of(model, batches), rel_tol=1e-6)
    store = Store(sets[f"{place}/chats.jsonl"])
    whole = [every_token(store.sample(i)) for ids in step.samples for i in ids.tolist()]
    logged = found["arms"][2]["steps"][0]
    assert math.isclose(logged["loss"], mean_of(model, [collate(whole)]), rel_tol=1e-5)
    assert math.isclose(
        logged["role_loss"]["assistant"], found["arms"][0]["steps"][0]["loss"], rel_tol=1e-5
    )


@torch.no_grad()
def mean_of(model: LlamaForSFT, batches: Iterable[PackedBatch]) -> float:
    return float(mean_loss([model(batch) for batch in batches]))


def every_token(sample: Sample) -> Sample:
    return replace(sample, token_weights=np.ones(len(sample), np.float32))


def test_all_are_asked_for_the_same_held_out_answers(found, place, sets):
    assert found["held_out"] == "data.valid"
    model = LlamaForSFT.from_pretrained(place / "llama")
    steps = valid_steps(small_run(place), sets)
    before = mean_of(model, [batch for step in steps for batch in step.batches])
    for arm in found["arms"]:
        assert [point["step"] for point in arm["validation"]] == [0, 2, 4, 6]
        assert math.isclose(arm["validation"][0]["loss"], before, rel_tol=1e-6)
    after = [arm["validation"][-1]["loss"] for arm in found["arms"]]
    assert max(after) < 0.9 * before and len(set(after)) == 4


def test_speeds_are_medians_of_warm_steps_and_both_counts_are_told(found, place):
    sizes = ModelSizes.from_folder(place / "llama")
    naive = naive_flops(sizes, 4, 128)
    for arm in found["arms"]:
        steps = arm["steps"][2:]
        speed = median(step["real_tokens"] / step["step_time_s"] for step in steps)
        assert math.isclose(arm["real_tokens_per_s"], speed)
        assert math.isclose(arm["tflops"], median(step["tflops"] for step in steps))
        first = arm["steps"][0]
        assert math.isclose(first["naive_tflops"] * first["step_time_s"] * 1e12, naive)
        assert all(step["tflops"] < step["naive_tflops"] for step in steps)
    step = found["arms"][3]["steps"][0]
    needed = step_flops(sizes, step["real_tokens"], step["squares"], step["real_tokens"])
    assert math.isclose(step["tflops"] * step["step_time_s"] * 1e12, needed, rel_tol=1e-6)


def test_the_table_has_a_row_per_run(found, place):
    printed = (place / "printed").read_text()
    lines = printed.splitlines()
    head = next(k for k, line in enumerate(lines) if line.startswith("trained on"))
    for arm, line in zip(found["arms"], lines[head + 1 : head + 5], strict=True):
        assert line.startswith("answers" if arm["completions_only"] else "every token")
        assert ("isolated" if arm["isolate"] else "whole pack") in line
        assert f"{arm['loss_first']:.3f} to {arm['loss_last']:.3f}" in line
        assert f"{arm['validation'][-1]['loss']:.3f}" in line
        assert f"{arm['real_tokens_per_s']:,.0f}" in line and len(line) <= 110
    assert "4 of 4: every token, whole pack" in printed and "step    1  " in printed
    assert f"written: {place}/out/ablation/ablation.html" in printed


def test_the_page_shows_the_same_without_paths(found, place):
    html = (place / "out" / "ablation" / "ablation.html").read_text()
    page = Page(html)
    for arm in found["arms"]:
        ((_, loss),) = page.where("td", arm=arm["name"], field="loss")
        assert loss == f"{arm['loss_first']:.3f} to {arm['loss_last']:.3f}"
    assert len(page.where("figure")) == 4
    drawn = sorted(page.values("steps"))
    losses = sorted(step["loss"] for arm in found["arms"] for step in arm["steps"])
    assert drawn == losses and len(page.values("validation")) == 16
    assert str(place) not in html and "optim.lr" in html and "http:" not in html


# ---------------------------------------------------------------------- parts


def test_every_token_of_a_sample_weighs_as_much(sets):
    store = Store(next(iter(sets.values())))
    made_of = EveryToken(store, lambda weights: weights / 4)
    sample, own = made_of.sample(3), store.sample(3)
    assert sample.token_weights.tolist() == [0.25] * len(own)
    assert np.array_equal(sample.input_ids, own.input_ids)
    assert np.array_equal(sample.roles, own.roles)
    assert made_of.supervised.tolist() == (store.lengths - 1).tolist()
    assert made_of.fingerprint != store.fingerprint


def test_without_data_valid_the_next_steps_are_held_out(place, sets):
    config = on_completions(small_run(place, "--valid", "[]", "--packs_per_step", "2"))
    stream = open_stream(config, sets, place / "llama")
    assert stream.steps_per_epoch == 5
    what, steps = held_out(config, sets, place / "llama", 3, World())
    assert what == "the steps that come next" and [step.step for step in steps] == [3, 4]
    trained = {i for step in islice(stream, 3) for ids in step.samples for i in ids.tolist()}
    assert not trained & {i for step in steps for ids in step.samples for i in ids.tolist()}
    assert held_out(config, sets, place / "llama", 5, World()) == ("", ())
    mixed = on_completions(small_run(place, "--valid", "[]", "--weights", "[1]"))
    assert held_out(mixed, sets, place / "llama", 1, World()) == ("", ())


def test_only_answers_that_are_known_can_be_compared(place, tmp_path):
    assert on_completions(small_run(place, "--supervision_mode", "all")).data.supervision_mode == (
        "assistant"
    )
    kept = small_run(place, "--supervision_mode", "last_assistant", "--isolate", "false")
    assert on_completions(kept).data.supervision_mode == "last_assistant"
    assert on_completions(kept).stream.isolate
    for words, message in (
        (("--prompt_weight", "0.5"), "data.prompt_weight must be 0, is 0.5"),
        (("--mock-data",), "data.mock has no data"),
    ):
        with pytest.raises(InputError, match=message):
            on_completions(small_run(place, *words))
    rows = place / "chats.jsonl"
    made(tmp_path / "all", place / "llama", rows, masks=MaskOptions(supervision_mode="all"))
    with pytest.raises(InputError, match="all: trains tokens that are no answers"):
        check_sets({"x": str(tmp_path / "all")})


def test_a_sparkline_shows_means_on_a_given_scale():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 0, 7) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.5] * 4, 0, 7) == "▅▅▅▅" and sparkline([2.0, 2.0], 2, 2) == "▁▁"
    assert sparkline([*[0] * 50, *[7] * 50], 0, 7) == "▁" * 8 + "█" * 8


def test_what_is_wrong_is_one_line(capsys, place):
    for words, message in (
        ([], "what is to be measured? --ablation CONFIG"),
        (["--ablation", place / "none.yaml"], "none.yaml: cannot be read"),
        (["--ablation", place / "run.yaml", "--learning_rat", "1"], "unknown key learning_rat"),
    ):
        assert cli.main(["bench", *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("varlen-sft: error: ") and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--ablation", str(place / "run.yaml"), "--steps", "0"])
    assert stop.value.code == 2


def test_help_names_its_options_without_importing_anything_heavy():
    code = """
import sys
from varlen_sft.cli import main
try:
    main(["bench", "--ablation", "x", "--lr", "3", "--help"])
finally:
    heavy = {"torch", "numpy", "yaml", "jsonargparse", "rich"} & sys.modules.keys()
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: varlen-sft bench --ablation CONFIG [--steps N]" in done.stdout
    assert "of each run (default: 30)" in done.stdout
