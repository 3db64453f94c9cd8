"""``varlen-sft doctor`` on templates of real models, with their control tokens."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer

from tests.data.templates.templates import FACTS, sources
from tests.data.templates.tokenizers import byte_level, with_tokens
from tests.tools.doctor_cases import HISTORY, PREFIX, asked, failed, write_folder

STOCK = {
    "llama3_1": (set(), "yes, each of 8 earlier answers"),
    "qwen3": (
        {HISTORY},
        "8 of 8 earlier answers change: 4 lose their thinking and 4 lose what the template writes "
        "around the last answer; use history=per_assistant, or answers are trained as no model "
        "would say them",
    ),
    "qwen3_5_think": (
        {HISTORY},
        "8 of 8 earlier answers change: 4 lose their thinking and 4 lose what the generation "
        "prompt ends in; use history=per_assistant, or answers are trained as no model would say "
        "them",
    ),
    "gptoss": (
        {HISTORY},
        "7 of 8 earlier answers change: 2 lose their thinking and 5 end with another stop token; "
        "use history=per_assistant, or answers are trained as no model would say them",
    ),
    "deepseekv3": ({PREFIX}, "yes, each of 6 earlier answers"),
    "glm4moe_training": (
        {HISTORY},
        "4 of 8 earlier answers change: 4 lose their thinking; use history=per_assistant, or "
        "answers are trained as no model would say them",
    ),
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_templates(name, tmp_path):
    """Their faults are known: in as_rendered, what they do to earlier answers would be trained."""
    if name not in sources():
        pytest.skip("needs the chat templates of trl: pip install --no-deps trl")
    facts, (faults, history) = FACTS[name], STOCK[name]
    json_text = with_tokens(byte_level(), facts)
    path = write_folder(tmp_path, sources()[name], json_text, **facts.variables)
    ids = [Tokenizer.from_str(json_text).token_to_id(token) for token in facts.stops]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    found = asked(path)
    assert failed(found) == faults
    assert found[HISTORY][1] == history
    if faults == {HISTORY}:
        assert failed(asked(path, history="per_assistant")) == set()
