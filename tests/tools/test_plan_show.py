"""What the screen and the page of a plan say."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from tests.data.sizes import TINY
from varlen_sft.data.plan import Bin, PlanOptions, make_plan
from varlen_sft.tools.plan_show import facts, histogram_lines, plan_page, screen

LENGTHS = np.array([7, 3, 6, 4, 5, 5, 2, 30])


@pytest.fixture
def plan():
    options = PlanOptions(max_tokens=10, ranks=2, overlong="drop", epochs=1.5)
    return make_plan(LENGTHS, LENGTHS // 2, options, TINY)


def test_facts(plan):
    told = facts(plan)
    assert told["samples"] == "7 of 32 tokens, 14 supervised (43.8%)"
    assert told["over-long"] == "1 of 30 tokens, the longest 30: dropped"
    assert told["packs"].startswith("4 of at most 10 tokens (planned), 80.00% full, 1.8 samples")
    assert told["steps"] == "2 per epoch, each of 2 packs (2 ranks x 1 micro-batch)"
    assert told["tokens per step"] == "16 on average, 12 to 20"
    assert "cost = 41 T + sum l^2" in told["imbalance"]
    assert told["wanted"].startswith("3 steps for 1.5 epochs, ")
    assert "layers " in told["FLOPs per epoch"]


def test_one_of_everything_is_singular():
    options = PlanOptions(max_tokens=1, overlong="split", epochs=1)
    plan = make_plan([1, 2], [1, 1], options)
    told = facts(plan)
    assert told["samples"].startswith("3 of 3 tokens")
    told = facts(make_plan([1], [1], options))
    assert told == {
        "samples": "1 of 1 token, 1 supervised (100.0%)",
        "over-long": "none, more than 1 token would be",
        "packs": "1 of at most 1 token (planned), 100.00% full, 1.0 samples in each, at most 1",
        "steps": "1 per epoch, each of 1 pack (1 rank x 1 micro-batch)",
        "tokens per step": "1 on average, 1 to 1",
        "supervised per step": "1 on average, 1 to 1",
        "imbalance": "none, there is one rank",
        "FLOPs per epoch": "unknown, without --model",
        "wanted": "1 step for 1 epoch",
    }
    assert list(histogram_lines((Bin(1, 2, 1, 1),))) == [
        "1 to 1  1 sample  100.0% of tokens  " + "\u2588" * 40
    ]


def test_facts_without_a_model_on_one_rank():
    told = facts(make_plan(LENGTHS, LENGTHS, PlanOptions(max_tokens=30)))
    assert told["imbalance"] == "none, there is one rank"
    assert told["over-long"] == "none, more than 30 tokens would be"
    assert told["wanted"] == "3 steps for 1 epoch"
    assert told["FLOPs per epoch"] == "unknown, without --model"
    assert told["steps"] == "3 per epoch, each of 1 pack (1 rank x 1 micro-batch)"
    told = facts(make_plan(LENGTHS, LENGTHS, PlanOptions(max_tokens=30, packs_per_step=4, ranks=2)))
    assert told["imbalance"] == "no step is full"
    assert told["steps"].endswith(", the last of 3")


@pytest.mark.parametrize(
    ("overlong", "text"),
    [
        ("truncate", "truncated to 10 tokens, fewer where conversations are cut after an answer"),
        (
            "split",
            "split into 3 parts, more and shorter ones where conversations are cut between turns",
        ),
    ],
)
def test_what_a_policy_does(overlong, text):
    plan = make_plan(LENGTHS, LENGTHS, PlanOptions(max_tokens=10, overlong=overlong))
    assert facts(plan)["over-long"] == f"1 of 30 tokens, the longest 30: {text}"


def test_a_histogram_in_text():
    bins = (Bin(3, 4, 1, 3), Bin(4, 6, 0, 0), Bin(1024, 1536, 1000, 1_200_000))
    assert list(histogram_lines(bins)) == [
        "        3 to 3       1 sample    0.0% of tokens  \u258f",
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
    assert lines[at] == "  2 to 2   1 sample   3.2% of tokens  " + "\u2588" * 13 + "\u258d"
    assert len(lines) == at + len(plan.histogram)


def test_the_page(plan):
    page = plan_page(plan, "chats & <more>")
    assert "<h1>chats &amp; &lt;more&gt;</h1>" in page and "<more>" not in page
    assert '<dd data-field="steps">2 per epoch, each of 2 packs' in page
    assert page.count('class="bar"') == len(plan.histogram)


@pytest.mark.parametrize("width", [390, 1400])
def test_the_browser_draws_the_histogram(plan, width, browser, tmp_path):
    """A frame of the wanted width holds the page; the page around it reads what it became."""
    (tmp_path / "page.html").write_text(plan_page(plan, "chats"), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f"<iframe src='page.html' width='{width}' height='800' style='border:0'></iframe><p></p>"
        "<script>onload = () => { const d = document.querySelector('iframe').contentDocument;"
        "const e = d.documentElement; const bars = [...d.querySelectorAll('.bar')];"
        "document.querySelector('p').textContent = JSON.stringify([e.clientWidth, e.scrollWidth,"
        "bars.map(b => b.getBoundingClientRect().width)]); }</script>"
    )
    dom = browser(
        (tmp_path / "frame.html").as_uri(), "--allow-file-access-from-files", "--dump-dom"
    )
    inner, scroll, bars = json.loads(re.search(r"<p>(.*?)</p>", dom)[1])
    assert inner > width - 20 and scroll == inner
    most = max(b.samples for b in plan.histogram)
    wanted = [b.samples / most for b in plan.histogram]
    assert [bar / max(bars) for bar in bars] == pytest.approx(wanted, abs=0.01) and max(bars) > 90
