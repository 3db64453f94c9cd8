"""On a CUDA device (make gpu): kernels against the reference, no wait in a step, overflows caught.

What is computed on the device is judged against fp64 and eager torch in the same dtype, both there.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import (
    assert_within_reference_error,
    loss_and_gradients,
    random_samples,
    tiny_hf_config,
    tiny_model,
)
from varlen_sft import reference
from varlen_sft.data.batch import collate
from varlen_sft.ops.backends import resolve
from varlen_sft.ops.cross_entropy import (
    LossOptions,
    linear_cross_entropy,
    masked_cross_entropy,
    supervised_rows,
)
from varlen_sft.ops.rope import apply_rope, rope_table
from varlen_sft.ops.sequences import sequences_from_lengths

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (make gpu)"),
]

ROOT = Path(__file__).parents[1]
LENGTHS = [1, 130, 64, 7, 300, 2]
TOTAL = sum(LENGTHS)
LOW = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda", dtype)


def with_gradients(function, tensors: list[Tensor], dtype: torch.dtype | None = None):
    """Outputs and gradients of the inputs, for random incoming gradients."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves)
    grads = [drawn(*y.shape, dtype=y.dtype, seed=9) for y in out]
    return [y.detach() for y in out] + list(torch.autograd.grad(out, leaves, grads))


def assert_like_reference(kernel, spec, tensors: list[Tensor]) -> None:
    actual = with_gradients(kernel, tensors)
    low, high = with_gradients(spec, tensors), with_gradients(spec, tensors, torch.float64)
    for x, y, z in zip(actual, low, high, strict=True):
        assert_within_reference_error(x, y, z)


def fused_views(dtype, heads, kv_heads, dim):
    qkv = drawn(TOTAL, heads + 2 * kv_heads, dim, dtype=dtype)
    return list(qkv.split((heads, kv_heads, kv_heads), dim=1)[:2])


def transposed_views(dtype, heads, kv_heads, dim):
    """HF's (1, H, T, D) as it comes out of ``view().transpose(1, 2)``, turned back to (T, H, D)."""
    shapes = ((heads, TOTAL, dim), (kv_heads, TOTAL, dim))
    return [drawn(*shape, dtype=dtype, seed=s).transpose(0, 1) for s, shape in enumerate(shapes)]


ROPE_CASES = [  # heads, kv heads, head_dim, rotary dims, interleaved
    (32, 8, 128, 128, False),
    (9, 3, 64, 64, False),  # SmolLM2
    (32, 32, 80, 32, False),  # Phi: partial rotary, head_dim no power of two
    (16, 1, 256, 64, True),  # GPT-J pairs, one kv head
]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("views", [fused_views, transposed_views])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary", "interleaved"), ROPE_CASES)
def test_rope_equals_the_reference(views, dtype, heads, kv_heads, dim, rotary, interleaved):
    tables = rope_table({"rope_type": "default", "rope_theta": 1e4}, rotary, 512, device="cuda")
    ids = torch.randint(512, (TOTAL,), generator=torch.Generator().manual_seed(1)).cuda()
    shared = {"interleaved": interleaved}
    assert_like_reference(
        lambda q, k: apply_rope(q, k, *tables, ids, impl="triton", **shared),
        lambda q, k: reference.apply_rope(q, k, *tables, ids, **shared),
        views(dtype, heads, kv_heads, dim),
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary", "interleaved"), ROPE_CASES)
def test_hf_rounding_is_bit_equal(dtype, heads, kv_heads, dim, rotary, interleaved):
    tables = rope_table({"rope_type": "default", "rope_theta": 1e4}, rotary, 512, device="cuda")
    ids = torch.arange(TOTAL, device="cuda", dtype=torch.int32) % 512
    shared = {"interleaved": interleaved, "numerics": "hf"}
    tensors = fused_views(dtype, heads, kv_heads, dim)
    functions = (partial(apply_rope, impl="triton"), reference.apply_rope)
    actual, expected = (
        with_gradients(lambda q, k, f=f: f(q, k, *tables, ids, **shared), tensors)
        for f in functions
    )
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


def test_hf_rounding_is_that_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = fused_views(torch.bfloat16, 9, 3, 64)
    cos, sin = rope_table({"rope_type": "default", "rope_theta": 1e4}, 64, 512, device="cuda")
    ids = torch.arange(TOTAL, device="cuda")
    wide = (table[ids].repeat(1, 2)[None].to(q.dtype) for table in (cos, sin))
    theirs = llama.apply_rotary_pos_emb(*(x.transpose(0, 1)[None] for x in (q, k)), *wide)
    ours = apply_rope(q, k, cos, sin, ids, numerics="hf", impl="triton")
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y[0].transpose(0, 1))


ALL_OPTIONS = LossOptions(softcap=5.0, logit_scale=0.7, label_smoothing=0.1, z_loss=1e-3)
OPTIONS = [pytest.param(LossOptions(), id="plain"), pytest.param(ALL_OPTIONS, id="all options")]


def targets(vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(vocab, (TOTAL,), generator=generator)
    weights = torch.rand(TOTAL, generator=generator)
    drop = torch.rand(TOTAL, generator=generator) < 0.6
    labels[drop], weights[drop] = -100, 0
    return labels.cuda(), weights.cuda()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("vocab", [49_152, 50_257])
def test_masked_cross_entropy_equals_the_reference(vocab, dtype, options):
    labels, weights = targets(vocab)
    edges = sequences_from_lengths(LENGTHS)
    sequences = edges._replace(cu_seqlens=edges.cu_seqlens.cuda())
    for kwargs in ({}, {"sequences": sequences}):
        shared = {"token_weights": weights, "options": options, **kwargs}
        assert_like_reference(
            lambda x, s=shared: masked_cross_entropy(x, labels, impl="triton", **s)[:1],
            lambda x, s=shared: reference.masked_cross_entropy(x, labels, **s)[:1],
            [drawn(TOTAL, vocab, dtype=dtype)],
        )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("given_rows", [True, False])
def test_linear_cross_entropy_equals_the_reference(given_rows, dtype, options):
    labels, weights = targets(4_099)
    rows = supervised_rows(labels.cpu(), weights.cpu()).cuda() if given_rows else None
    tensors = [drawn(TOTAL, 96, dtype=dtype), drawn(4_099, 96, dtype=dtype, seed=3) * 0.1]
    shared = {"token_weights": weights, "options": options}
    assert_like_reference(
        lambda h, w: linear_cross_entropy(h, w, labels, rows=rows, impl="triton", **shared)[:1],
        lambda h, w: reference.linear_cross_entropy(h, w, labels, **shared)[:1],
        tensors,
    )


def test_linear_cross_entropy_is_bit_stable():
    labels, weights = targets(4_099)
    tensors = [drawn(TOTAL, 96, dtype=torch.bfloat16), drawn(4_099, 96, dtype=torch.bfloat16)]

    def run():
        return with_gradients(
            lambda h, w: linear_cross_entropy(h, w, labels, token_weights=weights)[:1], tensors
        )

    for x, y in zip(run(), run(), strict=True):
        assert torch.equal(x, y)


@contextmanager
def no_wait():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_does_not_wait():
    if resolve("attention", None, torch.device("cuda")) in ("sdpa", "reference"):
        pytest.skip("no varlen attention kernel is installed; SDPA per sequence has to wait")
    model = tiny_model(tiny_hf_config(max_position_embeddings=512), torch.bfloat16).cuda()
    batch = collate(random_samples(LENGTHS[1:])).to("cuda")
    for context in (torch.enable_grad, no_wait):  # the first step compiles and makes tables
        with context():
            out = model(batch)
            (out.loss_sum / out.weight_sum).backward()
    with pytest.raises(RuntimeError, match="synchronizing"), no_wait():
        out.loss_sum.item()  # the mode does catch one


def test_a_step_equals_the_cpu():
    """bf16 on the device no further from fp64 than twice bf16 on the CPU, and one rounding."""
    config, batch = (
        tiny_hf_config(max_position_embeddings=512),
        collate(random_samples(LENGTHS[1:])),
    )
    dtypes = (torch.float64, torch.bfloat16)
    high, low = (loss_and_gradients(tiny_model(config, dtype), batch) for dtype in dtypes)
    device = loss_and_gradients(tiny_model(config, torch.bfloat16).cuda(), batch.to("cuda"))
    actual, low, high = (
        torch.cat([x.detach().cpu().double().flatten() for x in (loss, *grads.values())])
        for loss, grads in (device, low, high)
    )
    assert_within_reference_error(actual.bfloat16(), low, high)


OVERFLOWS = {
    "capacity": "sequences_from_position_ids(torch.tensor([0, 0, 0]).cuda(), capacity=2)",
    "max_seqlen": """
        sequences_from_position_ids(torch.arange(5).cuda(), capacity=2, max_seqlen=4)""",
    "position": """
        q, table = torch.ones(2, 1, 16).cuda(), torch.ones(4, 8).cuda()
        q, _ = apply_rope(q, q, table, table, torch.tensor([0, 4]).cuda())""",
    "label": """
        masked_cross_entropy(torch.ones(2, 5).cuda(), torch.tensor([0, 5]).cuda())""",
    "linear label": """
        x = torch.ones(2, 16).cuda()
        linear_cross_entropy(x, torch.ones(5, 16).cuda(), torch.tensor([5, 0]).cuda())""",
}


@pytest.mark.parametrize("what", [*OVERFLOWS, "nothing"])
def test_overflows_fail_on_the_device(what):
    """In a process of its own: a failed assertion ends all work on the device."""
    code = f"""
import torch
from varlen_sft.ops.cross_entropy import linear_cross_entropy, masked_cross_entropy
from varlen_sft.ops.rope import apply_rope
from varlen_sft.ops.sequences import sequences_from_position_ids
{textwrap.dedent(OVERFLOWS.get(what, ""))}
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if what == "nothing":
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr[-2000:]
