"""What the screen and the page of a plan say."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from varlen_sft.data.costs import ModelSizes
from varlen_sft.data.plan import Bin, PlanOptions, make_plan
from varlen_sft.tools.plan_show import facts, histogram_lines, screen, write_plan_page

SIZES = ModelSizes(
    vocab_size=11,
    hidden_size=6,
    intermediate_size=10,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
)
LENGTHS = np.array([7, 3, 6, 4, 5, 5, 2, 30])


@pytest.fixture
def plan():
    options = PlanOptions(max_tokens=10, ranks=2, overlong="drop", epochs=1.5)
    return make_plan(LENGTHS, LENGTHS // 2, options, SIZES)


def test_facts(plan):
    told = facts(plan)
    assert told["samples"] == "7 of 32 tokens, 14 supervised (43.8%)"
    assert told["over-long"] == "1 of 30 tokens, the longest 30: dropped"
    assert told["packs"].startswith("4 of at most 10 tokens (planned), 80.00% full, 1.8 samples")
    assert told["steps"] == "2 per epoch of 2 packs (2 ranks x 1 micro-batches)"
    assert told["tokens per step"] == "16 on average, 12 to 20"
    assert "cost = 41 T + sum l^2" in told["imbalance"]
    assert told["wanted"].startswith("3 steps for 1.5 epochs, ")
    assert "layers " in told["FLOPs per epoch"]


def test_facts_without_a_model_on_one_rank():
    told = facts(make_plan(LENGTHS, LENGTHS, PlanOptions(max_tokens=30)))
    assert told["imbalance"] == "none, there is one rank"
    assert told["over-long"] == "none, more than 30 tokens would be"
    assert told["wanted"] == "3 steps for 1 epochs" and "FLOPs per epoch" not in told
    told = facts(make_plan(LENGTHS, LENGTHS, PlanOptions(max_tokens=30, packs_per_step=4, ranks=2)))
    assert told["imbalance"] == "no step is full"
    assert told["steps"].endswith(", the last of 3")


@pytest.mark.parametrize(
    ("overlong", "text"),
    [
        ("truncate", "truncated to 10 tokens, or less where conversations are cut at turns"),
        ("split", "split into 3 parts, or less where conversations are cut at turns"),
    ],
)
def test_what_a_policy_does(overlong, text):
    plan = make_plan(LENGTHS, LENGTHS, PlanOptions(max_tokens=10, overlong=overlong))
    assert facts(plan)["over-long"] == f"1 of 30 tokens, the longest 30: {text}"


def test_a_histogram_in_text():
    bins = (Bin(3, 4, 1, 3), Bin(4, 6, 0, 0), Bin(1024, 1536, 1000, 1_200_000))
    assert list(histogram_lines(bins)) == [
        "        3 to 3      1 samples    0.0% of tokens  \u258f",
        "        4 to 5      0 samples    0.0% of tokens",
        "1,024 to 1,535  1,000 samples  100.0% of tokens  " + "\u2588" * 40,
    ]
    assert list(histogram_lines(())) == []


def test_the_screen(plan):
    out = io.StringIO()
    screen(Console(file=out, width=60), plan, "data/chats")
    lines = out.getvalue().splitlines()
    assert lines[0] == "data/chats"
    assert "over-long            1 of 30 tokens, the longest 30: dropped" in lines
    at = lines.index("lengths before packing") + 1
    assert lines[at] == "  2 to 2  1 samples   3.2% of tokens  " + "\u2588" * 13 + "\u258d"
    assert len(lines) == at + len(plan.histogram)


def test_the_page(plan, tmp_path):
    path = tmp_path / "plan.html"
    write_plan_page(path, plan, "chats & <more>")
    page = path.read_text(encoding="utf-8")
    assert "<h1>chats &amp; &lt;more&gt;</h1>" in page and "<more>" not in page
    assert '<dd data-field="steps">2 per epoch of 2 packs' in page
    assert page.count('class="bar"') == len(plan.histogram)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.html"]
    with pytest.raises(OSError):
        write_plan_page(tmp_path / "missing" / "plan.html", plan, "x")
