"""``python -m tests.no_sync.steps CASE [no_device.so]``: one case on a fake CUDA device, as JSON.

A process of its own: the library that stands in for the device has to come before torch.
"""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import fields, replace
from functools import partial
from unittest import mock

if len(sys.argv) > 2:
    ctypes.CDLL(sys.argv[2])

import torch
from torch import Tensor

from tests.helpers import random_samples, tiny_hf_config
from tests.no_sync.mode import HostSync, NoSync, fake_cuda
from varlen_sft.data.batch import PackedBatch, collate
from varlen_sft.data.stream_step import Counts, Step
from varlen_sft.models.config import LlamaConfig
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.ops.backends import backends
from varlen_sft.ops.cross_entropy import (
    LossOptions,
    linear_cross_entropy,
    masked_cross_entropy,
)
from varlen_sft.ops.elementwise import add_rms_norm, rms_norm, silu_mul
from varlen_sft.ops.rope import apply_rope, apply_rope_, rope_table
from varlen_sft.ops.sequences import sequences_from_position_ids
from varlen_sft.train.distributed import World
from varlen_sft.train.loop import Loop, mean_loss
from varlen_sft.train.optimizer import MasterAdamW
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.parallel import Parallel
from varlen_sft.train.sums import MICRO_BATCH, host_sums

LENGTHS = [40, 2, 7, 20]  # with the tiny config's 32 positions, one sequence is a long one
TOKENS = 320  # rows found on the device then take three chunks


def fake_batch() -> PackedBatch:
    """A pack on the fake device."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        batch = collate(random_samples(LENGTHS), pad_to=TOKENS)
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved = {
        name: mode.from_tensor(value).to("cuda")
        for name, value in tensors.items()
        if isinstance(value, Tensor)
    }
    return replace(batch, **moved)


def step(sync: NoSync, rope: str = "default", spoil: str = "") -> None:
    """Forward, loss and backward of LlamaForSFT in bf16, as the training loop does them."""
    torch.set_default_dtype(torch.bfloat16)  # Module.to cannot swap fake parameters
    with torch.device("cuda"):
        config = tiny_hf_config(rope, tie_word_embeddings=True)
        model = LlamaForSFT(LlamaConfig.from_hf(config))
    torch.set_default_dtype(torch.float32)
    batch = fake_batch()
    model.rotary._tables(batch.max_seqlen, batch.input_ids.device)  # once per model, no step
    if spoil == "backward":
        model.norm.weight.register_hook(lambda grad: grad * float(grad.sum()))
    with sync:
        loss = mean_loss([model(batch)])
        if spoil == "forward":
            loss.item()
        loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without, without


def loop(sync: NoSync) -> None:
    """Two whole steps of the training loop, of two micro-batches each: reduction, clipping, AdamW
    on fp32 copies, and the numbers on their way to the host, of which none is read."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForSFT(LlamaConfig.from_hf(tiny_hf_config(tie_word_embeddings=True)))
    torch.set_default_dtype(torch.float32)
    batch = fake_batch()
    model.rotary._tables(batch.max_seqlen, batch.input_ids.device)
    here = World(device=batch.input_ids.device)
    options = TrainOptions(max_steps=9, max_grad_norm=1.0)
    run = Loop(Parallel(model, here), MasterAdamW(model), options, capacity=TOKENS)
    step = Step(0, 0, (), (batch, batch), (), (Counts(), Counts()), False)
    pinned = mock.patch.object(Tensor, "pin_memory", lambda self: self)  # there is no driver
    to_host = mock.patch("varlen_sft.train.loop._to_host", _to_host)
    with pinned, to_host, sync:
        for _ in range(2):
            numbers = run._launch(step, False, 0.0).numbers
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        known = host_sums((), seconds=0, stop=False, own=(0, 0), rank=0, ranks=1)
    assert numbers.shape == (MICRO_BATCH + len(known) + 1,) and numbers.dtype == torch.float64


def _to_host(numbers: Tensor) -> tuple[Tensor, None]:
    return numbers.to("cpu", non_blocking=True), None


def rope(sync: NoSync, interleaved: bool, numerics: str) -> None:
    cos, sin = rope_table({"rope_type": "default", "rope_theta": 1e4}, 16, 64, device="cuda")
    qkv = torch.empty(TOKENS, 8, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    q, k, _ = qkv.split((4, 2, 2), dim=1)
    ids = fake_batch().position_ids
    with sync:
        q, k = apply_rope(q, k, cos, sin, ids, interleaved=interleaved, numerics=numerics)
        (q.sum() + k.sum()).backward()
        with torch.no_grad():
            apply_rope_(q, k, cos, sin, ids, interleaved=interleaved, numerics=numerics)


def elementwise(sync: NoSync) -> None:
    """A gradient of the sum or none; SwiGLU fused and apart."""
    hidden, weight = (
        torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for shape in ((TOKENS, 32), (32,))
    )
    with sync:
        normed, total = add_rms_norm(rms_norm(hidden, weight, 1e-5), hidden, weight, 1e-5)
        (silu_mul(normed).sum() + silu_mul(normed, total).sum()).backward()


def linear(sync: NoSync, given_rows: bool, chunk_bytes: int = 1) -> None:
    """With a bias, in chunks of 128 rows or more; rows are given or found on the device."""
    batch = fake_batch()
    hidden, weight, bias = (
        torch.empty(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for shape in ((TOKENS, 32), (53, 32), (53,))
    )
    with sync:
        linear_cross_entropy(
            hidden, weight, batch.labels, token_weights=batch.token_weights, linear_bias=bias,
            rows=batch.rows if given_rows else None, options=LossOptions(chunk_bytes=chunk_bytes),
        ).loss_sum.backward()  # fmt: skip


def masked(sync: NoSync, with_sequences: bool) -> None:
    batch = fake_batch()
    logits = torch.empty(TOKENS, 53, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    with sync:
        masked_cross_entropy(
            logits, batch.labels, token_weights=batch.token_weights,
            sequences=batch.sequences if with_sequences else None,
        ).loss_sum.backward()  # fmt: skip


def sequences(sync: NoSync, capacity: int | None) -> None:
    ids = fake_batch().position_ids
    with sync:
        sequences_from_position_ids(ids, capacity=capacity)


CASES = {
    **{f"step {rope}": partial(step, rope=rope) for rope in ("default", "yarn", "llama3")},
    **{f"step {rope}": partial(step, rope=rope) for rope in ("dynamic", "longrope")},
    **{f"step spoilt {where}": partial(step, spoil=where) for where in ("forward", "backward")},
    "loop": loop,
    "rope": partial(rope, interleaved=False, numerics="fp32"),
    "rope interleaved hf": partial(rope, interleaved=True, numerics="hf"),
    "elementwise": elementwise,
    "linear rows": partial(linear, given_rows=True),
    "linear no rows": partial(linear, given_rows=False),
    "linear rows whole": partial(linear, given_rows=True, chunk_bytes=2**20),
    "linear no rows whole": partial(linear, given_rows=False, chunk_bytes=2**20),
    "masked": partial(masked, with_sequences=False),
    "masked sequences": partial(masked, with_sequences=True),
    "sequences capacity": partial(sequences, capacity=8),
    "sequences of true size": partial(sequences, capacity=None),
}


def main() -> None:
    """Cases, separated by commas; a line of JSON each."""
    picked = {op: [n for n, word in rows if word == "picked"] for op, rows in
              backends("cuda").items()}  # fmt: skip
    for name in sys.argv[1].split(","):
        sync, found = NoSync(), None
        with fake_cuda():
            try:
                CASES[name](sync)
            except HostSync as error:
                found = str(error)
        print(json.dumps({"case": name, "sync": found, "picked": picked, "ops": len(sync.ops),
                          "bodies": sync.bodies, "launches": sync.launches}))  # fmt: skip


if __name__ == "__main__":
    main()
