"""The head of the patched loss: plain ones of every kind, and those it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.families import FAMILIES, VOCAB, packed_inputs, tiny_hf
from tests.integrations.loss_runs import assert_equal, by_the_book, error, gradients, padded
from varlen_sft import patch, unpatch
from varlen_sft.integrations.families import family_of
from varlen_sft.integrations.hf_loss import install_loss

# Of PEFT and transformers, to each other: names that will change one day.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_a_bias_of_the_head_takes_part():
    model, given = tiny_hf("smollm2", tie_word_embeddings=False), padded()
    model.lm_head = nn.Linear(32, VOCAB, dtype=torch.float64)
    expected = by_the_book(model, given)
    wanted = gradients(model, expected)
    install_loss(model)
    loss = model(**given, num_items_in_batch=1).loss
    assert error(loss, expected) < 1e-10
    assert_equal(gradients(model, loss), wanted, 1e-10)
    assert wanted["lm_head.bias"].norm() > 0


def test_a_tied_head_gives_one_gradient():
    model, given = tiny_hf("smollm2"), packed_inputs()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    patch(model)
    found = gradients(model, model(**given, num_items_in_batch=1).loss)
    assert "lm_head.weight" not in found
    assert found["model.embed_tokens.weight"].norm() > 0


def test_a_head_that_peft_trains_as_a_whole():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_hf("qwen3", torch.float32), config)
    patch(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save.default.weight.mul_(3)
    given = padded()
    loss = model(**given, num_items_in_batch=1).loss
    assert error(loss, by_the_book(model, given)) < 1e-5
    loss.backward()
    head = model.base_model.model.lm_head
    assert head.modules_to_save.default.weight.grad.norm() > 0
    with model.disable_adapter():
        assert error(
            model(**given, num_items_in_batch=1).loss, by_the_book(model, given)
        ) < 1e-5  # fmt: skip


class Quantised(nn.Linear):
    """As bitsandbytes' layers: linear by class, another product by forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_heads_that_are_more_than_a_weight_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    adapted = peft.get_peft_model(tiny_hf("qwen3", torch.float32), config)
    quantised = tiny_hf("qwen3", torch.float32)
    quantised.lm_head = Quantised(32, VOCAB, bias=False)
    integers = tiny_hf("qwen3", torch.float32)
    integers.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 32).char(), requires_grad=False)
    cases = (adapted, "no adapter"), (quantised, "ordinary nn.Linear, got Quantised"), (
        integers, "must not be quantised, got weights of torch.int8")  # fmt: skip
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            patch(model)
        patch(model, loss=False)  # which leaves the head alone
        unpatch(model)


def test_an_adapter_that_comes_later_is_refused_in_the_call():
    peft = pytest.importorskip("peft")
    model = tiny_hf("qwen3", torch.float32)
    patch(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="the head must have no adapter"):
        adapted(**padded())


def test_a_head_that_fsdp2_shards_by_itself(tmp_path):
    """transformers' own plan makes the head a group of its own, which its forward gathers."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, given = tiny_hf("qwen3", torch.float32), padded()
    expected = by_the_book(model, given)
    wanted = gradients(model, expected)
    patch(model, prune_last_layer=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0,
                            world_size=1)  # fmt: skip
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model.lm_head, model):
            fully_shard(part, mesh=mesh)
        loss = model(**given, num_items_in_batch=1).loss
        loss.backward()
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    finally:
        dist.destroy_process_group()
    assert error(loss, expected) < 1e-5
    assert_equal(found, wanted, 1e-5)


def test_an_unknown_family_is_refused():
    model = tiny_hf("smollm2", torch.float32)
    model.config.model_type = "cohere"
    with pytest.raises(ValueError, match="model_type must be one of llama.* it has interleaved"):
        install_loss(model)
    assert "forward" not in vars(model) and family_of(FAMILIES["qwen3"]()).qk_norm == "head"
