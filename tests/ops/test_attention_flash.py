"""Adapters of other packages' kernels, run on stand-ins that have the packages' own signatures."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers import assert_within_reference_error
from tests.ops.attention_packages import RECORD, Package
from tests.ops.test_attention import make, run
from varlen_sft import reference
from varlen_sft.ops import attention_flash, attention_split
from varlen_sft.ops.attention_flash import flash_attention
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.types import Sequences

IDS = [f"{entry['impl']}-{entry['version'][:8]}" for entry in RECORD]


@pytest.fixture(params=RECORD, ids=IDS)
def package(request, monkeypatch):
    return Package(monkeypatch, request.param)


@pytest.fixture
def flash_attn_2(monkeypatch):
    return Package(monkeypatch, RECORD[0])


def bf16(total, k_total, heads=4, kv_heads=2):
    return make(total, k_total, heads, kv_heads, dtype=torch.bfloat16)


def padded(lengths, capacity):
    sequences = sequences_from_lengths(lengths)
    tail = torch.full((capacity - len(lengths),), sum(lengths), dtype=torch.int32)
    return sequences._replace(cu_seqlens=torch.cat((sequences.cu_seqlens, tail)))


def assert_same(package, tensors, sequences, **kwargs):
    expected = run(reference.varlen_attention, tensors, sequences, softmax_scale=0.3, **kwargs)
    actual = run(package, tensors, sequences, **kwargs)
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)
    assert package.calls


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("window_size", [None, 1, 3, 8, 9])
def test_windows_and_grouped_heads(package, heads, window_size):
    sequences = sequences_from_lengths([5, 1, 9])
    assert_same(package, bf16(15, 15, *heads), sequences, window_size=window_size)


@pytest.mark.parametrize("window_size", [None, 2])
def test_unequal_lengths_and_queries_without_keys(package, window_size):
    sequences, k_sequences = sequences_from_lengths([2, 4]), sequences_from_lengths([6, 2])
    kwargs = {"k_sequences": k_sequences, "window_size": window_size}
    assert_same(package, bf16(6, 8), sequences, **kwargs)


@pytest.mark.parametrize("lengths", [[5, 2], [1, 1, 1]])
def test_pads_of_a_fixed_capacity_are_harmless(package, lengths):
    assert_same(package, bf16(sum(lengths), sum(lengths)), padded(lengths, 6))


def test_softcap_is_used_or_refused(package):
    tensors, sequences = bf16(6, 6), sequences_from_lengths([6])
    if package.impl == "torch_varlen":
        with pytest.raises(ValueError, match="softcap must be None for impl='torch_varlen', got 3"):
            package(*tensors, sequences, softcap=3.0)
        assert attention_flash.refusal("torch_varlen", tensors[0], None) is None
    else:
        assert_same(package, tensors, sequences, softcap=3.0)


def test_nothing_to_attend_to_calls_no_kernel(package):
    q, k, v = bf16(3, 0)
    empty = Sequences(torch.zeros(2, dtype=torch.int32), 0, torch.tensor(0))
    assert (package(q, k, v, sequences_from_lengths([3]), k_sequences=empty) == 0).all()
    q, k, v = bf16(0, 3)
    assert package(q, k, v, sequences_from_lengths([])).shape == (0, 4, 16)
    assert not package.calls


def test_what_no_kernel_takes_is_named(package):
    q, k, v = bf16(6, 6)
    sequences = sequences_from_lengths([6])
    assert attention_flash.refusal("reference", q.float(), 3.0) is None
    with pytest.raises(TypeError, match="q must be float16 or bfloat16 .*, got float32"):
        package(q.float(), k, v, sequences)
    with pytest.raises(ValueError, match="head_dim must be at most 256 .*, got 264"):
        package(q.new_zeros(6, 4, 264), k, v, sequences)
    if package.impl == "flash_attn_2":
        assert_same(package, [x[..., :12] for x in (q, k, v)], sequences)
    else:
        with pytest.raises(ValueError, match="head_dim must be a multiple of 8 .*, got 12"):
            package(q[..., :12], k, v, sequences)
    with pytest.raises(TypeError, match="max_seqlen of sequences must be a Python int.*Tensor"):
        package(q, k, v, sequences._replace(max_seqlen=torch.tensor(6)))
    with pytest.raises(TypeError, match="cu_seqlens of k_sequences must be int32, got int64"):
        wide = sequences._replace(cu_seqlens=sequences.cu_seqlens.long())
        package(q, k, v, sequences, k_sequences=wide)
    with pytest.raises(ValueError, match="must be contiguous on cpu, got strides \\(2,\\)"):
        strided = torch.tensor([0, 9, 6], dtype=torch.int32)[::2]
        package(q, k, v, sequences._replace(cu_seqlens=strided))
    with pytest.raises(ValueError, match="as many sequences as q's, 1, got 2"):
        package(q, k, v, sequences, k_sequences=sequences_from_lengths([3, 3]))


# ------------------------------------------------------------ the split


@pytest.mark.parametrize("lengths", [([5, 1, 9, 3], [5, 1, 9, 3]), ([4, 0, 2, 5], [4, 3, 9, 5])])
def test_a_split_changes_neither_values_nor_gradients(package, monkeypatch, lengths):
    (q_lengths, k_lengths), counts = lengths, []
    sequences, k_sequences = (
        Sequences(reference.sequences_from_lengths(x).cu_seqlens, 9, None) for x in lengths
    )
    tensors = bf16(sum(q_lengths), sum(k_lengths))
    for rows in (10**6, 128 + 9):
        # 4 heads of 16, rounded up to 32
        monkeypatch.setattr(attention_split, "SCRATCH_LIMIT", rows * 4 * 32 + 1)
        package.calls.clear()
        assert_same(package, tensors, sequences, k_sequences=k_sequences, window_size=3)
        counts.append(len(package.calls))
    nonempty = sum(length > 0 for length in q_lengths)
    assert counts == [1, nonempty if package.impl in ("flash_attn_2", "torch_varlen") else 1]


def test_edges_are_read_only_where_the_bound_is_passed(flash_attn_2, monkeypatch):
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(1) or tolist(x))
    q, k, v = bf16(7, 7)
    sequences = padded([5, 2], 6)  # 7 + 6 * 128 rows by what the host knows, 7 + 2 * 128 in truth
    for rows, gradient, expected in (
        (775, True, (0, 7)), (774, False, (0, 7)), (774, True, (1, 3))
    ):  # fmt: skip
        monkeypatch.setattr(attention_split, "SCRATCH_LIMIT", rows * 4 * 32 + 1)
        monkeypatch.setattr(reference, "varlen_attention", lambda q, *_, **__: q)
        reads.clear()
        flash_attn_2(q.requires_grad_(gradient), k, v, sequences)
        assert (len(reads), len(flash_attn_2.calls.pop()["cu_seqlens_q"])) == expected
        assert not flash_attn_2.calls  # the pads went, and with them the need for a second call
    with pytest.raises(ValueError, match="must cover all 7 tokens, got cu_seqlens ending at 6"):
        flash_attn_2(q, k, v, padded([5, 1], 6))


# ------------------------------------------------------- the packages themselves


def test_torch_varlen_waits_for_nothing_and_keeps_shapes():
    with FakeTensorMode():
        q, k, v = (torch.empty(9, h, 64, dtype=torch.bfloat16) for h in (4, 2, 2))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        sequences = Sequences(cu_seqlens, 5, torch.empty((), dtype=torch.int32))
        out = flash_attention("torch_varlen", *leaves, sequences, softmax_scale=0.1, window_size=3)
        out.float().sum().backward()
    assert [x.grad.shape for x in leaves] == [(9, 4, 64), (9, 2, 64), (9, 2, 64)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_varlen_compiles_to_its_one_op(dynamic):
    graphs = []

    def record(module, inputs):
        graphs.append(module.graph)
        return lambda *_: (torch.zeros(()),)

    def attend(q, k, v, cu_seqlens):
        sequences = Sequences(cu_seqlens, 5, None)
        return flash_attention("torch_varlen", q, k, v, sequences, softmax_scale=0.1)

    leaves = [x.requires_grad_() for x in bf16(9, 9)]
    compiled = torch.compile(attend, fullgraph=True, backend=record, dynamic=dynamic)
    compiled(*leaves, torch.tensor([0, 4, 9], dtype=torch.int32))
    (graph,) = graphs
    calls = [str(node.target) for node in graph.nodes if node.op.startswith("call")]
    assert [call for call in calls if "getitem" not in call] == ["torch_attn._varlen_attn"]


def test_an_absent_package_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for impl in ("flash_attn_2", "flash_attn_3", "flash_attn_4"):
        monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
        package = impl.replace("_", "-").removesuffix("-2")
        assert attention_flash.missing(impl) == f"{package} is not installed"
    folder = tmp_path / "flash_attn"
    (folder / "cute").mkdir(parents=True)  # as flash-attn 4 alone leaves it
    for name in ("flash_attn/cute/interface.py", "cutlass.py", "flash_attn_2_cuda.py"):
        (tmp_path / name).touch()
    importlib.invalidate_caches()
    assert attention_flash.missing("flash_attn_4") == ""
    assert attention_flash.missing("flash_attn_2") == "flash-attn is not installed"
    (folder / "flash_attn_interface.py").touch()
    assert attention_flash.missing("flash_attn_2") == ""


@pytest.mark.parametrize(("built", "word"), [(True, ""), (False, "without FlashAttention")])
def test_a_torch_without_the_kernel_is_told(monkeypatch, built, word):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    assert attention_flash.missing("torch_varlen").endswith(word)
    assert bool(attention_flash.missing("torch_varlen")) is not built


@pytest.mark.gpu
@pytest.mark.parametrize("impl", attention_flash.IMPLS)
@pytest.mark.parametrize("kwargs", [{}, {"window_size": 7}, {"softcap": 5.0}])
def test_installed_packages_equal_the_reference(impl, kwargs):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if attention_flash.missing(impl):
        pytest.skip(attention_flash.missing(impl))
    lengths, k_lengths = [1, 130, 64, 7, 300], [3, 130, 70, 2, 310]  # 7 queries, 2 keys
    low = [x.cuda() for x in make(sum(lengths), sum(k_lengths), 6, 2, 64, torch.bfloat16)]
    if error := attention_flash.refusal(impl, low[0], kwargs.get("softcap")):
        pytest.skip(str(error))
    sequences, k_sequences = (
        padded(x, 8)._replace(cu_seqlens=padded(x, 8).cu_seqlens.cuda())
        for x in (lengths, k_lengths)
    )
    kwargs = {**kwargs, "k_sequences": k_sequences, "softmax_scale": 0.125}
    actual = run(lambda *a, **kw: flash_attention(impl, *a, **kw), low, sequences, **kwargs)
    eager = run(reference.varlen_attention, low, sequences, **kwargs)
    exact = run(reference.varlen_attention, [x.double() for x in low], sequences, **kwargs)
    # Gradients as one vector: where a query sees one key those of q and k are noise around 0.
    for part in (slice(0, 1), slice(1, None)):
        joined = (torch.cat([x.flatten() for x in xs[part]]) for xs in (actual, eager, exact))
        assert_within_reference_error(*joined)
