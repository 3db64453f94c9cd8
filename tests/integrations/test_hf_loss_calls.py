"""Which calls the patched loss takes, and what it leaves as it was."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from tests.integrations.families import VOCAB, packed_inputs, tiny_hf
from tests.integrations.loss_runs import error, padded
from varlen_sft import Collator, patch
from varlen_sft.integrations import hf_loss
from varlen_sft.integrations.hf_loss import install_loss

# Of PEFT and transformers, to each other: names that will change one day.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_without_labels_everything_is_as_before():
    model = tiny_hf("smollm2", torch.float32)
    given = {k: v for k, v in padded().items() if k != "labels"}
    expected = model(**given)
    prompt = given["input_ids"][:1, :6]
    tokens = model.generate(prompt, max_new_tokens=6, do_sample=False)
    signature = inspect.signature(model.forward)
    patch(model)
    assert inspect.signature(model.forward) == signature
    output = model(given["input_ids"], given["attention_mask"], skip_logits=True)
    assert type(output) is type(expected) and torch.equal(output.logits, expected.logits)
    assert output.past_key_values is not None
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), tokens)


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "granite"])
def test_evaluation_has_logits_and_the_loss_of_the_same_pass(name):
    model, given = tiny_hf(name, torch.float32).eval(), padded()
    expected = model(**given)
    patch(model)
    output = model(**given)
    assert torch.equal(output.logits, expected.logits) and output.past_key_values is not None
    assert error(output.loss, expected.loss) < 1e-6
    assert output.loss_output.token_loss.shape == (60,)
    few = model(**given, skip_logits=True)
    assert few.logits is None and error(few.loss, expected.loss) < 1e-6
    weights = torch.full((3, 20), 0.5)
    half = model(**given, shift_weights=weights, num_items_in_batch=1).loss
    assert error(half, few.loss_output.loss_sum / 2) < 1e-6
    model.train()
    assert torch.equal(model(**given, skip_logits=False).logits, expected.logits)


def test_hidden_states_tuples_and_caches():
    model, given = tiny_hf("smollm2", torch.float32), padded()
    stock = model(**given, output_hidden_states=True)
    patch(model)
    output = model(**given, output_hidden_states=True)
    for a, b in zip(output.hidden_states, stock.hidden_states, strict=True):
        assert torch.equal(a, b)
    as_tuple = model(**given, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0] == output.loss
    cache = model(input_ids=given["input_ids"][:, :5]).past_key_values
    rest = {"input_ids": given["input_ids"][:, 5:], "labels": given["labels"][:, 5:]}
    assert model(**rest, past_key_values=cache).logits.shape == (3, 15, VOCAB)
    assert model(**given, logits_to_keep=20).logits.shape == (3, 20, VOCAB)


def test_accelerate_keeps_what_the_loss_knew():
    operations = pytest.importorskip("accelerate.utils.operations")
    model = tiny_hf("smollm2", torch.float32)
    patch(model)
    output = operations.convert_to_fp32(model(**padded()))
    assert isinstance(output, hf_loss.CausalLMLossOutput)
    assert output.loss_output.correct.dtype == torch.bool and output.loss_output.loss_sum > 0


def test_labels_that_a_trainer_took_out_are_missed_by_name():
    model, given = tiny_hf("smollm2", torch.float32), padded()
    patch(model)
    labels = given.pop("labels")
    with pytest.raises(ValueError, match="without labels: .*compute_loss_func or label_smoothing"):
        model(**given, num_items_in_batch=3)
    output = model(**given, labels=labels)
    with pytest.raises(KeyError, match="no logits were made: .*label_smoothing_factor"):
        output["logits"]
    assert "logits" not in output and output["loss"] is output.loss
    with pytest.raises(ValueError, match="shift_weights need labels or shift_labels"):
        model(**given, shift_weights=torch.ones(3, 20))


def test_hugging_face_trainer_with_label_smoothing_stops(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = tiny_hf("smollm2", torch.float32)
    patch(model)
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]}] * 2
    arguments = transformers.TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none", max_steps=1,
        per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    for collator in (transformers.default_data_collator, Collator()):
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator)
        with pytest.raises((ValueError, KeyError), match="label_smoothing_factor"):
            trainer.train()


def test_a_copied_model_uses_its_own_weights():
    model, given = tiny_hf("smollm2"), packed_inputs()
    patch(model, prune_last_layer=True)
    other = copy.deepcopy(model)
    loss = model(**given).loss
    assert other(**given).loss == loss
    with torch.no_grad():
        other.model.layers[-1].mlp.up_proj.weight.mul_(2)
        other.lm_head.weight.mul_(2)
    changed = other(**given).loss
    assert changed != loss and model(**given).loss == loss
    changed.backward()
    assert other.lm_head.weight.grad is not None and model.lm_head.weight.grad is None


def test_what_a_copy_hands_on_is_its_own():
    """Calls that our forwards pass on, to the ones before, stay inside the copy as well."""
    model, given = tiny_hf("smollm2"), packed_inputs()
    patch(model, prune_last_layer=True)
    other = copy.deepcopy(model)
    del given["shift_labels"]
    logits = other(**given).logits
    assert torch.equal(logits, model(**given).logits)
    with torch.no_grad():
        other.model.layers[-1].self_attn.v_proj.weight.mul_(2)
    assert not torch.equal(other(**given).logits, logits)
    assert torch.equal(model(**given).logits, logits)


def test_taken_back_exactly():
    model = tiny_hf("smollm2", torch.float32)
    before = dict(vars(model))
    undo = install_loss(model)
    assert "forward" in vars(model)
    with pytest.raises(ValueError, match="TRL's trainers call a head of their own"):
        model.add_model_tags(["trl", "sft"])
    undo()
    model.add_model_tags(["trl", "sft"])
    del model.model_tags
    assert vars(model).keys() == before.keys()
    assert model(**padded()).logits is not None
