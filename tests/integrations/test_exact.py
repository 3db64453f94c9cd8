"""What mixed precision must not round: refused with the remedy, and the remedy works."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.integrations.families import packed_inputs, tiny_hf
from tests.integrations.steps import alone, eight_samples
from varlen_sft import patch
from varlen_sft.integrations import keep_exact
from varlen_sft.integrations.packed import Packed

REMEDY = (
    r"must not be rounded, got bfloat16: .*keep_exact\(accelerator\).*cast_forward_inputs=False"
)


@pytest.mark.parametrize("loss", [False, True])
def test_weights_of_tokens(loss):
    call = packed_inputs([3, 4])
    call["shift_weights"] = torch.ones(1, 7, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="shift_weights " + REMEDY):
        Packed.from_call(call)
    model = tiny_hf("llama3", torch.float32)
    patch(model, loss=loss)
    padded = {key: call[key].expand(2, -1) for key in ("input_ids", "shift_weights")}
    if loss:
        with pytest.raises(TypeError, match="shift_weights " + REMEDY):
            model(**padded, labels=padded["input_ids"])


def test_the_number_of_items():
    model = tiny_hf("llama3", torch.float32)
    patch(model)
    with pytest.raises(TypeError, match="num_items_in_batch " + REMEDY):
        model(**packed_inputs(), num_items_in_batch=torch.tensor(3.0, dtype=torch.bfloat16))


def accelerator(plugin):
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))


def test_the_policy_is_changed_where_fsdp2_would_round():
    accelerate = pytest.importorskip("accelerate")
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2)
    keep_exact(accelerator(None))
    keep_exact(SimpleNamespace(state=SimpleNamespace()))
    keep_exact(accelerator(plugin))
    assert plugin.mixed_precision_policy is None
    plugin.set_mixed_precision("bf16")
    before = plugin.mixed_precision_policy
    assert before.cast_forward_inputs and before.output_dtype == torch.bfloat16
    keep_exact(accelerator(plugin))
    after = plugin.mixed_precision_policy
    assert not after.cast_forward_inputs and after.output_dtype is None
    assert after.param_dtype == after.reduce_dtype == torch.bfloat16 == before.reduce_dtype


def test_the_first_fsdp_is_left_alone():
    plugin = SimpleNamespace(fsdp_version=1, mixed_precision_policy="as it was")
    keep_exact(accelerator(plugin))
    assert plugin.mixed_precision_policy == "as it was"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_fsdp2_on_two_ranks(two_ranks):
    """Accelerate's own mixed precision: refused with the remedy, exact with it."""
    import re

    rounded, exact = two_ranks[0]["fsdp2 mixed"]
    assert re.search("must not be rounded, got bfloat16.*keep_exact", rounded)
    loss, _ = alone(
        tiny_hf("llama3", torch.float32, attention="sdpa"), eight_samples(fractional=True)
    )
    assert exact["dtype"] == torch.float32
    assert exact["loss"] == pytest.approx(float(loss), rel=torch.finfo(torch.bfloat16).eps)
    assert exact["kinds"] == {"DTensor"}
