"""The CUDA kernels of sequences: thread by thread on the CPU (tests/cuda_on_cpu), and on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from varlen_sft import reference, sequences_from_position_ids

ROOT = Path(__file__).parents[2]
TILE = 2048  # 64 threads with 32 tokens each; tiles of two launches may be several of these
ONE_LAUNCH, PLENTY = 0, 1024  # how many tiles there may be; 1024 is what the launched kernels take
FENCE = -7
POISON = 2**31 - 1  # no maximum gets rid of it
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


def cut(kernel, total, threads, most):
    """Tiles, and rounds of each: how two launches divide a pack."""
    tiles, rounds = ctypes.c_int(), ctypes.c_int()
    kernel.cut(ctypes.c_int64(total), threads, most, ctypes.byref(tiles), ctypes.byref(rounds))
    return tiles.value, rounds.value


def run(kernel, ids, capacity, most):
    """cu_seqlens, count, longest; asserts that nothing beyond the capacity or the scratch was
    written. ``most`` tiles, or ONE_LAUNCH."""
    tiles, rounds = cut(kernel, len(ids), 64, most) if most else (0, 0)
    scratch_size = tiles * (2 + rounds * 64)
    outputs = torch.full((capacity + 1 + 8,), FENCE, dtype=torch.int32)
    scratch = torch.full((scratch_size + 64,), FENCE, dtype=torch.int32)  # a round more
    count, longest = torch.full((2, 1), POISON, dtype=torch.int32)
    function = kernel.sequences_i32 if ids.dtype == torch.int32 else kernel.sequences_i64
    sizes = [ctypes.c_int64(len(ids)), ctypes.c_int64(capacity), ctypes.c_int(most)]
    first, *rest = [ctypes.c_void_p(t.data_ptr()) for t in (ids, scratch, outputs, count, longest)]
    function(first, *sizes, *rest)
    assert (outputs[capacity + 1 :] == FENCE).all() and (scratch[scratch_size:] == FENCE).all()
    return outputs[: capacity + 1].tolist(), int(count), int(longest)


def packed(lengths, dtype):
    return reference.position_ids_from_lengths(lengths).to(dtype)


# One launch; two with a tile for each round; two with tiles of several rounds.
@pytest.mark.parametrize("most", [ONE_LAUNCH, PLENTY, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [33, 31, 64, 1, 7],
        [TILE - 1, 1, 1],  # an edge on both sides of a tile's end
        [TILE] * 3,  # a start is the first token of every tile
        [TILE - 1, TILE, 5],  # and the last one
        [1000, 1024, 50, TILE, 1, 1, 900],  # one that spans tiles, warps and words
        [1] * 70 + [4 * TILE + 5] + [2] * 40,  # whole tiles without a start
        [1] * (TILE + 40),
        [5 * TILE + 1],
    ],
)
def test_the_kernel_equals_the_reference(kernel, lengths, dtype, most):
    ids = packed(lengths, dtype)
    expected = reference.sequences_from_position_ids(ids)
    ends = expected.cu_seqlens.tolist()
    for capacity in (len(lengths), len(lengths) + 70):
        padding = [len(ids)] * (capacity - len(lengths))
        assert run(kernel, ids, capacity, most) == (
            ends + padding,
            len(lengths),
            expected.max_seqlen,
        )


@pytest.mark.parametrize("most", [ONE_LAUNCH, PLENTY, 2])
def test_beyond_the_capacity_it_counts_but_does_not_write(kernel, most):
    # The capacity ends in the first tile; the longest begins in the second and ends in the last.
    ids = packed([5, 3, 900, 2, 1500, 4, 2 * TILE, 4], torch.int64)
    assert run(kernel, ids, 2, most) == ([0, 5, 8], 8, 2 * TILE)


def test_no_tokens(kernel):
    assert run(kernel, torch.zeros(0, dtype=torch.int64), 3, ONE_LAUNCH) == ([0, 0, 0, 0], 0, 0)


@pytest.mark.parametrize("pads", [0, 1, 64 * 3 + 5])
def test_all_blocks_pad_behind_the_last_sequence_of_all(kernel, pads):
    lengths = [3, TILE, 2, TILE + 9, 1, 1]
    capacity = len(lengths) + pads
    ends = torch.tensor(lengths).cumsum(0).tolist()
    expected = [0, *ends, *[sum(lengths)] * pads]
    assert run(kernel, packed(lengths, torch.int64), capacity, PLENTY)[0] == expected


def test_runs_of_more_tiles_than_a_block_has_threads(kernel):
    lengths = [TILE // 2] * 2 * 66 + [7]
    ids = packed(lengths, torch.int32)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    assert cut(kernel, len(ids), 64, PLENTY) == (67, 1)
    assert run(kernel, ids, 140, PLENTY) == ([0, *ends, *[len(ids)] * 7], 133, TILE // 2)


@pytest.mark.parametrize("most", [1, 2, 3, 1024])
@pytest.mark.parametrize("rounds", [1, 2, 3, 1023, 1024, 1025, 4097, 2**18])
def test_tiles_cover_the_pack_and_none_is_empty(kernel, most, rounds):
    for total in (rounds * 8192 - 8191, rounds * 8192):  # up to 2^31
        tiles, per_tile = cut(kernel, total, 256, most)
        assert 1 <= tiles <= most
        assert (tiles - 1) * per_tile < rounds <= tiles * per_tile
        assert per_tile == -(-rounds // most)


@pytest.mark.parametrize("most", [ONE_LAUNCH, PLENTY, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_ids_that_begin_anywhere(kernel, dtype, most):
    generator = torch.Generator().manual_seed(3)
    jumps = torch.where(torch.rand(4 * TILE + 77, generator=generator) < 0.9, 1, -5)
    ids = (jumps.cumsum(0) + torch.iinfo(dtype).max - 900).to(dtype)[1:]  # wraps; off 16 bytes
    expected = reference.sequences_from_position_ids(ids)
    count = int(expected.num_sequences)
    result = run(kernel, ids, count, most)
    assert result == (expected.cu_seqlens.tolist(), count, expected.max_seqlen)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("impl", ["cuda", "reference"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "lengths",
    [
        [3],  # behind the id that is cut off
        [2, 31, 33, 32768 - 65],  # up to 32,768 tokens are one launch
        [2, 31, 33, 32768 - 64],
        [2, 31, 33, 32768, 5, 40000, 1, 1, 2000],
        [8193, 8192, 8191, 1, 1, *[70] * 2000, 120_000, *[1] * 9000],  # tiles are 8192 tokens
        [9_000_000, 3, 4],  # and here two rounds of them, since 1024 tiles would not do
    ],
)
def test_on_a_device_the_values_are_the_same(impl, dtype, lengths):
    ids = packed(lengths, dtype)[1:]  # begins off 16 bytes
    expected = reference.sequences_from_position_ids(ids)
    ends, count = expected.cu_seqlens.tolist(), int(expected.num_sequences)
    for capacity in (1, count, count + 3000):
        results = torch.ops.varlen_sft.sequences(ids.cuda(), capacity, impl)
        padded = ends + [len(ids)] * (capacity - count)
        found = [result.tolist() for result in results]
        assert found == [padded[: capacity + 1], count, expected.max_seqlen]
    sequences = sequences_from_position_ids(ids.cuda(), impl=impl)
    assert (sequences.cu_seqlens.tolist(), sequences.max_seqlen) == (ends, expected.max_seqlen)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_on_a_device_calls_leave_nothing_behind(dtype):
    """A shorter longest after a longer one, in scratch that is reused, with blocks in any order."""
    generator = torch.Generator().manual_seed(5)
    for top in (3000, 30, 300) * 4:
        lengths = torch.randint(1, top, (600_000 // top,), generator=generator).tolist()
        ids = packed(lengths, dtype)
        results = torch.ops.varlen_sft.sequences(ids.cuda(), len(lengths), "cuda")
        ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        assert [result.tolist() for result in results] == [ends, len(lengths), max(lengths)]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("impl", ["cuda", "reference"])
@pytest.mark.parametrize("longest", [4, 300_000])  # one launch, and two
def test_on_a_device_nothing_waits_with_a_capacity(impl, longest):
    ids = packed([3, 1, longest], torch.int64).cuda()
    sequences_from_position_ids(ids, capacity=5, impl=impl)  # the first launch loads the kernel
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sequences = sequences_from_position_ids(ids, capacity=5, max_seqlen=longest, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sequences.cu_seqlens.tolist() == [0, 3, 4, *[4 + longest] * 3]
