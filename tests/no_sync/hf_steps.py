"""``python -m tests.no_sync.hf_steps CASE [no_device.so]``: steps of patched HF models."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.no_sync import steps  # isort: skip  (first: the device has to come before torch)

import torch
from torch import nn

from tests.helpers import random_samples
from tests.integrations.families import tiny_hf
from tests.no_sync.mode import NoSync
from varlen_sft import Collator, patch
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


def collators_batch() -> dict[str, Any]:
    """What ``Collator`` makes, where Trainer moves it, and how many targets Trainer counts."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        batch = Collator(pad_to=steps.TOKENS)(random_samples(steps.LENGTHS, fractional=False))
        batch["num_items_in_batch"] = batch["labels"].ne(-100).sum()
    return {
        key: mode.from_tensor(value).to("cuda") if torch.is_tensor(value) else value
        for key, value in batch.items()
    }


def hf_step(sync: NoSync, name: str, call: str) -> None:
    """Forward and backward of a patched model, told of its pack in one of several ways."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = tiny_hf(name, torch.bfloat16)
        loss = call in ("packed", "collator", "collator without rows")
        patch(model, loss=loss, prune_last_layer=loss)
    on_fake_device(model)
    batch, collated = steps.fake_batch(), collators_batch()
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
        "collator": collated,
        "collator without rows": {key: x for key, x in collated.items() if key != "rows"},
    }[call]  # fmt: skip
    with sync:
        out = model(**{"input_ids": batch.input_ids[None], **given})
        (out.loss if loss else out.logits.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


NAMES = ("llama3", "qwen2_window", "smollm3", "gemma2", "gemma3", "olmo2")
steps.CASES.update(
    {
        f"{n} {call}": partial(hf_step, name=n, call=call)
        for n in NAMES
        for call in ("flash", "packed", "collator")
    }
)
for waiting in ("positions", "collator without rows"):
    steps.CASES[f"llama3 {waiting}"] = partial(hf_step, name="llama3", call=waiting)

if __name__ == "__main__":
    steps.main()
