"""TRL's SFTTrainer with the patched loss: same numbers and metrics as TRL's own, our op called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.integrations.families import tiny_hf
from tests.integrations.steps import alone, assert_step, eight_samples, weights_of
from varlen_sft import Collator, patch, unpatch
from varlen_sft.integrations import WeightedTrainerMixin

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from tests.integrations.trl_runs import sft_trainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

STEPS, ACCUMULATE = 2, 2  # micro-batches of two samples each


@pytest.fixture(autouse=True)
def alone_on_this_machine(monkeypatch, tmp_path):
    """TRL tells its makers of every trainer, datasets caches rows at home: neither in a test."""
    monkeypatch.setattr(trl.SFTTrainer, "_send_telemetry", lambda self: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@pytest.fixture
def make(tmp_path):
    """A trainer of a kind over the eight samples, in an order that the seed alone decides."""

    def make(kind, model, collator=None, **arguments):
        return sft_trainer(kind, model, tmp_path, collator, **arguments)

    return make


def ours():
    from varlen_sft.integrations.trl import SFTTrainer

    return SFTTrainer


def tiny(dtype=torch.float32, **options):
    """A model, patched if options are given."""
    model = tiny_hf("llama3", dtype, attention="sdpa")
    if options:
        patch(model, **options)
    return model


class Calls(TorchDispatchMode):
    """Counts calls of our loss op."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.varlen_sft.linear_cross_entropy.default
        return func(*args, **(kwargs or {}))


def logged(trainer, *keys):
    """What was logged of each step."""
    return [[line[key] for key in keys] for line in trainer.state.log_history if keys[0] in line]


METRICS = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")
ACCUMULATED = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": ACCUMULATE,
    "seed": 5,
}


@pytest.mark.parametrize("way", ["our collator", "padded by TRL", "packed by TRL"])
def test_losses_and_metrics_are_those_of_trl(make, way):
    arguments = ACCUMULATED | {"learning_rate": 0.01}
    stock = make(trl.SFTTrainer, tiny(), **arguments)
    stock.train()
    collator = Collator() if way == "our collator" else None
    arguments["padding_free"] = way == "packed by TRL"
    trainer = make(ours(), tiny(loss=True), collator, **arguments)
    with Calls() as calls:
        trainer.train()
    assert calls.count == STEPS * ACCUMULATE
    expected, got = logged(stock, *METRICS), logged(trainer, *METRICS)
    assert len(got) == STEPS
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_evaluation_is_that_of_trl(make):
    keys = [f"eval_{key}" for key in METRICS[:4]]
    stock = make(trl.SFTTrainer, tiny(), per_device_eval_batch_size=1)
    trainer = make(ours(), tiny(loss=True), Collator(), per_device_eval_batch_size=1)
    expected = stock.evaluate()
    with Calls() as calls:
        got = trainer.evaluate()
    assert calls.count == 8
    np.testing.assert_allclose([got[k] for k in keys], [expected[k] for k in keys], rtol=1e-5)


def test_metrics_of_evaluation_get_the_logits(make):
    predictions = []
    for kind, model in ((trl.SFTTrainer, tiny()), (ours(), tiny(loss=True))):
        trainer = make(kind, model, per_device_eval_batch_size=8)
        trainer.compute_metrics = lambda prediction: predictions.append(prediction) or {}
        trainer.evaluate()
    stock, got = predictions
    real = stock.label_ids != -100
    np.testing.assert_array_equal(got.label_ids, stock.label_ids)
    np.testing.assert_allclose(got.predictions[real], stock.predictions[real], rtol=1e-5, atol=1e-5)


def test_weights_of_fractions_under_trl(make):
    class Weighted(WeightedTrainerMixin, ours()):
        pass

    loss, gradients = alone(tiny(torch.float64), eight_samples(fractional=True))
    model = tiny(torch.float64, loss=True)
    before = weights_of(model)
    trainer = make(
        Weighted, model, Collator(), fractional=True, per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    trainer.train()
    assert_step(before, weights_of(model), gradients)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-6)


def test_two_ranks_log_the_metrics_of_one_big_batch(two_ranks, make):
    result = two_ranks[0]["SFTTrainer"]
    stock = make(trl.SFTTrainer, tiny(torch.float64), per_device_train_batch_size=8)
    stock.train()
    expected = dict(zip(METRICS, logged(stock, *METRICS)[0], strict=True))
    _, gradients = alone(tiny(torch.float64), eight_samples(fractional=False))
    assert_step(result["before"], result["after"], gradients)
    for key, value in expected.items():
        assert result["log"][key] == pytest.approx(value, rel=1e-5), key


NAMES_OURS = r"varlen_sft\.integrations\.trl\.SFTTrainer in place of trl\.SFTTrainer"


@pytest.mark.parametrize("options", [{"loss": True}, {"prune_last_layer": True}])
@pytest.mark.parametrize("lora", [False, True])
def test_a_stock_trainer_over_a_patched_loss_is_refused(make, options, lora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None
    with pytest.raises(ValueError, match=NAMES_OURS):
        make(trl.SFTTrainer, tiny(**options), peft_config=config)


@pytest.mark.parametrize("lora", [False, True])
def test_a_stock_trainer_whose_model_is_patched_later_is_refused(make, lora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None
    trainer = make(trl.SFTTrainer, tiny(), peft_config=config)
    patch(trainer.model, loss=True)
    with pytest.raises(ValueError, match=NAMES_OURS):
        trainer.train()


def test_our_trainer_takes_a_model_that_is_patched_later(make):
    trainer = make(ours(), tiny(), Collator(), per_device_train_batch_size=8)
    patch(trainer.model, loss=True)
    with Calls() as calls:
        trainer.train()
    assert calls.count == 1


def test_a_stock_trainer_keeps_its_head_without_the_patched_loss(make):
    expected = make(trl.SFTTrainer, tiny(), per_device_train_batch_size=8)
    expected.train()
    for model in (tiny(loss=False), unpatched()):
        trainer = make(trl.SFTTrainer, model, Collator(), per_device_train_batch_size=8)
        with Calls() as calls:
            trainer.train()
        assert calls.count == 0
        np.testing.assert_allclose(logged(trainer, *METRICS), logged(expected, *METRICS), rtol=1e-5)


def unpatched():
    model = tiny(loss=True)
    unpatch(model)
    return model


def test_our_trainer_needs_the_patched_loss(make):
    trainer = make(ours(), tiny(loss=False), Collator())
    with pytest.raises(ValueError, match=r"call varlen_sft.patch\(model\), or use trl.SFTTrainer"):
        trainer.train()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"loss_type": "dft"}, "loss_type='dft'"), ({"label_smoothing_factor": 0.1}, "label_smooth")],
)
def test_losses_that_ours_is_not_are_refused(make, arguments, name):
    trainer = make(ours(), tiny(loss=True), Collator(), **arguments)
    with pytest.raises(ValueError, match=f"does not know {name}"):
        trainer.train()


def test_a_lora_is_trained_through_our_loss(make):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    lines = []
    for kind, model, collator in (
        (trl.SFTTrainer, tiny(), None),
        (ours(), tiny(loss=True), Collator()),
    ):
        trainer = make(kind, model, collator, peft_config=config, **ACCUMULATED)
        with Calls() as calls:
            trainer.train()
        lines.append(logged(trainer, *METRICS))
        assert calls.count == (0 if collator is None else STEPS * ACCUMULATE)
    np.testing.assert_allclose(lines[1], lines[0], rtol=1e-5)
