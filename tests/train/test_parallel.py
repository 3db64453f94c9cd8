"""One rank or several, DDP or FSDP2, whatever the accumulation: one and the same training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers import tiny_hf_config, tiny_model
from tests.train.ranks import on_ranks
from tests.train.runs import EPS, many, stream, summed, whole_blocks
from varlen_sft.data.batch import collate
from varlen_sft.train.distributed import World
from varlen_sft.train.loop import mean_loss
from varlen_sft.train.parallel import blocks, shard

STEPS, LR = 5, 1e-2
CLIPPED = {"steps": STEPS, "max_norm": 2.0, "blank": 3}
FREE = {"steps": STEPS, "blank": 3}
BF16 = {"dtype": torch.bfloat16, "steps": STEPS}


@pytest.fixture(scope="module")
def runs():
    """Of each number of ranks, what every rank got in four runs."""
    cases = {}
    for ranks, other in ((1, "ddp"), (2, "ddp"), (4, "fsdp")):
        each = [((other, 4 // ranks), FREE), (("fsdp", 4 // ranks), CLIPPED),
                (("fsdp", 4 // ranks), BF16), (("zero2", 4 // ranks), CLIPPED)]  # fmt: skip
        cases[ranks] = [many(each)] if ranks == 1 else on_ranks(ranks, many, each)
    return cases


@pytest.mark.parametrize("case", [0, 1, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_norms_and_weights_do_not_depend_on_ranks_and_accumulation(runs, ranks, case):
    """In fp64: 1e-10 is the package's promise for losses and gradients of one step. An update is
    lr * m / (sqrt(v) + eps), so that an error d of a gradient moves a weight by lr * d / eps at
    most in each step; the optimiser's own scale is fp32, of one rounding."""
    one = runs[1][0][case]
    for rank in runs[ranks]:
        other = rank[case]
        assert other["ended"] == "finished" and len(other["records"]) == STEPS
        for a, b in zip(other["records"], one["records"], strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-10)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-10)
            same = ("lr", "real_tokens", "supervised_tokens", "sequences", "squares", "weight")
            for name in (*same, "fill", "epoch", "updated"):
                assert getattr(a, name) == getattr(b, name), name
            assert list(a.role_loss) == list(b.role_loss) == ["user", "assistant"] * a.updated
            assert a.role_loss == pytest.approx(b.role_loss, rel=1e-10)
            if a.updated:
                assert a.stop_loss == pytest.approx(b.stop_loss, rel=1e-10)
            else:
                assert a.stop_loss is b.stop_loss is None
        largest = max(record.grad_norm for record in one["records"])
        allowed = STEPS * LR * (1e-10 * largest / EPS + 2**-23)
        for kind in ("weights", "exp_avg"):
            assert other[kind].keys() == one[kind].keys()
            for name, value in one[kind].items():
                assert (other[kind][name] - value).abs().max() <= allowed, name
        assert other["valid"] == pytest.approx(one["valid"], rel=1e-6)
        assert other["position"] == one["position"]


def test_one_rank_is_what_plain_torch_does(runs):
    """In fp64: the mean over all samples of the step in one pack, backward, AdamW. Unclipped, the
    loop divides gradients by a weight that fp32 holds, so that only sums are of another order."""
    records = runs[1][0][0]["records"]
    model = tiny_model(tiny_hf_config(tie_word_embeddings=True))
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == is_matrix]
                         for is_matrix in (True, False))  # fmt: skip
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=EPS)
    data = stream(World(), 4)
    for step, record in zip(data, records, strict=False):
        if not record.updated:
            continue
        samples = [data.sources.sample(i) for ids in step.packs for i in ids.tolist()]
        for group in adamw.param_groups:
            group["lr"] = record.lr
        loss = mean_loss([model(collate(samples))])
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        adamw.step()
        adamw.zero_grad()
        assert record.loss == pytest.approx(loss.item(), rel=1e-10)
        assert record.grad_norm == pytest.approx(norm.item(), rel=1e-10)
        supervised = sum(int((s.token_weights[1:] > 0).sum()) for s in samples)
        assert record.supervised_tokens == supervised
    largest = max(record.grad_norm for record in records)
    for name, value in model.state_dict().items():
        off = (value - runs[1][0][0]["weights"][name]).abs().max()
        assert off <= STEPS * LR * 1e-10 * largest / EPS, name


def test_ranks_end_with_the_same_bits(runs):
    for ranks in (2, 4):
        first, *others = runs[ranks]
        for case in range(3):
            for other in others:
                for name, value in first[case]["weights"].items():
                    assert torch.equal(value, other[case]["weights"][name])


def test_a_step_without_any_weight_updates_nothing_and_is_counted(runs):
    for ranks in (1, 2, 4):
        for rank in runs[ranks]:
            blank = rank[0]["records"][2]
            assert (blank.loss, blank.grad_norm, blank.weight) == (0, 0, 0) and not blank.updated
            assert rank[0]["state"].skipped_steps == 1 and rank[0]["state"].step == STEPS
            assert (rank[0]["updates"] == STEPS - 1).all()


def test_the_runs_differ_where_they_should(runs):
    """The clipped run is clipped, training lowers the loss, and some norms exceed the limit."""
    free, clipped, *_ = runs[1][0]
    assert min(record.grad_norm for record in clipped["records"] if record.updated) > 2.0
    name = "layers.0.mlp.down_proj.weight"
    assert (free["weights"][name] - clipped["weights"][name]).abs().max() > 1e-4
    assert free["records"][-1].loss < 0.9 * free["records"][0].loss


def test_fp32_copies_of_bf16_shards_collect_what_the_weights_cannot_hold(runs):
    for ranks in (1, 2, 4):
        for rank in runs[ranks]:
            weights, masters = rank[2]["weights"], rank[2]["masters"]
            collected = 0
            for name, master in masters.items():
                assert master.dtype == torch.float32 and weights[name].dtype == torch.bfloat16
                assert torch.equal(master.bfloat16(), weights[name])
                collected += int((master != weights[name].float()).sum())
            assert collected > sum(master.numel() for master in masters.values()) / 2
            for a, b in zip(rank[2]["records"], runs[1][0][2]["records"], strict=True):
                assert a.loss == pytest.approx(b.loss, rel=2**-7)  # of a bf16 forward


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_gradients_of_ranks_and_micro_batches_add_up_in_fp32(strategy):
    """1 + 2^-9 + 2^-9 + 2^-8 fits bf16; added up in bf16 it is 1, or 1 + 2^-8 rounded to 1."""
    xs = [[1.0, 2**-9, 2**-9], [0.0, 0.0, 2**-8]]
    assert on_ranks(2, summed, strategy, xs) == [1 + 2**-7] * 2


def test_what_is_whole_between_micro_batches_and_after_them():
    """Blocks after the forward, the backward and another micro-batch, the step, a validation."""
    kept = {strategy: on_ranks(2, whole_blocks, strategy) for strategy in ("fsdp", "zero2")}
    assert kept["fsdp"] == [[False] * 5] * 2
    assert kept["zero2"] == [[True, True, True, False, False]] * 2


def test_gradients_of_micro_batches_add_up_in_fp32_alone():
    assert summed("ddp", [[1.0, 2**-9, 2**-9, 2**-8]]) == 1 + 2**-7


def test_blocks_are_the_list_of_one_class_that_holds_most():
    def block() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(5))})

    model = nn.ModuleDict(
        {
            "heads": nn.ModuleList([nn.Linear(9, 9), nn.ReLU(), nn.ReLU()]),
            "layers": nn.ModuleList([block(), block()]),
            "last": nn.ModuleList([nn.Linear(2, 2)]),
        }
    )
    assert blocks(model) is model["layers"]
    with pytest.raises(ValueError, match="Linear must hold its blocks in a ModuleList"):
        blocks(nn.Linear(2, 2))


def test_alone_nothing_is_sharded():
    model = nn.Linear(2, 2)
    before = model.weight
    shard(model, World())
    assert model.weight is before
