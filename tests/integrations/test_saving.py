"""What pruning is said to spare, counted by hand."""

from __future__ import annotations

import pytest

from tests.integrations.families import FAMILIES
from varlen_sft.integrations.saving import saving


def test_saving_of_llama_3_8b_by_hand():
    config = FAMILIES["llama3"]()
    for key, value in {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
                       "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
                       "num_hidden_layers": 32}.items():  # fmt: skip
        setattr(config, key, value)
    found = saving(config, supervised=0.25, length=1000)
    row = 2 * (2 * 4096**2 + 3 * 4096 * 14336)  # q, o, MLP
    layer = row + 2 * 2 * 4096 * 1024
    scores = 4 * 4096 * 1001 / 2
    assert found.flops == 32 * (layer + scores) + 2 * 4096 * 128256 * 0.25
    assert found.spared == 0.75 * row + 4 * 4096 * 750 * 751 / 2 / 1000
    assert str(found) == (
        "spares 2.2% of the FLOPs of a step (sequences of 1000 tokens, 25% of them supervised)"
    )
    assert saving(config, supervised=1.0).share == 0


def test_saving_counts_windows():
    config = FAMILIES["gemma3"]()  # two layers with a window of 8, one without between them
    assert config.layer_types[0] == config.layer_types[2] == "sliding_attention"
    found, width = saving(config, supervised=0.5, length=20), 64
    keys = 8 * 9 / 2 + 12 * 8
    row = 2 * 32 * (2 * width + 3 * 48)
    scores = 4 * width * (2 * keys + 20 * 21 / 2) / 20
    assert found.flops == 3 * (row + 4 * 32 * 32) + scores + 2 * 32 * 53 * 0.5
    assert found.spared == 0.5 * row + 4 * width * (8 * 9 / 2 + 2 * 8) / 20


@pytest.mark.parametrize("wrong", [{"supervised": 0.0}, {"supervised": 1.1}, {"length": 0}])
def test_saving_names_a_number_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        saving(FAMILIES["llama3"](), **wrong)
