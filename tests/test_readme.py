"""What README shows runs, and says what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_hf_config, tiny_model
from varlen_sft.data.formats import Conversation, Message

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def block(word: str) -> str:
    """The only block that has a word."""
    (found,) = (text for text in BLOCKS if word in text)
    return found


@pytest.fixture
def folder(tmp_path, smollm2_tokenizer_dir):
    config = tiny_hf_config(vocab_size=49152, max_position_embeddings=512)
    config["architectures"] = ["LlamaForCausalLM"]
    tiny_model(config, torch.float32).save_pretrained(tmp_path, copy_from=smollm2_tokenizer_dir)
    return tmp_path


def test_the_lines_you_write_train_the_answers(folder):
    conversations = [
        Conversation((Message("user", "hi"), Message("assistant", text)))
        for text in ("hello", "good morning to you")
    ]
    names = {"folder": folder, "conversations": conversations}
    exec(block("encode_many"), names)
    batch, model = names["batch"], names["model"]
    supervised = batch.labels[batch.labels != -100]
    from varlen_sft.data.chat import ChatTokenizer

    text = ChatTokenizer.from_folder(folder).decode(supervised.tolist())
    assert text == "hello<|im_end|>good morning to you<|im_end|>"
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_lines_you_have_run_too(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    conversations = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
        for text in ("hello", "good morning to you")
    ]
    names = {"folder": folder, "tokenizer": tokenizer, "conversations": conversations}
    exec(block("apply_chat_template"), names | {"AutoModelForCausalLM": AutoModelForCausalLM})


class Enough(Exception):
    """The loop over a stream has no end."""


def test_the_lines_that_stream_go_on_where_they_stopped(tmp_path, monkeypatch):
    from tests.data.streams import Made, lengths
    from varlen_sft.data.store_write import write_store

    monkeypatch.chdir(tmp_path)
    made = Made(lengths(3000, most=2000))
    Path("data").mkdir()
    write_store("data/chats", map(made.sample, range(3000)))

    def run(steps: int) -> list:
        seen: list = []

        def train(batches, counts):
            seen.append([batch.input_ids.sum().item() for batch in batches])
            assert [of.tokens for of in counts] == [len(batch.input_ids) for batch in batches]
            if len(seen) > steps:
                raise Enough

        names = {"rank": 0, "ranks": 4, "state": tmp_path / "stream.json", "train": train}
        with pytest.raises(Enough):
            exec(block("PackStream"), names)
        return seen

    first = run(3)
    assert all(len(step) == 8 for step in first)  # 32 packs, a quarter of them, one each
    assert run(2)[0] == first[3]  # the step that was not finished
    (tmp_path / "stream.json").unlink()
    assert run(5)[:4] == first


def test_the_names_that_are_listed_exist():
    exec(block("cu_seqlens_from_position_ids"), {})
    import varlen_sft

    listed = re.findall(r"^\| (`.*?) \|", README, flags=re.M)
    names = {name for cell in listed for name in re.findall(r"`(\w+)`", cell)}
    assert len(names) == 9 and names <= set(varlen_sft.__all__)


def test_the_lines_that_drop_in_train_and_leave_no_trace(folder, tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from varlen_sft.data.chat import ChatTokenizer
    from varlen_sft.integrations.hf import is_patched

    said = [("hi", "hello"), ("what?", "good morning to you"), ("who?", "nobody")]
    rows = [Conversation((Message("user", a), Message("assistant", b))) for a, b in said]
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(12)[None]
    names = {
        "model": model,
        "arguments": TrainingArguments(tmp_path / "out", max_steps=1, report_to=[], use_cpu=True),
        "samples": ChatTokenizer.from_folder(folder).encode_many(rows),
        "Trainer": Trainer,
    }
    exec(block("varlen_sft.Collator()"), names)
    (step,) = (entry for entry in names["trainer"].state.log_history if "train_loss" in entry)
    assert 5 < step["train_loss"] < 20  # of 49,152 tokens, untrained: about ln V = 10.8
    assert not is_patched(model) and model.config._attn_implementation == "sdpa"
    changed = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]
    assert changed and model.state_dict().keys() == before.keys()
    model.load_state_dict(before)
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.eval()(ids).logits, fresh.eval()(ids).logits)
