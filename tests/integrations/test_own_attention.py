"""The lines of README that put our modules into a Llama of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integrations.families import packed_inputs, tiny_hf
from tests.integrations.hf_runs import alone, assert_close, together

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLE = """\
import torch
from varlen_sft import RotaryEmbedding, VarlenAttention
from varlen_sft import sequences_from_lengths, sequences_from_position_ids


class Rotary(RotaryEmbedding):  # for LlamaRotaryEmbedding
    def forward(self, x, position_ids):
        return super().forward(position_ids[0], sequences_from_position_ids(position_ids[0]))


class Attention(VarlenAttention):  # for LlamaAttention
    def forward(self, hidden_states, position_embeddings, sequences, **_):
        return super().forward(hidden_states[0], position_embeddings, sequences)[None], None


model.model.rotary_emb = Rotary.from_config(model.config)
for layer in model.model.layers:
    ours = Attention.from_config(model.config).to(model.dtype)
    ours.load_state_dict(layer.self_attn.state_dict())  # q_proj, k_proj, v_proj, o_proj
    layer.self_attn = ours
position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
sequences = sequences_from_lengths(lengths)
out = model(input_ids=input_ids, position_ids=position_ids, sequences=sequences)
"""


@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    [
        ("llama3", torch.float64, 1e-10),
        ("llama2", torch.float64, 1e-10),
        ("smollm2", torch.float32, 1e-5),
    ],
)
def test_the_lines_give_each_sample_what_it_gets_alone(name, dtype, bound):
    model = tiny_hf(name, dtype, attention="sdpa" if dtype == torch.float64 else "eager")
    names = [name for name, _ in model.named_parameters()]
    packed = packed_inputs()
    expected = alone(model, packed)
    lengths = packed["cu_seq_lens_q"].diff().tolist()
    given = {"model": model, "lengths": lengths, "input_ids": packed["input_ids"]}
    exec(EXAMPLE, given)
    assert [name for name, _ in model.named_parameters()] == names
    actual = together(model, packed, sequences=given["sequences"])
    assert_close(actual, expected, bound)
    assert torch.equal(given["out"].logits[0], actual["logits"])


def test_they_are_twenty_lines_and_readme_has_these():
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 20
    assert "class Rotary(" not in README or EXAMPLE in README
