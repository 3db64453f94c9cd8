"""The patched loss: the numbers of Hugging Face's own, from supervised rows alone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import relative_error
from tests.integrations.families import FAMILIES, LENGTHS, VOCAB, packed_inputs, tiny_hf
from varlen_sft import patch, reference, unpatch
from varlen_sft.data.batch import collate
from varlen_sft.data.sample import Sample
from varlen_sft.integrations import hf_loss
from varlen_sft.integrations.families import family_of
from varlen_sft.integrations.hf_loss import install_loss
from varlen_sft.integrations.packed import Packed
from varlen_sft.types import IGNORE_INDEX

# Of PEFT and transformers, to each other: names that will change one day.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def error(actual: Tensor, expected: Tensor) -> float:
    return relative_error(actual.detach(), expected.detach())


def padded(rows: int = 3, length: int = 20) -> dict[str, Any]:
    """Rows of unlike lengths, padded at the end, labels not shifted."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([length, 7, 15])[:rows, None]
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, :4] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def shifted(given: dict[str, Any]) -> Tensor:
    labels = given.get("shift_labels")
    if labels is not None:
        return labels.flatten()
    return nn.functional.pad(given["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def by_the_book(model: Any, given: dict[str, Any], weights: Tensor | None = None) -> Tensor:
    """The weighted sum over the model's own logits, by the specification."""
    inputs = {k: v for k, v in given.items() if k not in ("labels", "shift_labels")}
    logits = model(**inputs).logits.flatten(0, 1)
    return reference.masked_cross_entropy(logits, shifted(given), token_weights=weights).loss_sum


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name in expected:
        assert error(actual[name], expected[name]) < bound, name


# --------------------------------------------------------- the numbers of the head


@pytest.mark.parametrize(
    "given, dtype, bound",
    # in fp64 the mask of HF's eager attention overflows its fp32 softmax
    [(packed_inputs(), torch.float64, 1e-10), (padded(), torch.float32, 1e-5)],
    ids=["packed", "padded"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_logits(name, given, dtype, bound):
    model = tiny_hf(name, dtype)
    patch(model, loss=False)
    expected = by_the_book(model, given)
    wanted = gradients(model, expected)
    install_loss(model)
    output = model(**given, num_items_in_batch=1)
    assert output.logits is None and output.past_key_values is None
    assert error(output.loss, expected) < bound
    assert_equal(gradients(model, output.loss), wanted, bound)


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "granite"])
def test_on_a_padded_batch_it_is_the_loss_of_hugging_face(name):
    model, given = tiny_hf(name, torch.float32), padded()
    stock = model(**given)
    wanted = gradients(model, stock.loss)
    patch(model)
    ours = model(**given)
    assert error(ours.loss, stock.loss) < 1e-6 and ours.logits is None
    assert_equal(gradients(model, ours.loss), wanted, 1e-5)


def test_only_supervised_rows_meet_the_head(monkeypatch):
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["rows"])
        return real(*args, **kwargs)

    real = hf_loss.linear_cross_entropy
    monkeypatch.setattr(hf_loss, "linear_cross_entropy", spy)
    model, given = tiny_hf("smollm2"), padded()
    patch(model)
    output = model(**given).loss_output
    supervised = shifted(given) != IGNORE_INDEX
    assert torch.equal(seen[0], supervised.nonzero().flatten())
    assert output.token_loss.shape == (60,) and (output.token_loss > 0).equal(supervised)
    assert (output.entropy > 0).equal(supervised)


def test_bf16_is_no_worse_than_twice_hugging_face():
    model, given = tiny_hf("gemma2", torch.bfloat16), padded()
    exact = tiny_hf("gemma2", torch.float32)
    exact.load_state_dict(model.state_dict())
    high, low = (gradients(m, m(**given).loss) for m in (exact, model))
    patch(model)
    for name, grad in gradients(model, model(**given).loss).items():
        allowed = 2 * error(low[name], high[name]) + torch.finfo(torch.bfloat16).eps
        assert error(grad, high[name]) <= allowed, name


def test_autocast_lowers_the_head_as_it_lowers_linear_layers():
    model, given = tiny_hf("smollm2", torch.float32), padded()
    exact = gradients(model, model(**given).loss)
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(model, model(**given).loss)
        patch(model)
        output = model(**given)
        ours = gradients(model, output.loss)
    assert output.loss.dtype == torch.float32
    for name, grad in ours.items():
        assert grad.dtype == torch.float32
        allowed = 2 * error(low[name], exact[name]) + torch.finfo(torch.bfloat16).eps
        assert 0 < error(grad, exact[name]) <= allowed, name


# ------------------------------------------------------------------- denominators


@pytest.mark.parametrize(
    "items", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor(7, dtype=torch.int32)]
)
def test_num_items_divides_the_sum(items):
    model, given = tiny_hf("smollm2"), packed_inputs()
    patch(model)
    output = model(**given, num_items_in_batch=items)
    assert output.loss == output.loss_output.loss_sum / 7
    mean = model(**given)
    assert mean.loss == mean.loss_output.loss_sum / (given["shift_labels"] != IGNORE_INDEX).sum()


def test_micro_batches_over_one_count_are_one_batch():
    model, given = tiny_hf("qwen3"), packed_inputs()
    patch(model)
    edges = given["cu_seq_lens_q"].tolist()
    count = int((given["shift_labels"] != IGNORE_INDEX).sum())
    whole = gradients(model, model(**given, num_items_in_batch=count).loss)
    parts: dict[str, Tensor] = {}
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        piece = {k: given[k][:, start:end] for k in ("input_ids", "shift_labels")}
        for name, grad in gradients(model, model(**piece, num_items_in_batch=count).loss).items():
            parts[name] = parts.get(name, 0) + grad
    assert_equal(parts, whole, 1e-6)  # alone the samples went through HF's eager softmax in fp32


def test_weights_count():
    model, given = tiny_hf("smollm2"), packed_inputs()
    patch(model, loss=False)
    weights = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    weights[weights < 0.3] = 0
    expected = by_the_book(model, given, weights)
    install_loss(model)
    output = model(**given, shift_weights=weights[None])
    trained = weights[given["shift_labels"][0] != IGNORE_INDEX].double().sum()
    assert error(output.loss, expected / trained) < 1e-10
    assert error(model(**given, shift_weights=weights[None], num_items_in_batch=3).loss,
                          expected / 3) < 1e-10  # fmt: skip


@pytest.mark.parametrize("prune", [False, True])
def test_nothing_to_train_is_zero_and_has_zero_gradients(prune):
    model, given = tiny_hf("smollm2"), packed_inputs()
    given["shift_labels"] = torch.full_like(given["shift_labels"], IGNORE_INDEX)
    patch(model, prune_last_layer=prune)
    for items in (None, 0, torch.tensor(0)):
        loss = model(**given, num_items_in_batch=items).loss
        assert loss == 0 and all((g == 0).all() for g in gradients(model, loss).values())


def test_numbers_that_mixed_precision_rounded_are_refused():
    model, given = tiny_hf("smollm2", torch.float32), packed_inputs()
    patch(model)
    with pytest.raises(TypeError, match="num_items_in_batch must not be rounded.*cast_forward"):
        model(**given, num_items_in_batch=torch.tensor(7.0, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="shift_weights must be float32, got bfloat16"):
        model(**given, shift_weights=torch.ones(1, sum(LENGTHS), dtype=torch.bfloat16))


# ------------------------------------------------------------------------- labels


def flattened(boundaries: bool) -> dict[str, Any]:
    """As other collators do it: labels that are not shifted, edges in position ids alone."""
    given = packed_inputs()
    labels = given["input_ids"].clone()
    if not boundaries:
        labels[0, given["cu_seq_lens_q"][:-1].long()] = IGNORE_INDEX
    return {"input_ids": given["input_ids"], "position_ids": given["position_ids"],
            "labels": labels}  # fmt: skip


def test_labels_of_a_pack_never_cross_an_edge():
    model = tiny_hf("smollm2")
    patch(model)
    clean, crossing = model(**flattened(False)), model(**flattened(True))
    assert clean.loss == crossing.loss
    ends = packed_inputs()["cu_seq_lens_q"][1:].long() - 1
    assert (crossing.loss_output.token_loss[ends] == 0).all()
    assert crossing.loss_output.weight_sum == sum(LENGTHS) - len(LENGTHS)
    assert model(**flattened(False), num_items_in_batch=5).loss > 0
    with pytest.raises(
        ValueError, match="labels must be -100 at the first token of every.* 5 that"
    ):
        model(**flattened(True), num_items_in_batch=5)


def test_shift_labels_come_before_labels():
    model, given = tiny_hf("smollm2"), packed_inputs()
    patch(model)
    both = model(**given, labels=torch.full_like(given["shift_labels"], 3))
    assert both.loss == model(**given).loss


def test_a_batch_of_our_own_collate():
    samples = [Sample(torch.arange(3, 3 + n, dtype=torch.int32).numpy(),
                      torch.linspace(0, 1, n).numpy(), torch.zeros(n, dtype=torch.uint8).numpy())
               for n in (9, 14)]  # fmt: skip
    batch = collate(samples)
    model = tiny_hf("smollm2")
    patch(model, prune_last_layer=True)
    ours = model(input_ids=batch.input_ids[None], packed=Packed.from_batch(batch))
    spoken = {
        "input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None],
        "shift_labels": batch.labels[None], "shift_weights": batch.token_weights[None],
    }  # fmt: skip
    assert ours.loss > 0 and error(model(**spoken).loss, ours.loss) < 1e-12
    assert error(ours.loss_output.weight_sum, batch.weight_sum) < 1e-7


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"labels": torch.zeros(1, 5).long()}, r"labels must have shape \(B, L\) = \(3, 20\)"),
        ({"labels": torch.zeros(3, 20)}, "labels must be int32 or int64, got float32"),
        ({"shift_weights": torch.ones(3, 19)}, r"shift_weights must have shape \(B, L\) = \(3, 20"),
        ({"input_ids": None}, "input_ids or inputs_embeds must come with labels"),
    ],
)
def test_errors_name_what_came(wrong, message):
    model = tiny_hf("smollm2", torch.float32)
    patch(model)
    with pytest.raises((ValueError, TypeError), match=message):
        model(**{**padded(), **wrong})


# -------------------------------------------------------------- what is left alone


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
    from varlen_sft import Collator

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


def test_taken_back_exactly():
    model = tiny_hf("smollm2", torch.float32)
    before = dict(vars(model))
    undo = install_loss(model)
    assert "forward" in vars(model)
    undo()
    assert vars(model).keys() == before.keys()
    assert model(**padded()).logits is not None


# ---------------------------------------------------------------------- the head


def test_a_bias_of_the_head_takes_part():
    model, given = tiny_hf("smollm2", tie_word_embeddings=False), padded()
    model.lm_head = nn.Linear(32, VOCAB, dtype=torch.float64)
    expected = by_the_book(model, given)
    wanted = gradients(model, expected)
    install_loss(model)
    loss = model(**given, num_items_in_batch=1).loss
    assert error(loss, expected) < 1e-10
    assert_equal(gradients(model, loss), wanted, 1e-10)
    assert wanted["lm_head.bias"].norm() > 0


def test_a_tied_head_gives_one_gradient():
    model, given = tiny_hf("smollm2"), packed_inputs()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    patch(model)
    found = gradients(model, model(**given, num_items_in_batch=1).loss)
    assert "lm_head.weight" not in found
    assert found["model.embed_tokens.weight"].norm() > 0


def test_a_head_that_peft_trains_as_a_whole():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_hf("qwen3", torch.float32), config)
    patch(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save.default.weight.mul_(3)
    given = padded()
    loss = model(**given, num_items_in_batch=1).loss
    assert error(loss, by_the_book(model, given)) < 1e-5
    loss.backward()
    head = model.base_model.model.lm_head
    assert head.modules_to_save.default.weight.grad.norm() > 0
    with model.disable_adapter():
        assert error(
            model(**given, num_items_in_batch=1).loss, by_the_book(model, given)
        ) < 1e-5  # fmt: skip


class Quantised(nn.Linear):
    """As bitsandbytes' layers: linear by class, another product by forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_heads_that_are_more_than_a_weight_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    adapted = peft.get_peft_model(tiny_hf("qwen3", torch.float32), config)
    quantised = tiny_hf("qwen3", torch.float32)
    quantised.lm_head = Quantised(32, VOCAB, bias=False)
    integers = tiny_hf("qwen3", torch.float32)
    integers.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 32).char(), requires_grad=False)
    cases = (adapted, "no adapter"), (quantised, "ordinary nn.Linear, got Quantised"), (
        integers, "must not be quantised, got weights of torch.int8")  # fmt: skip
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            patch(model)
        patch(model, loss=False)  # which leaves the head alone
        unpatch(model)


def test_an_adapter_that_comes_later_is_refused_in_the_call():
    peft = pytest.importorskip("peft")
    model = tiny_hf("qwen3", torch.float32)
    patch(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="the head must have no adapter"):
        adapted(**padded())


def test_a_head_that_fsdp2_shards_by_itself(tmp_path):
    """transformers' own plan makes the head a group of its own, which its forward gathers."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, given = tiny_hf("qwen3", torch.float32), padded()
    expected = by_the_book(model, given)
    wanted = gradients(model, expected)
    patch(model, prune_last_layer=True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0,
                            world_size=1)  # fmt: skip
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for part in (*model.model.layers, model.lm_head, model):
            fully_shard(part, mesh=mesh)
        loss = model(**given, num_items_in_batch=1).loss
        loss.backward()
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    finally:
        dist.destroy_process_group()
    assert error(loss, expected) < 1e-5
    assert_equal(found, wanted, 1e-5)


def test_an_unknown_family_is_refused():
    model = tiny_hf("smollm2", torch.float32)
    model.config.model_type = "cohere"
    with pytest.raises(ValueError, match="model_type must be one of llama.* it has interleaved"):
        install_loss(model)
    assert "forward" not in vars(model) and family_of(FAMILIES["qwen3"]()).qk_norm == "head"
