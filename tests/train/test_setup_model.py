from __future__ import annotations

import json
import math

import pytest
import torch

from tests.helpers import counting_backend, random_samples, tiny_hf_config, tiny_model
from varlen_sft.data.batch import collate
from varlen_sft.errors import InputError
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.train.config import ModelConfig
from varlen_sft.train.parallel import blocks
from varlen_sft.train.setup_model import PatchedForSFT, load_model, model_folder

BATCH = collate(random_samples([5, 9, 12, 3]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model") / "llama"
    tiny_model(tiny_hf_config(), torch.float32).save_pretrained(made)
    return made


def load(folder, seed: int = 0, **options):
    return load_model(ModelConfig(**{"name": "m", "dtype": "fp32"} | options), folder, seed)


def step(model) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, weight and gradients of a pack."""
    output = model(BATCH)
    output.loss_sum.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(output.loss_sum.detach()), float(output.weight_sum), grads


def norm(grads) -> float:
    """L2 over all; a matrix that is fused here and in parts there counts the same."""
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))


def test_own_is_the_default_for_a_llama_and_hf_gives_the_same_loss_and_gradients(folder):
    own, theirs = load(folder), load(folder, impl="hf")
    assert isinstance(own, LlamaForSFT) and isinstance(theirs, PatchedForSFT)
    (loss, weight, grads), (loss_hf, weight_hf, grads_hf) = step(own), step(theirs)
    assert weight == weight_hf == float(BATCH.weight_sum)
    assert math.isclose(loss, loss_hf, rel_tol=1e-5) and loss > 1
    assert math.isclose(norm(grads), norm(grads_hf), rel_tol=1e-5)
    assert len(blocks(own)) == len(blocks(theirs)) == 2
    assert own.training and theirs.training and theirs.model.training


def test_the_loss_of_a_patched_model_in_evaluation_is_that_of_training(folder):
    model = load(folder, impl="hf")
    model.model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("all logits were made"))
    trained = model(BATCH)
    with torch.no_grad():
        evaluated = model.eval()(BATCH)
    assert torch.equal(trained.loss_sum, evaluated.loss_sum)
    assert torch.equal(trained.weight_sum, evaluated.weight_sum)


def test_other_families_go_through_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {k: v for k, v in tiny_hf_config().items() if k not in ("model_type", "mlp_bias")}
    made = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    made.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert isinstance(model, PatchedForSFT) and step(model)[0] > 0
    with pytest.raises(InputError, match="model_type must be one of llama, got 'qwen3'"):
        load(tmp_path, impl="own")


def test_the_dtype_is_the_models(folder):
    for impl in ("own", "hf"):
        model = load(folder, impl=impl, dtype="bf16")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("impl", ["own", "hf"])
def test_random_weights_follow_from_the_seed_alone(folder, impl):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = load(folder, 5, impl=impl, random_init=True).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two = load(folder, 5, impl=impl, random_init=True).state_dict()
    other = load(folder, 6, impl=impl, random_init=True).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    matrices = [name for name, value in one.items() if value.dim() > 1]
    assert all(not torch.equal(one[name], other[name]) for name in matrices)
    joined = torch.cat([one[name].flatten() for name in matrices])
    assert 0.019 < float(joined.std()) < 0.021  # transformers' initializer_range
    assert all(bool((v == 1).all()) for v in one.values() if v.dim() == 1)  # norms


def test_random_weights_of_a_tied_head_are_one_matrix(tmp_path):
    tied = tiny_hf_config(tie_word_embeddings=True, initializer_range=0.5, attention_bias=True)
    tiny_model(tied, torch.float32).save_pretrained(tmp_path)
    model = load(tmp_path, random_init=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert 0.45 < float(model.embed_tokens.weight.detach().std()) < 0.55
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert biases and all(bool((p == 0).all()) for p in biases)
    assert step(model)[0] > 0


def test_lora_trains_its_matrices_alone_and_writes_an_adapter(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(folder, 3, lora_rank=4)
    loss, _, grads = step(model)
    assert math.isclose(loss, step(load(folder))[0], rel_tol=1e-5)  # B is 0 at the start
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(grads) and all("lora_" in name for name in names)
    assert len(names) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    again = dict(load(folder, 3, lora_rank=4).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in model.named_parameters())
    (folder / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path / "adapter", copy_from=folder)
    config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha) == (4, 8)
    assert (tmp_path / "adapter" / "tokenizer.json").read_text() == "{}"


def test_frozen_parameters_get_no_gradient(folder):
    grads = step(load(folder, frozen=("embed_tokens.*", "layers.0.*")))[2]
    whole = step(load(folder))[2]
    assert set(grads) == {n for n in whole if not n.startswith(("embed_tokens.", "layers.0."))}
    assert all(torch.equal(grads[name], whole[name]) for name in grads)
    with pytest.raises(InputError, match="fits no parameter"):
        load(folder, frozen=("layer.0.*",))


@pytest.mark.parametrize("options", [{}, {"impl": "hf"}, {"lora_rank": 2}])
def test_activation_checkpointing_changes_no_gradient_and_computes_layers_twice(folder, options):
    plain, saving = load(folder, **options), load(folder, activation_checkpointing=True, **options)
    calls = []
    for block in blocks(saving):
        block.mlp.register_forward_pre_hook(lambda module, args: calls.append(module))
    (loss, _, grads), (loss_saving, _, grads_saving) = step(plain), step(saving)
    assert len(calls) == 4  # two layers, forward and again in backward
    assert math.isclose(loss, loss_saving, rel_tol=1e-6) and grads.keys() == grads_saving.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_saving[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["own", "hf"])
def test_compiling_is_asked_for_every_layer(folder, monkeypatch, impl):
    asked = []

    def compiled(forward, **options):
        asked.append((forward.__self__, options))
        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    model = load(folder, compile=True, activation_checkpointing=True, impl=impl)
    eager = load(folder, activation_checkpointing=True, impl=impl)
    assert len(asked) == 2
    assert asked == [(block, {"dynamic": True}) for block in blocks(model)]
    assert step(model)[0] == step(eager)[0]


@pytest.mark.filterwarnings("default")  # of the compiler
def test_patched_layers_are_one_graph_each_and_few_for_all_lengths(folder, monkeypatch):
    """That a pack has other lengths, or a table of RoPE has grown, is nothing to compile for."""
    (graphs, backend), real = counting_backend(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kw: real(f, backend=backend, fullgraph=True, **kw)
    )
    plain, model = (load(folder, impl="hf", compile=on) for on in (False, True))
    for lengths in ([5, 9, 12, 3], [20, 7, 30], [70], [8] * 6, [2, 90], [64, 64]):
        batch = collate(random_samples(lengths))
        losses = [float(made(batch).loss_sum.detach()) for made in (plain, model)]
        assert math.isclose(*losses, rel_tol=1e-5)
    # The last layer prunes and is one of its own; the first call takes sizes for constants.
    assert len(graphs) <= 4


@pytest.mark.e2e
@pytest.mark.filterwarnings("default")  # the compiler has some of its own
@pytest.mark.parametrize("impl", ["own", "hf"])
def test_compiled_layers_compute_the_same(folder, impl):
    loss, _, grads = step(load(folder, impl=impl))
    loss_compiled, _, grads_compiled = step(load(folder, impl=impl, compile=True))
    assert math.isclose(loss, loss_compiled, rel_tol=1e-5)
    assert math.isclose(norm(grads), norm(grads_compiled), rel_tol=1e-4)


def test_what_is_no_model_is_named(tmp_path, folder):
    assert model_folder(str(folder)) == folder
    with pytest.raises(InputError, match=r"none: no such folder$"):
        model_folder(str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"on the hub\? then hub:owner/name"):
        model_folder("owner/name")
    with pytest.raises(InputError, match="no config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(InputError, match="nothing"):
        load(tmp_path)


def test_a_model_of_the_hub_is_downloaded_without_what_nobody_reads(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name != "owner/name":
            raise hub.errors.HFValidationError("Repo id must be so\nand so")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert model_folder("hub:owner/name") == folder
    ((name, patterns),) = asked
    assert name == "owner/name" and "*.safetensors" in patterns and "*.bin" not in patterns
    with pytest.raises(InputError, match="hub:a: cannot be downloaded: Repo id must be so$"):
        model_folder("hub:a")
