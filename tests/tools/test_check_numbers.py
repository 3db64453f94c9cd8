"""How a check judges the most likely token: by roundings, not by which of equal logits is first."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import random_samples
from tests.integrations.families import tiny_hf
from tests.tools.small_tokenizer import VOCAB, write_tokenizer
from varlen_sft.tools.check import CheckOptions, _batched, check, prepare
from varlen_sft.tools.check_finding import Subject
from varlen_sft.tools.check_numbers import Numbers, forward_findings
from varlen_sft.tools.check_subject import load_model

TOP = "the most likely next token is that of HF alone"


def top_finding(numbers: Numbers):
    return next(f for f in forward_findings(numbers) if f.property == TOP)


def numbers_of(ours, low, high, dtype=torch.bfloat16) -> Numbers:
    numbers = Numbers(dtype)
    rows = [torch.tensor(x, dtype=d) for x, d in ((ours, dtype), (low, dtype), (high, None))]
    numbers.add_logits(0, *rows)
    return numbers


def test_equal_logits_say_nothing():
    """The second token leads in the higher precision; below it, it shares its place."""
    high = [[1.0, 1.001, 0.0]] * 3
    ours = [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.5]]
    low = [[1.0, 0.5, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    numbers = numbers_of(ours, low, high)
    assert (numbers.our_misses, numbers.hf_misses) == (0, 1)
    assert numbers_of(low, ours, high).our_misses == 1


def test_no_number_is_no_most_likely_token():
    nan = float("nan")
    assert numbers_of([[nan, nan], [nan, 2.0]], [[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2).our_misses == 2


@pytest.mark.parametrize(
    ("ours", "hf", "verdict"), [(5, 1, "pass"), (9, 0, "fail"), (80, 20, "fail")]
)
def test_as_many_misses_as_hugging_face_may_have_by_chance(ours, hf, verdict):
    numbers = numbers_of([[0.0, 1.0]] * 1000, [[0.0, 1.0]] * 1000, [[0.0, 1.0]] * 1000)
    numbers.our_misses, numbers.hf_misses = ours, hf
    finding = top_finding(numbers)
    assert finding.verdict == verdict
    assert finding.worst == ours / 1000
    assert finding.bound == pytest.approx((2 * hf + 3 * math.sqrt(6 * max(1, hf))) / 1000)
    assert f"not the higher precision's in {ours}, HF's in {hf}" in finding.detail


def test_a_token_that_is_no_near_tie_fails_whatever_the_counts():
    ours, low = [[2.0, 1.0]] + [[1.0, 2.0]] * 999, [[1.0, 2.0]] * 1000
    finding = top_finding(numbers_of(ours, low, low))
    assert (
        finding.verdict == "fail" and "token 0: HF's top-2 gap is 1, no near tie" in finding.detail
    )


def test_in_fp32_near_ties_are_counted():
    eps = 1e-7
    low, ours = [[1.0, 1.0 + 2 * eps]] * 1000, [[1.0 + 2 * eps, 1.0]] + [[1.0, 1.0 + 2 * eps]] * 999
    finding = top_finding(numbers_of(ours, low, low, torch.float32))
    assert finding.verdict == "pass" and finding.detail == "1,000 positions, 1 near ties"
    assert finding.worst == 1e-3 == finding.bound


def test_the_error_of_a_log_probability_is_that_of_every_position():
    numbers = Numbers(torch.float32)
    high = torch.zeros(3, 4, dtype=torch.float64)
    low = high.float()
    low[1, 2] = 0.1
    numbers.add_targets(low, high, torch.tensor([0, 2, 1]))
    wrong = 0.1 - math.log(3 + math.exp(0.1)) + math.log(4)
    assert numbers.hf_log_probability == pytest.approx(wrong, rel=1e-6)
    numbers.largest_logit = 2.0
    expected = 2 * wrong + 2 * torch.finfo(torch.float32).eps
    assert numbers.log_probability_tolerance == pytest.approx(expected, rel=1e-6)


def test_batches_of_wrong_frequencies_are_no_measure():
    model, samples = tiny_hf("llama3", torch.bfloat16).eval(), random_samples([5, 7])
    assert _batched(model, samples, mixed=True) == []
    assert len(_batched(model, samples, mixed=False)) == 2
    assert _batched(model.float(), samples, mixed=False) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_gemma_2_in_bf16(seed, tmp_path):
    """Its softcap brings many logits to the same value of 16 bits."""
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 2048}
    tiny_hf("gemma2", torch.float32, seed, **sizes).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    options = CheckOptions(
        model=tmp_path, conversations=10, prompts=1, generated=2, dtype="bf16"
    )  # fmt: skip
    result = check(Subject(load_model(tmp_path, torch.bfloat16)), options, prepare(options))
    found = {f["property"]: f for f in result["findings"]}
    assert found[TOP]["verdict"] == "pass"
    assert found["logits of every position are those of HF alone"]["verdict"] == "pass"
