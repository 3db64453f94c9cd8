from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import tiny_hf_config, tiny_model
from varlen_sft.data.batch import collate
from varlen_sft.data.costs import ModelSizes, training_flops
from varlen_sft.data.sample import Sample
from varlen_sft.models.config import LlamaConfig
from varlen_sft.train.distributed import World
from varlen_sft.train.flops import (
    StepWork,
    Trained,
    naive_flops,
    peak_tflops,
    step_flops,
    work_of,
)
from varlen_sft.train.optimizer import freeze

V, C, I, L, H, K, D = 50, 12, 20, 3, 4, 2, 6  # noqa: E741
SIZES = ModelSizes(
    vocab_size=V, hidden_size=C, intermediate_size=I, num_layers=L, num_heads=H, num_kv_heads=K,
    head_dim=D,
)  # fmt: skip
LENGTHS, SUPERVISED = [5, 9], [[2, 3], [0, 7, 8]]
"""Rows of two sequences, and which of them have a label."""
TOKENS, SQUARES = sum(LENGTHS), sum(n * n for n in LENGTHS)
ROWS = sum(map(len, SUPERVISED))
PAIRS = sum(row + 1 for rows in SUPERVISED for row in rows)


def forward_by_hand() -> tuple[int, int, int]:
    """(matrices, attention, head): multiplications and additions, row by row and pair by pair."""
    matrices = attention = head = 0
    for length, rows in zip(LENGTHS, SUPERVISED, strict=True):
        for layer in range(L):
            for row in range(length):
                matrices += 2 * C * K * D * 2  # key and value
                if layer == L - 1 and row not in rows:
                    continue
                matrices += 2 * C * H * D * 2 + 2 * C * I * 3  # query, output; gate, up, down
                for _ in range(row + 1):
                    attention += H * 2 * D * 2  # score; its share of the value
        head += len(rows) * 2 * C * V
    return matrices, attention, head


def test_a_step_is_what_a_loss_needs_counted_by_hand():
    counted = 3 * sum(forward_by_hand())
    assert step_flops(SIZES, TOKENS, SQUARES, ROWS, pairs=PAIRS) == counted
    assert counted < training_flops(SIZES, TOKENS, SQUARES, ROWS).total  # which prunes nothing


def test_with_every_row_supervised_nothing_is_spared():
    pairs = sum(n * (n + 1) // 2 for n in LENGTHS)
    whole = training_flops(SIZES, TOKENS, SQUARES, TOKENS).total
    assert step_flops(SIZES, TOKENS, SQUARES, TOKENS, pairs=pairs) == whole
    assert step_flops(SIZES, TOKENS, SQUARES, TOKENS) == whole  # pairs in proportion: all of them
    assert step_flops(SIZES, 0, 0, 0) == 0


def test_frozen_weights_and_layers_below_all_that_is_trained_cost_less():
    matrices, attention, head = forward_by_hand()

    def flops(trained: Trained) -> int:
        return step_flops(SIZES, TOKENS, SQUARES, ROWS, pairs=PAIRS, trained=trained)

    lora = flops(Trained(weights=0.0, head=False))
    assert lora == 2 * matrices + 3 * attention + 2 * head
    third = flops(Trained(weights=1 / 3, reached=1 / 3))
    assert third == round(matrices * (1 + 2 / 3) + attention * (1 + 2 / 3) + 3 * head)
    head_alone = flops(Trained(weights=0.0, reached=0.0))
    assert head_alone == matrices + attention + 2 * head


def test_the_matrices_are_those_that_the_model_multiplies():
    """Torch counts the products of a whole step; attention and head are ops that it cannot see."""
    config = tiny_hf_config(num_hidden_layers=3)
    model = tiny_model(config, torch.float32)
    samples = []
    for length, trained in ((20, 6), (31, 9), (7, 2)):
        weights = np.zeros(length, np.float32)
        weights[length - trained :] = 1  # the end of each: no other row makes a query
        ids = np.arange(length, dtype=np.int32) % 53
        samples.append(Sample(ids, weights, np.zeros(length, np.uint8)))
    batch = collate(samples)
    with FlopCounterMode(display=False) as seen:
        model(batch).loss_sum.backward()
    sizes = ModelSizes.of(LlamaConfig.from_hf(config))
    tokens, rows = batch.real_tokens, batch.supervised_tokens
    needed = step_flops(sizes, tokens, -tokens, rows, pairs=0)  # -T: no attention at all
    head = 3 * 2 * sizes.hidden_size * sizes.vocab_size * rows
    assert seen.get_total_flops() == needed - head


def test_a_naive_count_takes_all_rows_and_whole_squares():
    packs, rows = 3, 8
    by_hand = 0
    for _ in range(packs * rows):
        by_hand += 2 * C * V
        for _ in range(L):
            by_hand += 2 * C * K * D * 2 + 2 * C * H * D * 2 + 2 * C * I * 3
            by_hand += rows * H * 2 * D * 2
    assert naive_flops(SIZES, packs, rows) == 3 * by_hand


def test_what_is_trained_is_read_from_the_model():
    tied = tiny_model(tiny_hf_config(num_hidden_layers=4, tie_word_embeddings=True))
    assert Trained.of(tied) == Trained()
    freeze(tied, ("embed_tokens.*",))
    assert Trained.of(tied) == Trained(head=False)
    freeze(tied, ("layers.[0-2].*",))
    assert Trained.of(tied) == Trained(weights=0.25, reached=0.25, head=False)
    untied = tiny_model(tiny_hf_config(num_hidden_layers=4))
    freeze(untied, ("embed_tokens.*", "layers.*"))
    assert Trained.of(untied) == Trained(weights=0.0, reached=0.0, head=True)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
def test_lora_trains_its_own_matrices_alone():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**tiny_hf_config())
    model = transformers.AutoModelForCausalLM.from_config(config)
    before = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    own = sum(p.numel() for n, p in lora.named_parameters() if "lora_" in n)
    found = Trained.of(lora)
    assert found == Trained(weights=own / (before + own), reached=1.0, head=False)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB MIG 1g.12gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("CPU", None),
    ],
)
def test_peaks_of_devices_whole_and_known(device, peak):
    assert peak_tflops(device) == peak


def test_rates_are_of_all_ranks():
    work = StepWork(SIZES, max_tokens=8, peak=2e-7)
    counts = {"tokens": TOKENS, "squares": SQUARES, "supervised": ROWS, "pairs": PAIRS}
    rates = work.rates(2.0, **counts, packs=3)
    flops = step_flops(SIZES, TOKENS, SQUARES, ROWS, pairs=PAIRS)
    assert rates.tflops == flops / 2.0 / 1e12
    assert rates.naive_tflops == naive_flops(SIZES, 3, 8) / 2.0 / 1e12
    assert rates.mfu == rates.tflops / 2e-7
    assert StepWork(SIZES, max_tokens=8).rates(2.0, **counts, packs=3).mfu is None


def test_the_work_of_a_run_is_known_for_families_with_these_matrices(tmp_path):
    model = tiny_model(tiny_hf_config())

    def work(here: World = World(), peak: float | None = None, **changes):  # noqa: B008
        (tmp_path / "config.json").write_text(json.dumps(tiny_hf_config(**changes)))
        config = SimpleNamespace(
            log=SimpleNamespace(peak_tflops=peak),
            stream=SimpleNamespace(max_tokens=64),
            model=SimpleNamespace(dtype="bf16"),
        )
        return work_of(config, tmp_path, model, here)

    sizes = ModelSizes.of(LlamaConfig.from_hf(tiny_hf_config()))
    assert work() == StepWork(sizes, 64)  # a CPU has no peak
    assert work(World(size=4), peak=100.0) == StepWork(sizes, 64, peak=400.0)
    assert work(model_type="gemma3_text") is None
