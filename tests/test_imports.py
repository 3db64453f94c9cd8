from __future__ import annotations

import subprocess
import sys

import pytest

import varlen_sft

OPTIONAL = (
    "triton",
    "transformers",
    "safetensors",
    "tokenizers",
    "jinja2",
    "rich",
    "datasets",
    "yaml",
)


def fresh(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_works_with_torch_and_numpy_alone():
    fresh(f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None
import varlen_sft
for name in varlen_sft.__all__:
    getattr(varlen_sft, name)
from varlen_sft import LlamaForSFT, Sample, collate
import numpy as np
ids = np.arange(5, dtype=np.int32)
batch = collate([Sample(ids, np.ones(5, np.float32), np.zeros(5, np.uint8))])
from varlen_sft.models.config import LlamaConfig
config = LlamaConfig.from_hf(dict(model_type="llama", vocab_size=7, hidden_size=8,
    intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
LlamaForSFT(config)(batch).loss_sum.backward()
""")


def test_importing_the_package_imports_nothing():
    fresh("""
import sys, varlen_sft
assert not {"torch", "numpy"} & sys.modules.keys()
""")


@pytest.mark.parametrize(
    "module",
    ["cli", "errors", "data.sample", "data.formats", "data.chat", "data.packing", "data.plan",
     "data.stream"],
)  # fmt: skip
def test_data_workers_stay_without_torch(module):
    fresh(f"import sys, varlen_sft.{module}; assert 'torch' not in sys.modules")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        varlen_sft.nothing  # noqa: B018
    assert set(varlen_sft.__all__) <= set(dir(varlen_sft))
