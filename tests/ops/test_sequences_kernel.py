"""The CUDA kernel of sequences: thread by thread on the CPU (tests/cuda_on_cpu), and on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from varlen_sft import reference, sequences_from_position_ids

ROOT = Path(__file__).parents[2]
TILE = 2048  # 64 threads with 32 tokens each
FENCE = -7
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, torch finds none"
)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "sequences.so"
    command = [
        compiler,
        "-std=c++20",
        "-O2",
        "-shared",
        "-fPIC",
        "-pthread",
        "-Wno-unknown-pragmas",
    ]
    command += [f"-I{ROOT}/csrc", f"{ROOT}/tests/cuda_on_cpu/sequences.cpp", "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def run(kernel, ids, capacity):
    """cu_seqlens, count, longest; asserts that nothing beyond the capacity was written."""
    outputs = torch.full((capacity + 1 + 8,), FENCE, dtype=torch.int32)
    count, longest = torch.full((2, 1), FENCE, dtype=torch.int32)
    function = kernel.sequences_i32 if ids.dtype == torch.int32 else kernel.sequences_i64
    sizes = [ctypes.c_int64(len(ids)), ctypes.c_int64(capacity)]
    first, *rest = [ctypes.c_void_p(t.data_ptr()) for t in (ids, outputs, count, longest)]
    function(first, *sizes, *rest)
    assert (outputs[capacity + 1 :] == FENCE).all()
    return outputs[: capacity + 1].tolist(), int(count), int(longest)


def packed(lengths, dtype):
    return reference.position_ids_from_lengths(lengths).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [33, 31, 64, 1, 7],
        [TILE - 1, 1, 1],  # an edge on both sides of a tile's end
        [TILE, TILE],
        [1000, 1024, 50, TILE, 1, 1, 900],  # one that spans tiles, warps and words
        [1] * 70 + [2 * TILE + 5] + [2] * 40,
        [1] * (TILE + 40),
    ],
)
def test_the_kernel_equals_the_reference(kernel, lengths, dtype):
    ids = packed(lengths, dtype)
    expected = reference.sequences_from_position_ids(ids)
    ends = expected.cu_seqlens.tolist()
    for capacity in (len(lengths), len(lengths) + 70):
        padding = [len(ids)] * (capacity - len(lengths))
        assert run(kernel, ids, capacity) == (
            ends + padding,
            len(lengths),
            expected.max_seqlen,
        )


def test_beyond_the_capacity_it_counts_but_does_not_write(kernel):
    ids = packed([5, 3, 900, 2, 1500, 4], torch.int64)
    assert run(kernel, ids, 2) == ([0, 5, 8], 6, 1500)


def test_no_tokens(kernel):
    assert run(kernel, torch.zeros(0, dtype=torch.int64), 3) == ([0, 0, 0, 0], 0, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_ids_that_begin_anywhere(kernel, dtype):
    generator = torch.Generator().manual_seed(3)
    jumps = torch.where(torch.rand(2 * TILE + 77, generator=generator) < 0.9, 1, -5)
    ids = (jumps.cumsum(0) + torch.iinfo(dtype).max - 900).to(dtype)[1:]  # wraps; off 16 bytes
    expected = reference.sequences_from_position_ids(ids)
    count = int(expected.num_sequences)
    assert run(kernel, ids, count) == (expected.cu_seqlens.tolist(), count, expected.max_seqlen)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("impl", ["cuda", "reference"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_on_a_device_the_values_are_the_same(impl, dtype):
    # The launched kernel's tile is 32,768 tokens; the ids begin off 16 bytes.
    ids = packed([2, 31, 33, 32768, 5, 40000, 1, 1, 2000], dtype)[1:]
    expected = reference.sequences_from_position_ids(ids)
    ends, count = expected.cu_seqlens.tolist(), int(expected.num_sequences)
    for capacity in (4, count, 40):
        results = torch.ops.varlen_sft.sequences(ids.cuda(), capacity, impl)
        padded = ends + [len(ids)] * (capacity - count)
        assert [result.tolist() for result in results] == [padded[: capacity + 1], count, 40000]
    sequences = sequences_from_position_ids(ids.cuda(), impl=impl)
    assert (sequences.cu_seqlens.tolist(), sequences.max_seqlen) == (ends, 40000)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("impl", ["cuda", "reference"])
def test_on_a_device_nothing_waits_with_a_capacity(impl):
    ids = packed([3, 1, 4], torch.int64).cuda()
    sequences_from_position_ids(ids, capacity=5, impl=impl)  # the first launch loads the kernel
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sequences = sequences_from_position_ids(ids, capacity=5, max_seqlen=4, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sequences.cu_seqlens.tolist() == [0, 3, 4, 8, 8, 8]
