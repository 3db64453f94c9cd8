from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from varlen_sft.data.masks import MaskOptions
from varlen_sft.errors import InputError
from varlen_sft.train.config import ModelConfig, TrainConfig
from varlen_sft.train.config_data import DataConfig, StageConfig
from varlen_sft.train.config_file import parse_config, read_config
from varlen_sft.train.config_keys import ALIASES, GROUPS, KINDS
from varlen_sft.train.config_out import changes, dump

LEAST = "model: {name: m}\ndata: {train: x}\n"


def refused(text: str, *arguments: str, file: str | None = "run.yaml") -> str:
    """What a configuration is refused with."""
    with pytest.raises(InputError) as caught:
        parse_config(text, arguments, None if file is None else Path(file))
    return str(caught.value)


def test_little_is_enough_and_the_rest_are_defaults():
    config = parse_config(LEAST)
    assert config == TrainConfig(model=ModelConfig(name="m"), data=DataConfig(train=("x",)))
    assert config.stream.max_tokens == 4096 and config.optim.betas == (0.9, 0.95)
    assert config.data.masks == MaskOptions()


def test_a_key_may_stand_in_its_group_alone_or_with_its_path():
    by_group = parse_config(LEAST + "optim:\n  lr: 1e-3\n")
    assert by_group.optim.lr == 0.001  # which YAML 1.1 takes for text
    assert parse_config(LEAST + "lr: 1e-3") == by_group
    assert parse_config(LEAST + "optim.lr: 0.001") == by_group
    assert parse_config(LEAST, ["--optim.lr", "1e-3"]) == by_group
    assert parse_config(LEAST, ["--lr=1e-3"]) == by_group


def test_the_command_line_is_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(LEAST + "run: {seed: 1, steps: 5}\nstream: {weights: [1, 2]}\n")
    arguments = ["--seed", "2", "--max-tokens", "128", "--activation-checkpointing", "--weights",
                 "[1, 0.5]", "--out", "123", "--valid", "[a, b]", "--steps", "null"]  # fmt: skip
    config = read_config(file, arguments)
    assert (config.run.seed, config.run.steps, config.run.out) == (2, None, Path("123"))
    assert config.stream.max_tokens == 128 and config.stream.weights == (1.0, 0.5)
    assert config.model.activation_checkpointing is True
    assert config.data.valid == ("a", "b") and config.data.train == ("x",)


@pytest.mark.parametrize(
    ("theirs", "path", "value"),
    [
        ("train_on_completions_only: true", "data.supervision_mode", "assistant"),
        ("train_on_completions_only: false", "data.supervision_mode", "all"),
        ("supervision_mode: last_assistant", "data.supervision_mode", "last_assistant"),
        ("packing: true", "stream.packing", "planned"),
        ("packing: false", "stream.packing", "none"),
        ("sample_packing: false", "stream.packing", "none"),
        ("packing: streaming", "stream.packing", "streaming"),
        ("remove_cross_attention: false", "stream.isolate", False),
        ("conversation_column_name: chat", "data.conversation_column", "chat"),
        ("data: {conversation_column_name: chat}", "data.conversation_column", "chat"),
        ("seed: 7", "run.seed", 7),
        ("learning_rate: 0.5", "optim.lr", 0.5),
        ("sequence_len: 99", "stream.max_tokens", 99),
        ("save_total_limit: 4", "checkpoint.keep", 4),
    ],
)
def test_keys_that_others_use(theirs, path, value):
    group, name = path.split(".")
    text = f"model: {{name: m}}\ntrain: x\n{theirs}"
    assert getattr(getattr(parse_config(text), group), name) == value


def test_data_sets_of_the_hub_by_the_names_of_nanotron():
    text = "model: {name: m}\nhf_dataset: a/b\nhf_dataset_split: train[:10]"
    assert parse_config(text).data.train == ("hub:a/b@train[:10]",)
    text = "model: {name: m}\nhf_dataset: [a/b, c/d]\nhf_dataset_split: [u, v]"
    assert parse_config(text).data.train == ("hub:a/b@u", "hub:c/d@v")
    assert "1 or 2 entries" in refused("hf_dataset: [a, b]\nhf_dataset_split: [u, v, w]")
    assert "needs hf_dataset" in refused("data: {train: a.jsonl}\nhf_dataset_split: u")


STAGES = """
model: {name: m}
run: {steps: 10}
stages:
- {name: first, start_training_step: 1, train: [a, b], weights: [2, 1]}
- {name: then, start_training_step: 6, hf_dataset: c/d, hf_dataset_split: e}
"""


def test_stages():
    first = StageConfig(name="first", start_training_step=1, train=("a", "b"), weights=(2.0, 1.0))
    then = StageConfig(name="then", start_training_step=6, train=("hub:c/d@e",))
    config = parse_config(STAGES)
    assert config.stages == config.all_stages == (first, then)
    assert parse_config(STAGES.replace("stages:", "data_stages:")) == config
    one = parse_config(LEAST + "weights: [3]").all_stages
    assert [(s.start_training_step, s.train, s.weights) for s in one] == [(1, ("x",), (3.0,))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("step: 6", "step: 1"), "must rise from 1, are [1, 1]"),
        (("step: 1,", "step: 2,"), "must rise from 1, are [2, 6]"),
        (("steps: 10", "steps: 5"), "reach the last one's start 6, is 5"),
        (("train: [a, b]", "train: []"), "every stage must name a source"),
        (("name: first", "nam: first"), "unknown key stages.nam; the nearest is stages.name"),
        (("start_training_step: 6", "start_training_step: x"), "Got value: x"),
        (("run: {steps: 10}", "run: {steps: 10}\ntrain: x"), "data.train or stages"),
        (("run: {steps: 10}", "run: {steps: 10}\nweights: [1]"), "weights of its own"),
    ],
)
def test_stages_that_cannot_be(change, message):
    assert message in refused(STAGES.replace(*change))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "the nearest is learning_rate, which is optim.lr"),
        ("optim: {weight_decy: 1}", "optim.weight_decy; the nearest is optim.weight_decay"),
        ("stream: {seed: 1}", "unknown key stream.seed; the nearest is run.seed"),
        ("max_token: 1", "unknown key max_token; the nearest is stream.max_tokens"),
        ("checkpoints: {every: 1}", "unknown key checkpoints"),
        ("zzz: 1", "unknown key zzz; `varlen-sft train --print_config` prints all there are"),
        ("gradient_accumulation_steps: 4", "stream.packs_per_step is the global batch"),
        ("lr: 1\nlr: 2", "the mapping in line 1 has lr twice"),
        ("lr: 1\nlearning_rate: 2", "optim.lr is given twice, the second time as learning_rate"),
        ("optim: 3", "optim must be a mapping of keys to values, is 3"),
        ("train_on_completions_only: 3", "train_on_completions_only must be true or false, is 3"),
        ("lr: high", "optim.lr must be a number, is 'high'"),
        ("lr: -1", "optim.lr must be above 0, is -1.0"),
        ("lr: .nan", "optim.lr must be above 0, is nan"),
        ("steps: 1.5", "run.steps must be a whole number or null, is 1.5"),
        ("isolate: 1", "stream.isolate must be true or false, is 1"),
        ("dtype: fp8", "model.dtype must be one of bf16, fp32, is 'fp8'"),
        ("betas: [0.9]", "optim.betas must be a list of 2 numbers, is [0.9]"),
        ("betas: [0.9, 1]", "optim.betas must be in [0, 1), is (0.9, 1.0)"),
        ("weights: a", "stream.weights must be a list, each a number or null, is ['a']"),
        ("supervision_mode: roles", "data: train_roles must be given with"),
        ("train_roles: [user]", "data: train_roles must be given with"),
        ("valid_every: 3", "run.valid_every needs data.valid"),
        ("lora_rank: 4\nimpl: own", "model.lora_rank needs model.impl: hf"),
        ("keep: 0", "checkpoint.keep must be 1 or more, is 0"),
        ("a: [", "is no YAML: while parsing"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_told_by_key_and_file(line, message):
    found = refused(LEAST + line)
    assert message in found and found.startswith("run.yaml: ") and "\n" not in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr"], "expected --key value after the configuration file, got 'lr'"),
        (["--lr"], "--lr needs a value"),
        (["--lrr", "1"], "unknown key lrr; the nearest is optim.lr"),
        (["--lr", "x"], "optim.lr must be a number, is 'x'"),
        (["--lr", "1", "--optim.lr", "2"], "optim.lr is given twice"),
        (["--betas", "["], "optim.betas: is no YAML: '['"),
    ],
)
def test_a_wrong_argument_is_told_without_the_file(arguments, message):
    assert refused(LEAST, *arguments).startswith(message)


def test_what_has_to_be_said_is_asked_for(tmp_path):
    assert "model.name must be given" in refused("data: {train: x}")
    assert "data.train or stages must be given" in refused("model: {name: m}")
    assert "must be a mapping of keys to values, is a list" in refused("[1]")
    with pytest.raises(InputError, match="none.yaml: cannot be read"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(InputError, match="latin: cannot be read"):
        read_config(tmp_path / "latin")


@pytest.mark.parametrize("text", [LEAST, STAGES, LEAST + "lr: 3e-7\nout: 'a: b # ü'\ncache: c"])
def test_what_is_written_reads_as_the_same_and_says_what_every_key_means(text):
    config = parse_config(text)
    written = dump(config)
    assert parse_config(written) == config
    lines = [line.strip() for line in written.splitlines()]
    for path in KINDS:
        at = next(n for n, line in enumerate(lines) if line.startswith(f"{path.split('.')[-1]}: "))
        assert lines[at - 1].startswith("# ") and len(lines[at - 1]) > 8, path
    assert "# How it falls after the warm-up. (cosine, linear, constant)" in lines


def test_changes_are_told_by_key():
    before = parse_config(LEAST)
    now = parse_config(LEAST, ["--lr", "0.5", "--valid", "v"])
    assert changes(before, before) == []
    assert changes(before, now) == ["data.valid was [], is ['v']", "optim.lr was 2e-05, is 0.5"]


def test_names_point_to_keys_and_keys_are_few():
    assert set(ALIASES.values()) <= set(KINDS)
    assert not set(ALIASES) & {path.rpartition(".")[2] for path in KINDS}
    assert len(KINDS) <= 55  # a new one has to be worth more than one that is there
    for made in (*GROUPS.values(), StageConfig):
        assert made.__dataclass_params__.frozen and dataclasses.is_dataclass(made)


def test_reading_needs_no_torch():
    code = f"""
import sys
from varlen_sft.train.config_file import parse_config
from varlen_sft.train.config_out import dump
dump(parse_config({LEAST!r}))
heavy = {{"torch", "transformers", "pyarrow", "rich"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
