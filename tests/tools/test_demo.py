from __future__ import annotations

import html
import json

import pytest
import torch

from tests.helpers import tiny_hf_config, tiny_model
from varlen_sft import cli
from varlen_sft.data.formats import read_conversations, write_conversations
from varlen_sft.tools.demo_data import register_machine_conversations
from varlen_sft.tools.demo_model import cache_folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory, smollm2_tokenizer_dir):
    """The whole demo on a tiny Llama with SmolLM2's tokenizer: three steps, one timed round."""
    folder = tmp_path_factory.mktemp("a demo")
    config = tiny_hf_config(vocab_size=49152, max_position_embeddings=2048, bos_token_id=1)
    config |= {
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        "architectures": ["LlamaForCausalLM"],
    }
    tiny_model(config, torch.float32).save_pretrained(
        folder / "model", copy_from=smollm2_tokenizer_dir
    )
    write_conversations(folder / "chats.jsonl", register_machine_conversations(40, 0, 2, 5))
    code = cli.main(
        ["demo", "--model", str(folder / "model"), "--data", str(folder / "chats.jsonl"),
         "--out", str(folder / "out"), "--steps", "3", "--rounds", "1", "--max-tokens", "512",
         "--dtype", "fp32", "--debug"]
    )  # fmt: skip
    assert code == 0
    return folder


def test_the_checkpoint_opens_in_transformers_and_was_trained(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = AutoModelForCausalLM.from_pretrained(demo / "out/checkpoint")
    before = AutoModelForCausalLM.from_pretrained(demo / "model")
    assert trained.dtype == torch.float32
    assert not torch.equal(trained.model.norm.weight, before.model.norm.weight)
    text = AutoTokenizer.from_pretrained(demo / "out/checkpoint").apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_the_report_shows_what_was_measured(demo):
    page = (demo / "out/report.html").read_text(encoding="utf-8")
    summary = json.loads((demo / "out/summary.json").read_text())
    for row in summary["comparison"]["rows"]:
        assert f'data-value="{row["loss"]}"' in page
    for answer in summary["after"]["answers"]:
        assert html.escape(answer) in page


def test_the_log_has_a_line_per_step(demo):
    lines = [json.loads(line) for line in (demo / "out/log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "step", "step", "step"]
    assert [line["step"] for line in lines[1:]] == [1, 2, 3]
    for line in lines[1:]:
        assert line["loss"] > 0 and 0 < line["supervised_tokens"] < line["real_tokens"] <= 512


def test_the_summary_compares_padded_and_packed(demo):
    summary = json.loads((demo / "out/summary.json").read_text())
    compared = summary["comparison"]
    padded, packed = compared["rows"]
    assert (padded["candidate"], packed["candidate"]) == ("hf padded", "ours")
    assert compared["loss_difference"] <= 2e-5 * padded["loss"]
    assert packed["tokens_computed"] < compared["real_tokens"] < padded["tokens_computed"]
    assert packed["peak_bytes"] > 10**8 and padded["seconds_median"] > 0
    assert summary["before"]["validation_loss"] != summary["after"]["validation_loss"]
    assert len(summary["before"]["answers"]) == len(summary["after"]["answers"]) == 2


def test_the_data_is_there_to_read_and_the_held_out_part_is_held_out(demo):
    train, held_out = (
        [conversation for _, conversation in read_conversations(demo / f"out/data/{name}.jsonl")]
        for name in ("train", "validation")
    )
    everything = [conversation for _, conversation in read_conversations(demo / "chats.jsonl")]
    assert len(train) + len(held_out) == len(everything) and held_out
    assert not set(train) & set(held_out)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"VARLEN_SFT_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/varlen_sft"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/varlen_sft"),
        ({}, "/home/me/.cache/varlen_sft"),
    ],
)
def test_the_cache_follows_the_xdg_rules(environment, expected, monkeypatch):
    for name in ("VARLEN_SFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected
