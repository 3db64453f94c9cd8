from __future__ import annotations

import itertools
import math
import time

import pytest
import torch

from tests.helpers import random_samples, tiny_hf_config, tiny_model
from tests.train.runs import build, stream
from varlen_sft.data.batch import STOP, collate, target_roles
from varlen_sft.data.costs import ModelSizes
from varlen_sft.data.sample import ROLES
from varlen_sft.models.config import LlamaConfig
from varlen_sft.train.distributed import World
from varlen_sft.train.flops import StepWork, naive_flops, step_flops
from varlen_sft.train.in_memory import endless_packs, evaluate, train
from varlen_sft.train.loop import Loop, NotFinite
from varlen_sft.train.memory import peak_memory
from varlen_sft.train.optimizer import MasterAdamW
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.parallel import Parallel
from varlen_sft.train.schedule import cosine_with_warmup
from varlen_sft.train.state import StepRecord, TrainState


def test_every_sample_once_per_epoch_and_another_order_in_the_next():
    samples = random_samples([5, 9, 3, 7, 7, 2, 6, 9])
    stream = endless_packs(samples, max_tokens=12, seed=0)
    epochs = []
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < len(samples):
            pack = next(stream)
            assert sum(len(s) - 1 for s in pack) <= 12
            seen += [next(i for i, s in enumerate(samples) if s is one) for one in pack]
        assert sorted(seen) == list(range(len(samples)))
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    again = endless_packs(samples, max_tokens=12, seed=0)
    first = [id(s) for p in itertools.islice(again, 3) for s in p]
    repeat = endless_packs(samples, max_tokens=12, seed=0)
    assert first == [id(s) for p in itertools.islice(repeat, 3) for s in p]


@torch.no_grad()
def test_evaluation_is_a_sum_over_a_sum_not_a_mean_of_means():
    model = tiny_model(tiny_hf_config())
    samples = random_samples([30, 4, 9])
    one = model(collate(samples))
    expected = float(one.loss_sum / one.weight_sum)
    apart = evaluate(model, [[samples[0]], samples[1:]])
    assert math.isclose(apart, expected, rel_tol=1e-6)
    means = [float((o := model(collate(p))).loss_sum / o.weight_sum)
             for p in ([samples[0]], samples[1:])]  # fmt: skip
    assert not math.isclose(sum(means) / 2, expected, rel_tol=1e-3)


def test_training_lowers_the_loss_and_records_every_step():
    model = tiny_model(tiny_hf_config(), torch.float32)
    samples = random_samples([20, 30, 12], fractional=False)
    seen = []
    records = train(
        model, itertools.repeat(samples, 100), TrainOptions(max_steps=12, lr=1e-2),
        max_tokens=64, on_step=seen.append,
    )  # fmt: skip
    assert [r.step for r in records] == list(range(1, 13)) and seen == records
    assert records[-1].loss < 0.5 * records[0].loss
    batch = collate(samples)
    assert records[0].real_tokens == 59 and records[0].fill == 59 / 64
    assert records[0].supervised_tokens == batch.supervised_tokens
    assert records[-1].seconds_left == 0


def test_a_loss_that_is_not_finite_stops_before_the_update():
    model = tiny_model(tiny_hf_config(), torch.float32)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    before = model.lm_head.weight.clone()
    with pytest.raises(NotFinite, match="the loss is nan"):
        train(model, [random_samples([9])], TrainOptions(max_steps=1), max_tokens=9)
    assert torch.equal(before, model.lm_head.weight)


def test_bf16_weights_collect_updates_that_are_below_their_rounding():
    layer = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(layer.weight)
    optimizer = MasterAdamW(layer)
    for _ in range(100):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step(lr=1e-4, max_grad_norm=1e9)
    # AdamW's step is lr for a steady gradient: 100 steps of 1e-4 on a grid of 1/256.
    expected = torch.tensor(1 - 100 * 1e-4).bfloat16()
    assert (layer.weight == expected).all()
    assert layer.weight.grad is None


def test_fp32_training_is_torch_adamw_with_clipping():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = MasterAdamW(ours, weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1},
         {"params": [theirs.bias], "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95),
    )  # fmt: skip
    for _ in range(3):
        x = torch.randn(5, 4)
        for layer in (ours, theirs):
            layer.zero_grad()
            layer(x).square().sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adamw.step()
        assert torch.allclose(optimizer.step(1e-2, 0.5), norm)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_the_schedule_rises_and_falls():
    assert cosine_with_warmup(0.05) == 0.5
    assert cosine_with_warmup(0.1) == 1.0
    assert math.isclose(cosine_with_warmup(0.55), 0.55)
    assert math.isclose(cosine_with_warmup(1.0), 0.1)
    assert 0 < cosine_with_warmup(0.0) < 0.02


def test_options_end_a_run_by_steps_or_seconds():
    both = TrainOptions(max_steps=10, max_seconds=100)
    assert both.progress(5, 20) == 0.5 and both.progress(1, 80) == 0.8
    assert TrainOptions(max_seconds=10).progress(1000, 20) == 1.0
    with pytest.raises(ValueError, match="max_steps or max_seconds must be given"):
        TrainOptions()
    with pytest.raises(ValueError, match="lr must be positive, got 0"):
        TrainOptions(max_steps=1, lr=0)


# ------------------------------------------------------------------- the loop itself


def loop_of(steps: int = 6, max_norm: float = 1.0, score=None) -> Loop:
    options = TrainOptions(max_steps=steps, lr=1e-2, max_grad_norm=max_norm)
    return build(World(), "ddp", torch.float32, options, score)


def test_records_come_one_step_late_and_all_of_them_before_an_action():
    seen: list[str] = []
    loop = loop_of()
    data = stream(World(), 4)

    def steps():
        for number, step in enumerate(data, 1):
            seen.append(f"asked {number}")
            yield step

    def act(state):
        assert data.state_dict()["epoch"] * 4 + data.state_dict()["step"] == state.step
        seen.append(f"act {state.step}")

    ended = loop.run(steps(), on_step=lambda r: seen.append(f"read {r.step}"), every=[(3, act)])
    assert ended == "finished" and loop.state.step == 6
    assert seen == [
        "asked 1", "asked 2", "read 1", "asked 3", "read 2", "read 3", "act 3",
        "asked 4", "asked 5", "read 4", "asked 6", "read 5", "read 6", "act 6",
    ]  # fmt: skip


def test_a_record_tells_roles_work_and_memory():
    """The numbers of the first step, from its samples run apart, and what they cost."""
    config = tiny_hf_config(tie_word_embeddings=True)
    work = StepWork(ModelSizes.of(LlamaConfig.from_hf(config)), max_tokens=32, peak=1e-3)
    model = tiny_model(config, torch.float32)
    optimizer = MasterAdamW(model)
    options = TrainOptions(max_steps=2, lr=1e-2)
    loop = Loop(Parallel(model, World()), optimizer, options, capacity=128, work=work)
    data = stream(World(), 4)
    samples = [data.sources.sample(i) for ids in data.step(0).packs for i in ids.tolist()]
    apart = tiny_model(config, torch.float32)
    losses = [apart(collate([sample])).token_loss.detach().double() for sample in samples]
    roles = torch.cat([torch.tensor(target_roles(sample)) for sample in samples])
    weights = torch.cat([torch.tensor(s.token_weights[1:]).double() for s in samples])

    def mean(which: torch.Tensor) -> float:
        return float((torch.cat(losses) * weights)[which].sum() / weights[which].sum())

    records: list[StepRecord] = []
    assert loop.run(data, on_step=records.append) == "finished"
    first = records[0]
    user, assistant = (roles & (STOP - 1) == ROLES.index(role) for role in ("user", "assistant"))
    expected = {"user": mean(user), "assistant": mean(assistant)}
    assert first.role_loss == pytest.approx(expected, rel=1e-5)
    assert first.stop_loss == pytest.approx(mean(roles >= STOP), rel=1e-5)
    pairs = sum(i for s in samples for i in range(1, len(s)) if s.token_weights[i] > 0)
    flops = step_flops(
        work.sizes, first.real_tokens, first.squares, first.supervised_tokens, pairs=pairs
    )
    assert first.tflops == pytest.approx(flops / first.step_time_s / 1e12, rel=1e-12)
    naive = naive_flops(work.sizes, 4, 32)
    assert first.naive_tflops == pytest.approx(naive / first.step_time_s / 1e12, rel=1e-12)
    assert first.mfu == first.tflops / 1e-3
    assert first.peak_memory <= records[1].peak_memory <= peak_memory(torch.device("cpu"))
    assert first.peak_memory > 5e7


def test_a_run_in_two_sittings_is_the_run_in_one():
    one, two = loop_of(), loop_of()
    records: list[StepRecord] = []
    one.run(stream(World(), 4), on_step=records.append)
    data = stream(World(), 4)
    again: list[StepRecord] = []
    assert two.run(itertools.islice(data, 4), on_step=again.append) == "no more steps"
    assert two.run(data, on_step=again.append) == "finished"
    assert [(r.step, r.loss, r.lr) for r in again] == [(r.step, r.loss, r.lr) for r in records]
    assert (two.state.step, two.state.epoch) == (6, 1)
    assert two.state.real_tokens == sum(r.real_tokens for r in records)
    pairs = zip(one._optimizer.parameters, two._optimizer.parameters, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_loop_goes_on_from_the_step_of_its_state():
    options = TrainOptions(max_steps=6, lr=1e-2)
    model = tiny_model(tiny_hf_config(), torch.float32)
    loop = Loop(
        Parallel(model, World()), MasterAdamW(model), options, capacity=128,
        state=TrainState(step=4, real_tokens=1000, seconds=50.0),
    )  # fmt: skip
    records: list[StepRecord] = []
    loop.run(stream(World(), 4), on_step=records.append)
    assert [r.step for r in records] == [5, 6]
    assert [r.lr for r in records] == [options.rate(4 / 6), options.rate(5 / 6)]
    assert loop.state.real_tokens == 1000 + sum(r.real_tokens for r in records)
    assert 50 < loop.state.seconds < 60
    mean = sum(r.step_time_s for r in records) / 2
    assert records[0].seconds_left == pytest.approx(mean)  # of this sitting's steps


def test_a_loop_goes_on_from_the_seconds_of_its_state():
    options = TrainOptions(max_seconds=100.0, lr=1e-2)
    model = tiny_model(tiny_hf_config(), torch.float32)
    loop = Loop(
        Parallel(model, World()), MasterAdamW(model), options, capacity=128,
        state=TrainState(step=4, seconds=50.0),
    )  # fmt: skip
    records: list[StepRecord] = []
    loop.run(itertools.islice(stream(World(), 4), 2), on_step=records.append)
    assert [r.lr for r in records] == [options.rate(0.5)] * 2
    assert all(40 < r.seconds_left < 50 for r in records)


def test_no_weight_moves_after_a_gradient_that_is_not_finite():
    """The step after it is under way when it is read, and must not move weights either."""
    calls = itertools.count(1)

    def score(module, batch):
        output = module(batch)
        spoiled = next(calls) == 6  # in the second step
        return output._replace(loss_sum=SpoiledBackward.apply(output.loss_sum, spoiled))

    loop = loop_of(score=score)
    seen: list[StepRecord] = []
    weights = []

    def steps():
        for step in stream(World(), 4):
            weights.append([p.detach().clone() for p in loop._optimizer.parameters])
            yield step

    with pytest.raises(NotFinite, match="step 2: the loss is .* and the gradient's norm nan"):
        loop.run(steps(), on_step=seen.append)
    assert [r.step for r in seen] == [1] and len(weights) == 3
    for first, second, third, last in zip(*weights, loop._optimizer.parameters, strict=True):
        assert torch.equal(second, third) and torch.equal(third, last)
        assert not torch.equal(first, second)


class SpoiledBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, spoiled):
        ctx.factor = math.nan if spoiled else 1.0
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def test_what_is_asked_for_is_done_after_the_next_step():
    loop = loop_of()
    asked = itertools.count(1)
    assert loop.run(stream(World(), 4), stop=lambda: next(asked) == 2) == "asked"
    assert loop.state.step == 3


def test_the_time_of_an_action_is_no_steps():
    loop = loop_of(4)
    records: list[StepRecord] = []
    loop.run(stream(World(), 4), on_step=records.append, every=[(2, lambda _: time.sleep(0.5))])
    assert len(records) == 4 and max(r.step_time_s for r in records[1:]) < 0.5
    assert all(0 <= r.stall_s <= r.step_time_s for r in records)


def test_the_stall_is_what_a_step_was_waited_for():
    def slow():
        for number, step in enumerate(stream(World(), 4), 1):
            if number == 2:
                time.sleep(0.2)
            yield step

    records: list[StepRecord] = []
    loop_of(3).run(slow(), on_step=records.append)
    assert records[1].stall_s >= 0.2 and records[1].step_time_s >= records[1].stall_s
