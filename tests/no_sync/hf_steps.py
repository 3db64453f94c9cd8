"""``python -m tests.no_sync.hf_steps CASE [no_device.so]``: steps of patched HF models."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.no_sync import steps  # isort: skip  (first: the device has to come before torch)

import torch
from torch import nn

from tests.integrations.families import tiny_hf
from tests.no_sync.mode import NoSync
from varlen_sft import patch
from varlen_sft.integrations.hf_call import call_of
from varlen_sft.integrations.packed import Packed


def on_fake_device(model: nn.Module) -> None:
    """Every parameter and buffer becomes one of the fake device."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    moved: dict[int, Any] = {}  # tied weights stay tied
    for module in model.modules():
        for values, kind in ((module._parameters, nn.Parameter), (module._buffers, None)):
            for name, value in values.items():
                if value is not None and id(value) not in moved:
                    fake = mode.from_tensor(value).detach().to("cuda")
                    moved[id(value)] = kind(fake) if kind else fake
                if value is not None:
                    values[name] = moved[id(value)]


def hf_step(sync: NoSync, name: str, call: str) -> None:
    """Forward and backward of a patched model, told of its pack in one of three ways."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = tiny_hf(name, torch.bfloat16)
        patch(model, loss=call == "packed", prune_last_layer=call == "packed")
    on_fake_device(model)
    batch = steps.fake_batch()
    for table in call_of(model.model).tables.values():
        table._tables(batch.max_seqlen, batch.input_ids.device)  # once per model, no step
    given = {
        "packed": {"packed": Packed.from_batch(batch), "num_items_in_batch": batch.weight_sum},
        "positions": {"position_ids": batch.position_ids[None]},
        "flash": {
            "cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens.clone(),
            "max_length_q": batch.max_seqlen, "max_length_k": batch.max_seqlen,
            "shift_labels": batch.labels[None],
        },
    }[call]  # fmt: skip
    with sync:
        out = model(input_ids=batch.input_ids[None], **given)
        (out.loss if call == "packed" else out.logits.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


NAMES = ("llama3", "qwen2_window", "smollm3", "gemma2", "gemma3", "olmo2")
steps.CASES.update(
    {
        f"{n} {call}": partial(hf_step, name=n, call=call)
        for n in NAMES
        for call in ("flash", "packed")
    }
)
steps.CASES["llama3 positions"] = partial(hf_step, name="llama3", call="positions")

if __name__ == "__main__":
    steps.main()
