"""The ways to compute that a check compares: where their rows are, and that a leak is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import random_samples
from tests.integrations.families import tiny_hf
from varlen_sft.data.batch import collate
from varlen_sft.tools.check_compare import Figure, generated, group_of
from varlen_sft.tools.check_generate import generate
from varlen_sft.tools.check_routes import HFAlone, HFPacked, HFPadded, Ours, Route
from varlen_sft.tools.check_subject import PatchedModel

SAMPLES = random_samples([5, 9, 3, 7], fractional=True)


def routes() -> list[Route]:
    made: list[Route] = [
        kind(tiny_hf("qwen3", attention="sdpa").eval()) for kind in (HFPadded, HFPacked)
    ]
    return [*made, Ours("ours", PatchedModel(tiny_hf("qwen3").eval()), {}, collate)]


@pytest.mark.parametrize("at", range(3))
def test_rows_of_each_conversation_are_where_places_says(at):
    route = routes()[at]
    seen = []
    handle = route.embedding().register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    route.loss(SAMPLES)
    handle.remove()
    ids = seen[0].flatten()
    for place, sample in zip(route.places(SAMPLES), SAMPLES, strict=True):
        assert np.array_equal(ids[place].numpy(), sample.input_ids[:-1])


@pytest.mark.parametrize("at", range(3))
def test_every_route_gives_what_the_conversations_give_alone(at):
    route = routes()[at]
    wanted = HFAlone(tiny_hf("qwen3", attention="sdpa").eval()).run(SAMPLES)
    parts = [route.run(SAMPLES[:1]), route.run(SAMPLES[1:])]
    got = parts[0] + parts[1]
    assert torch.allclose(got.loss, wanted.loss, rtol=1e-10, atol=0)
    assert [len(rows) for rows in got.rows] == [
        int((sample.token_weights[1:] > 0).sum()) for sample in SAMPLES
    ]
    # The loss of HF is taken in fp64 here, and ours sums in fp64: nothing is rounded to fp32.
    assert torch.allclose(torch.cat(got.rows), torch.cat(wanted.rows), rtol=1e-9, atol=1e-10)
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        assert torch.allclose(got.gradients[name], gradient, rtol=1e-8, atol=1e-10), name
    assert route.leak(SAMPLES[:2]) == 0.0
    for made, sample in zip(route.logits(SAMPLES), SAMPLES, strict=True):
        assert made.shape == (len(sample) - 1, 53)


def test_a_leak_is_seen():
    class Leaking(HFPacked):
        def logits(self, samples):
            batch = collate(samples)
            logits = self.hf(input_ids=batch.input_ids[None], use_cache=False).logits[0]
            return list(logits.split([len(s) - 1 for s in samples]))

    assert Leaking(tiny_hf("qwen3").eval()).leak(SAMPLES[:2]) > 1e-6


def test_parts_of_a_model():
    groups = {name: group_of(name) for name, _ in tiny_hf("gemma3").named_parameters()}
    assert groups["model.embed_tokens.weight"] == "embedding"
    assert groups["model.layers.0.self_attn.q_norm.weight"] == "norms"
    assert groups["model.layers.0.self_attn.q_proj.weight"] == "attention"
    assert groups["model.layers.1.mlp.down_proj.weight"] == "MLP"
    assert group_of("lm_head.weight") == "head"


@pytest.mark.parametrize(
    ("error", "bound", "share"),
    [(1.0, 2.0, 0.5), (0.0, 0.0, 0.0), (1e-30, 0.0, float("inf")), (5.0, None, 0.0)],
)
def test_a_share_of_a_bound(error, bound, share):
    assert Figure(error, bound).share() == share


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_prompts_that_are_written_together_are_written_as_alone(name):
    model = tiny_hf(name, torch.float32).eval()
    prompts = [np.array(ids) for ids in ([5, 0, 7, 9], [0, 0, 3], [4] * 11)]  # 0 is the pad token
    shares: list[float] = []
    together = generate(model, prompts, 6, 2, shares.append)
    assert shares == pytest.approx([k / 12 for k in range(1, 13)])
    for prompt, (text, gaps) in zip(prompts, together, strict=True):
        ids = torch.from_numpy(prompt)[None]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        assert np.array_equal(text, out.sequences[0].numpy())
        top = torch.cat(out.logits).topk(2).values
        assert torch.allclose(gaps, top[:, 0] - top[:, 1], atol=1e-4)


def test_generated_tokens_that_a_route_would_not_write():
    """Of four tokens two differ, one of them where Hugging Face's choice was a near tie."""

    class Fake(Route):
        def logits(self, samples):
            return [torch.eye(8)[torch.tensor([7, 7, 1, 2, 5, 6])] for _ in samples]

    ids = np.array([9, 9, 9, 1, 2, 3, 4])  # the last four were written: 1, 2, 3, 4
    gaps = torch.tensor([1.0, 1.0, 1.0, 0.01])
    assert generated(Fake(), [(ids, gaps)], 0.01) == 0.25
    assert generated(Fake(), [(ids, gaps)], 0.001) == 0.5
    assert generated(Fake(), [], 0.01) == 0.0
