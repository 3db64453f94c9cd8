"""FLOPs against counts made by hand and against the weights of a real model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.sizes import LLAMA_1B, LLAMA_2_7B, TINY, TINY_HF
from varlen_sft.data.costs import ModelSizes, pack_costs, training_flops
from varlen_sft.data.packing import Packs
from varlen_sft.errors import InputError


def products(sizes: ModelSizes, lengths: list[int], supervised: int) -> int:
    """Multiply-adds of a forward pass, matrix by matrix and pair by pair."""
    c, d = sizes.hidden_size, sizes.head_dim
    queries, keys = sizes.num_heads * d, sizes.num_kv_heads * d
    token = c * queries + 2 * c * keys + queries * c + 3 * c * sizes.intermediate_size
    pairs = sum(query + 1 for length in lengths for query in range(length))
    layer = token * sum(lengths) + pairs * sizes.num_heads * 2 * d
    return sizes.num_layers * layer + supervised * c * sizes.vocab_size


@pytest.mark.parametrize("sizes", [TINY, LLAMA_1B])
@pytest.mark.parametrize("lengths", [[1], [3, 1, 7], [50]])
def test_flops_are_those_counted_by_hand(sizes, lengths):
    squares = sum(length**2 for length in lengths)
    found = training_flops(sizes, sum(lengths), squares, supervised=2)
    assert found.total == 3 * 2 * products(sizes, lengths, supervised=2)
    assert found.to_dict()["total"] == found.layers + found.attention + found.head


def test_the_layers_are_two_flops_per_weight():
    from varlen_sft.models.config import LlamaConfig
    from varlen_sft.models.llama import LlamaForSFT

    config = LlamaConfig.from_hf(TINY_HF)
    assert ModelSizes.of(config) == TINY
    model = LlamaForSFT(config)
    weights = [w for name, w in model.named_parameters() if "layers" in name and w.dim() == 2]
    assert TINY.per_token == 2 * sum(w.numel() for w in weights)


def test_a_of_known_models():
    assert LLAMA_1B.a == 29697
    assert LLAMA_2_7B.a == 49409  # near 12 C + 1, what an MLP of 4 C in two matrices would have
    # 6 FLOPs per weight: 6.48e9 weights in its layers
    assert LLAMA_2_7B.per_token * 3 == 6 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)


def test_cost_is_flops_of_the_layers_in_other_units():
    lengths = np.array([5, 300, 17, 2000], dtype=np.int32)
    packs = Packs(np.array([3, 0, 1, 2]), np.array([0, 2, 4]))
    costs = pack_costs(packs, lengths, LLAMA_1B.a)
    assert costs.tolist() == [29697 * 2005 + 5**2 + 2000**2, 29697 * 317 + 300**2 + 17**2]
    for ids, cost in zip(packs, costs, strict=True):
        tokens, squares = int(lengths[ids].sum()), int((lengths[ids].astype(int) ** 2).sum())
        flops = training_flops(LLAMA_1B, tokens, squares, 0).total
        assert cost * 3 * LLAMA_1B.per_square == flops  # a is whole here: nothing is rounded


# ------------------------------------------------------------ from config.json


def written(folder, **config):
    (folder / "config.json").write_text(json.dumps(TINY_HF | config))
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "granite", "olmo2"])
def test_sizes_of_a_folder(tmp_path, family):
    unused = {"sliding_window": 4096, "use_sliding_window": False} if "qwen" in family else {}
    assert ModelSizes.from_folder(written(tmp_path, model_type=family, **unused)) == TINY


def test_sizes_that_a_config_leaves_out(tmp_path):
    folder = written(tmp_path, head_dim=None, num_key_value_heads=None, hidden_size=8)
    sizes = ModelSizes.from_folder(folder)
    assert (sizes.head_dim, sizes.num_kv_heads) == (2, 4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mixtral"}, "model_type must be one of llama, .*, is 'mixtral'"),
        ({"model_type": "mistral", "sliding_window": 9}, "sliding windows are not known here"),
        ({"hidden_size": "x"}, "cannot be read: "),
    ],
)
def test_a_config_that_cannot_be_counted_is_named(tmp_path, config, reason):
    with pytest.raises(InputError, match=f"config.json: .*{reason}"):
        ModelSizes.from_folder(written(tmp_path, head_dim=None, **config))


def test_a_config_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match="config.json: cannot be read: .*No such file"):
        ModelSizes.from_folder(tmp_path)
    for text, reason in (
        ("{}", "'model_type' is missing"),
        ("{", "cannot be read"),
        ("[]", "read"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=f"config.json: .*{reason}"):
            ModelSizes.from_folder(tmp_path)
