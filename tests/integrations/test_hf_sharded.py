"""Weights in shards: tensor parallelism is refused, FSDP2 computes the same."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.families import packed_inputs, tiny_hf
from tests.integrations.hf_runs import together
from tests.integrations.test_hf_refusals import refuse
from varlen_sft import patch, unpatch
from varlen_sft.integrations.packed import Packed


@pytest.fixture
def one_rank():
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_tensor_parallel(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = tiny_hf("llama3", torch.float32)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    parallelize_module(model.model.layers[0], mesh, {"mlp.up_proj": ColwiseParallel()})
    refuse(model, ValueError, "tensor-parallel models are not supported, got model.layers.0.mlp.up")


def test_tensor_parallel_by_huggingfaces_own_word():
    model = tiny_hf("llama3")
    model._tp_size = 4
    refuse(model, ValueError, "tensor-parallel models are not supported, got tp_size=4")


def test_fully_sharded_is_no_tensor_parallelism(one_rank):
    from torch.distributed.fsdp import fully_shard

    model, packed = tiny_hf("llama3", torch.float32), packed_inputs()
    patch(model, loss=False)
    expected = together(model, packed)
    unpatch(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    patch(model, loss=False)
    assert torch.equal(together(model, packed)["logits"], expected["logits"])


def test_mixed_precision_of_fsdp_rounds_neither_tables_nor_weights(one_rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    packed = packed_inputs()
    expected = tiny_hf("llama3", torch.bfloat16)
    patch(expected, loss=False)
    model = tiny_hf("llama3", torch.bfloat16).float()
    patch(model, loss=False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    seen = []
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    actual = together(model, packed)["logits"]
    assert torch.equal(actual, together(expected, packed)["logits"])
    assert seen[0]["position_embeddings"][0].rotation.cos.dtype == torch.float32
    weights = torch.rand(1, 117)
    pack = Packed.from_call({**packed, "shift_weights": weights})
    model(input_ids=packed["input_ids"], packed=pack)
    assert torch.equal(seen[1]["packed"].token_weights, weights[0])
