"""Hugging Face's Trainer over packs: its steps are those of one big batch, weights and all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import relative_error
from tests.integrations.families import tiny_hf
from tests.integrations.steps import (
    ONE_STEP,
    alone,
    assert_step,
    eight_samples,
    weights_of,
)
from varlen_sft import Collator, patch
from varlen_sft.integrations import WeightedTrainerMixin, denominator

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class WeightedTrainer(WeightedTrainerMixin, transformers.Trainer):
    pass


TRAINERS = {False: transformers.Trainer, True: WeightedTrainer}


def make(tmp_path, model, samples, kind=transformers.Trainer, collator=None, **arguments):
    settings = transformers.TrainingArguments(str(tmp_path), **{**ONE_STEP, **arguments})
    return kind(
        model,
        settings,
        train_dataset=samples,
        eval_dataset=samples,
        data_collator=collator or Collator(),
    )


def patched(**changes):
    model = tiny_hf("llama3", attention="sdpa", **changes)
    patch(model)
    return model


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_an_accumulated_step_is_that_of_one_big_batch(tmp_path, size, fractional):
    samples = eight_samples(fractional=fractional)
    loss, gradients = alone(tiny_hf("llama3", attention="sdpa"), samples)
    model = patched()
    before = weights_of(model)
    trainer = make(
        tmp_path, model, samples, TRAINERS[fractional], per_device_train_batch_size=size,
        gradient_accumulation_steps=-(-8 // size),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1
    assert_step(before, weights_of(model), gradients)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("fractional", [False, True])
def test_two_ranks_and_two_micro_batches_are_one_big_batch(two_ranks, fractional):
    result = two_ranks[0][TRAINERS[fractional].__name__]
    loss, gradients = alone(
        tiny_hf("llama3", attention="sdpa"), eight_samples(fractional=fractional)
    )
    assert (result["steps"], result["model"]) == (1, "DistributedDataParallel")
    assert_step(result["before"], result["after"], gradients)
    assert result["loss"] == pytest.approx(float(loss), rel=1e-6)


def test_the_number_of_items_is_our_denominator(tmp_path):
    samples = eight_samples(fractional=False)
    trainer = make(tmp_path, patched(), samples)
    packs = [Collator()(samples[:3]), Collator(pad_to=99)(samples[3:])]
    supervised = sum(int(sample.token_weights[1:].sum()) for sample in samples)
    counted = trainer._get_num_items_in_batch(packs, torch.device("cpu"))
    assert int(counted) == int(denominator(packs)) == supervised


def test_a_step_without_targets_changes_nothing(tmp_path):
    samples = [eight_samples(fractional=False)[i] for i in (2, 7)]
    model = patched()
    before = weights_of(model)
    trainer = make(tmp_path, model, samples, per_device_train_batch_size=2)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("fractional", [False, True])
def test_evaluation_is_the_mean_loss(tmp_path, fractional):
    samples = eight_samples(fractional=fractional)
    loss, _ = alone(tiny_hf("llama3", attention="sdpa"), samples)
    trainer = make(tmp_path, patched(), samples, TRAINERS[fractional], per_device_eval_batch_size=8)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss), rel=1e-6)


def test_fractional_weights_need_the_mixin(tmp_path):
    trainer = make(tmp_path, patched(), eight_samples(fractional=True))
    with pytest.raises(ValueError, match=r"here 0\.25.*integrations\.WeightedTrainerMixin"):
        trainer.train()


def test_the_mixin_behind_the_trainer_does_not_count(tmp_path):
    class Backwards(transformers.Trainer, WeightedTrainerMixin):
        pass

    trainer = make(tmp_path, patched(), eight_samples(fractional=True), Backwards)
    with pytest.raises(ValueError, match="WeightedTrainerMixin"):
        trainer.train()


def test_the_mixin_without_a_trainer_is_refused():
    with pytest.raises(TypeError, match="must come before a Trainer"):
        WeightedTrainerMixin()


def test_the_mixin_needs_a_loss_that_reads_weights(tmp_path):
    model = tiny_hf("llama3", attention="sdpa")
    with pytest.raises(ValueError, match=r"call varlen_sft.patch\(model\) before"):
        make(tmp_path, model, eight_samples(fractional=True), WeightedTrainer)
    patch(model, loss=False)
    with pytest.raises(ValueError, match=r"call varlen_sft.patch\(model\) before"):
        make(tmp_path, model, eight_samples(fractional=True), WeightedTrainer)


def test_the_mixin_refuses_another_loss(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make(tmp_path, patched(), [], WeightedTrainer, label_smoothing_factor=0.1)


def columns(samples):
    return [
        {"input_ids": s.input_ids.tolist(), "token_weights": s.token_weights.tolist()}
        for s in samples
    ]


def test_the_mixin_keeps_the_columns_of_weights(tmp_path):
    datasets = pytest.importorskip("datasets")
    samples = eight_samples(fractional=True)
    _, gradients = alone(tiny_hf("llama3", attention="sdpa"), samples)
    model = patched()
    before = weights_of(model)
    rows = datasets.Dataset.from_list(columns(samples))
    make(tmp_path, model, rows, WeightedTrainer, per_device_train_batch_size=8).train()
    assert_step(before, weights_of(model), gradients)


@pytest.mark.parametrize("kind", ["list", "datasets"])
def test_a_column_that_trainer_removed_is_missed_not_ignored(tmp_path, kind):
    rows = columns(eight_samples(fractional=False))
    if kind == "datasets":
        rows = pytest.importorskip("datasets").Dataset.from_list(rows)
    trainer = make(tmp_path, patched(), rows)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()


def test_saved_and_loaded_it_is_the_same_model(tmp_path):
    model = patched()
    trainer = make(tmp_path, model, eight_samples(fractional=False), per_device_train_batch_size=8)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float64
    )
    for name, weight in weights_of(loaded).items():
        assert relative_error(weight, model.state_dict()[name]) == 0, name
    assert np.isfinite(trainer.state.log_history[0]["grad_norm"])


def test_under_autocast_a_step_is_within_bf16_of_fp32(tmp_path):
    """fp32 weights and bf16=True, as most runs are: no worse than twice HF's own error."""
    samples = eight_samples(fractional=False)
    loss, exact = alone(tiny_hf("llama3", attention="sdpa"), samples)
    errors, losses = {}, {}
    for name in ("hf", "ours"):
        model = tiny_hf("llama3", torch.float32, attention="sdpa")
        if name == "ours":
            patch(model)
        before = weights_of(model)
        trainer = make(tmp_path, model, samples, per_device_train_batch_size=8, bf16=True)
        trainer.train()
        losses[name] = trainer.state.log_history[0]["loss"]
        after = weights_of(model)
        errors[name] = {k: relative_error(before[k] - after[k], exact[k]) for k in exact}
    rounding = torch.finfo(torch.bfloat16).eps
    far, near = abs(losses["hf"] - float(loss)), abs(losses["ours"] - float(loss))
    assert near <= 2 * far + rounding * float(loss)
    for name, error in errors["ours"].items():
        assert error <= 2 * errors["hf"][name] + rounding, name


def test_metrics_of_evaluation_get_logits_alone(tmp_path):
    """compute_metrics sees what it sees of the model as it was."""
    samples, seen = eight_samples(fractional=False), []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {}

    losses = []
    for model in (tiny_hf("llama3", attention="sdpa"), patched()):
        trainer = make(tmp_path, model, samples, per_device_eval_batch_size=8)
        trainer.compute_metrics = compute_metrics
        losses.append(trainer.evaluate()["eval_loss"])
    stock, ours = seen
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    np.testing.assert_array_equal(ours.label_ids, stock.label_ids)
    np.testing.assert_allclose(ours.predictions, stock.predictions, rtol=1e-6, atol=1e-6)


def wants_logits(outputs, labels, num_items_in_batch=None):
    return outputs["logits"].sum()


@pytest.mark.parametrize("function", [None, wants_logits])
def test_a_loss_of_logits_is_refused_by_name(tmp_path, function):
    smoothing = 0.0 if function else 0.1
    trainer = make(
        tmp_path, patched(), eight_samples(fractional=False), label_smoothing_factor=smoothing
    )
    trainer.compute_loss_func = function
    with pytest.raises(KeyError, match="compute_loss_func or label_smoothing_factor"):
        trainer.train()
