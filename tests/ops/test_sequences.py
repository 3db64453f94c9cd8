from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varlen_sft import _extension, reference
from varlen_sft.ops.backends import backends
from varlen_sft.ops.sequences import (
    cu_seqlens_from_position_ids,
    sequences_from_lengths,
    sequences_from_position_ids,
)

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)
WORD, TILE = 32, 16384  # tokens that the C++ kernel takes together
needs_extension = pytest.mark.skipif(not _extension.load(), reason=_extension.status())
IMPLS = ["reference", pytest.param("cpp", marks=needs_extension)]


@st.composite
def drawn_ids(draw):
    """(T,) ids of either dtype: packs, chunks that begin anywhere, or any integers at all."""
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    info = torch.iinfo(dtype)
    lengths = st.lists(st.one_of(st.integers(1, 5), st.integers(60, 70)), max_size=20)
    ids = []
    for length in draw(lengths):
        start = draw(st.sampled_from([0, 0, 0, 7, -3, info.max - 2, info.min]))
        ids += [
            (start + i - info.min) % (info.max - info.min + 1) + info.min for i in range(length)
        ]
    ids += draw(st.lists(st.integers(info.min, info.max), max_size=5))
    stride = draw(st.integers(1, 3))
    spread = torch.zeros(len(ids) * stride, dtype=dtype)[::stride]
    spread[:] = torch.tensor(ids, dtype=dtype)
    return spread


def expected_sequences(ids, capacity):
    """cu_seqlens, count and longest of the op, made of the specification's."""
    true = reference.sequences_from_position_ids(ids)
    count = int(true.num_sequences)
    ends = true.cu_seqlens.tolist() + [len(ids)] * max(0, capacity - count)
    return ends[: capacity + 1], count, true.max_seqlen


def op(ids, capacity, impl):
    results = torch.ops.varlen_sft.sequences(ids, capacity, impl)
    assert all(result.dtype == torch.int32 for result in results)
    return tuple(result.tolist() for result in results)


def test_lengths_give_the_values_that_flash_attention_takes():
    sequences = sequences_from_lengths([3, 1, 4])
    assert sequences.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert sequences.cu_seqlens.dtype == torch.int32
    assert type(sequences.max_seqlen) is int and sequences.max_seqlen == 4
    assert int(sequences.num_sequences) == 3


@settings(deadline=None)  # the first call of an op imports much
@given(LENGTHS)
def test_position_ids_made_from_lengths_give_the_lengths_back(lengths):
    cu_seqlens, longest = cu_seqlens_from_position_ids(reference.position_ids_from_lengths(lengths))
    assert cu_seqlens.diff().tolist() == lengths
    assert longest == max(lengths)


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 5))
def test_a_fixed_capacity_pads_with_the_total(lengths, spare):
    position_ids = reference.position_ids_from_lengths(lengths)
    capacity = len(lengths) + spare
    sequences = sequences_from_position_ids(position_ids, capacity=capacity)
    total = sum(lengths)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    assert sequences.cu_seqlens.tolist() == [0, *ends, *[total] * spare]
    assert sequences.max_seqlen == max(lengths)
    assert int(sequences.num_sequences) == len(lengths)


@pytest.mark.parametrize(
    ("position_ids", "ends"),
    [
        ([5, 6, 7, 0, 1, 2], [0, 3, 6]),  # a leading chunk that does not start at 0
        ([0, 1, 2, 7, 8], [0, 3, 5]),  # a jump is an edge
        ([3, 2, 1], [0, 1, 2, 3]),
        ([0, 0, 0], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [0, 4]),  # a continued count cannot be told apart: documented
        ([4], [0, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_one_rule(position_ids, ends, dtype):
    ids = torch.tensor(position_ids, dtype=dtype)
    assert cu_seqlens_from_position_ids(ids)[0].tolist() == ends
    assert sequences_from_position_ids(ids, capacity=8).cu_seqlens.tolist() == (
        ends + [len(ids)] * (9 - len(ends))
    )


def test_no_tokens_are_no_sequences():
    empty = torch.zeros(0, dtype=torch.int64)
    assert sequences_from_position_ids(empty, capacity=2).cu_seqlens.tolist() == [0, 0, 0]
    assert sequences_from_position_ids(empty).cu_seqlens.tolist() == [0]


def test_errors_name_the_argument_and_what_came():
    ids = torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match=r"lengths must be at least 1, got 0 at index 1"):
        sequences_from_lengths([3, 0])
    with pytest.raises(ValueError, match=r"less than 2\^31 tokens, got 2147483648"):
        sequences_from_lengths([2**31])
    with pytest.raises(ValueError, match=r"capacity must hold every sequence, got 1 for 2"):
        sequences_from_position_ids(ids, capacity=1)
    with pytest.raises(ValueError, match=r"max_seqlen must be at least .* 2, got 1"):
        sequences_from_position_ids(ids, max_seqlen=1)
    with pytest.raises(ValueError, match=r"max_seqlen must be at least .* 2, got 1"):
        sequences_from_position_ids(ids, capacity=4, max_seqlen=1)
    with pytest.raises(TypeError, match=r"position_ids must be int32 or int64, got float32"):
        sequences_from_position_ids(ids.float())
    with pytest.raises(ValueError, match=r"position_ids must have shape \(T\), got \(1, 3\)"):
        sequences_from_position_ids(ids[None])
    with pytest.raises(ValueError, match=r"must have less than 2\^31 tokens, got 2147483648"):
        sequences_from_position_ids(torch.zeros(1, dtype=torch.int32).expand(2**31))
    with pytest.raises(ValueError, match=r"impl='cuda' runs on cuda, got tensors on cpu"):
        sequences_from_position_ids(ids, impl="cuda")
    with pytest.raises(ValueError, match=r"one of cuda, cpp, reference, got 'triton'"):
        sequences_from_position_ids(ids, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
@settings(deadline=None)
@given(drawn_ids(), st.integers(-3, 3))
def test_every_implementation_gives_the_values_of_the_reference(impl, ids, spare):
    """A capacity that is exact, larger or too small; nothing is merged when it is too small."""
    capacity = max(1, int(reference.sequences_from_position_ids(ids).num_sequences) + spare)
    assert op(ids, capacity, impl) == expected_sequences(ids, capacity)


@pytest.mark.parametrize("impl", IMPLS)
@settings(deadline=None)
@given(drawn_ids())
def test_without_a_capacity_the_size_is_the_true_one(impl, ids):
    true = reference.sequences_from_position_ids(ids)
    sequences = sequences_from_position_ids(ids, impl=impl)
    assert sequences.cu_seqlens.tolist() == true.cu_seqlens.tolist()
    assert sequences.cu_seqlens.untyped_storage().nbytes() == 4 * len(true.cu_seqlens)
    assert sequences.max_seqlen == true.max_seqlen and type(sequences.max_seqlen) is int
    assert int(sequences.num_sequences) == int(true.num_sequences)


@needs_extension
@pytest.mark.parametrize("total", [WORD - 1, WORD, WORD + 1, TILE - 1, TILE, TILE + 1, 3 * TILE])
@pytest.mark.parametrize("length", [1, WORD, 1000, TILE, 2 * TILE])
def test_sequences_that_end_around_words_and_tiles(total, length):
    lengths = [length] * (total // length) + [total % length] * (total % length > 0)
    ids = reference.position_ids_from_lengths(lengths)
    for same in (ids, ids.int()):
        assert op(same, len(lengths) + 1, "cpp") == expected_sequences(same, len(lengths) + 1)


@needs_extension
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 3000, (100,), generator=generator).tolist()
    ids = reference.position_ids_from_lengths(lengths)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert op(ids, 120, "cpp") == expected_sequences(ids, 120)
    finally:
        torch.set_num_threads(before)


@needs_extension
def test_the_cpp_op_refuses_outputs_that_do_not_fit():
    def call(ids, size=4, dtype=torch.int32, scalar=()):
        cu_seqlens = torch.zeros(size, dtype=dtype)
        count, longest = torch.zeros(scalar, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
        torch.ops.varlen_sft_c.sequences(cu_seqlens, count, longest, ids)

    ids = torch.tensor([0, 1, 0])
    with pytest.raises(RuntimeError, match=r"position_ids must be contiguous"):
        call(torch.zeros(6, dtype=torch.int64)[::2])
    with pytest.raises(RuntimeError, match=r"position_ids must have dtype Long, got Float"):
        call(ids.float())
    with pytest.raises(RuntimeError, match=r"fewer than 2\^31 tokens|contiguous"):
        call(torch.zeros(1, dtype=torch.int32).expand(2**31))
    with pytest.raises(RuntimeError, match=r"capacity \+ 1 >= 2 entries, got 1"):
        call(ids, size=1)
    with pytest.raises(RuntimeError, match=r"cu_seqlens must have dtype Int, got Long"):
        call(ids, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"count must have shape \(\), got \(1\)"):
        call(ids, scalar=(1,))


def test_what_would_run_and_why_not():
    on_cpu, on_cuda = dict(backends("cpu")["sequences"]), dict(backends("cuda")["sequences"])
    assert on_cpu["cuda"] == "runs on cuda only"
    if _extension.load():
        assert on_cpu["cpp"] == "picked" and on_cpu["reference"] == "available"
        if torch.version.cuda is None:
            assert "built without CUDA kernels: torch" in on_cuda["cuda"]
            assert on_cuda["reference"] == "picked"


@pytest.mark.parametrize("impl", IMPLS)
def test_op_registration(impl):
    ids = reference.position_ids_from_lengths([3, 1, 4])
    torch.library.opcheck(torch.ops.varlen_sft.sequences, (ids, 6, impl))
    torch.library.opcheck(torch.ops.varlen_sft.sequences, (ids.int()[::2], 6, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_op_compiles_whole(impl):
    def ends(ids):
        cu_seqlens, count, longest = torch.ops.varlen_sft.sequences(ids, 4, impl)
        return cu_seqlens + 0 * longest, count

    ids = reference.position_ids_from_lengths([3, 1, 4])
    cu_seqlens, count = torch.compile(ends, fullgraph=True, backend="aot_eager")(ids)
    assert cu_seqlens.tolist() == [0, 3, 4, 8, 8] and int(count) == 3


def test_a_fixed_capacity_is_traced_without_a_data_dependent_op():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        ids = mode.from_tensor(torch.arange(7))
        cu_seqlens, count, longest = torch.ops.varlen_sft.sequences(ids, 4, "reference")
    assert cu_seqlens.shape == (5,) and count.shape == () and longest.shape == ()
