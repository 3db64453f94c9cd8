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
    exec(BLOCKS[1], names)
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
    exec(BLOCKS[0], names | {"AutoModelForCausalLM": AutoModelForCausalLM})


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
            exec(BLOCKS[2], names)
        return seen

    first = run(3)
    assert all(len(step) == 8 for step in first)  # 32 packs, a quarter of them, one each
    assert run(2)[0] == first[3]  # the step that was not finished
    (tmp_path / "stream.json").unlink()
    assert run(5)[:4] == first


def test_the_names_that_are_listed_exist():
    exec(BLOCKS[3], {})
    import varlen_sft

    listed = re.findall(r"^\| (`.*?) \|", README, flags=re.M)
    names = {name for cell in listed for name in re.findall(r"`(\w+)`", cell)}
    assert len(names) == 9 and names <= set(varlen_sft.__all__)
