from __future__ import annotations

import subprocess
import sys

import pytest

from tests.train.setups import small_run
from varlen_sft import cli
from varlen_sft.commands.train import EXAMPLE
from varlen_sft.train.config_file import parse_config
from varlen_sft.train.config_out import dump


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["train", *map(str, arguments)])
    return code, *capsys.readouterr()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump(small_run(tmp_path)))
    return path


def test_a_file_and_keys_over_it_train_a_model(capsys, file, tmp_path):
    code, said, _ = run(capsys, file, "--steps", 2, "--lr=0.01")
    assert code == 0 and "step 2: validation loss" in said and "tokenising" not in said
    assert f"written: {tmp_path}/out/model" in said
    assert f"written: {tmp_path}/out/report.html" in said
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "llama, 2 of 2 steps" in page and 'data-said="said"' in page
    assert (tmp_path / "out" / "model" / "config.json").is_file()
    config = parse_config((tmp_path / "out" / "config.yaml").read_text())
    assert (config.run.steps, config.optim.lr) == (2, 0.01)


def test_no_file_is_needed(capsys, file, tmp_path):
    keys = [f"--{key}={value}" for key, value in {
        "name": tmp_path / "llama", "train": tmp_path / "chats.jsonl", "steps": 1,
        "max-tokens": 128, "packs-per-step": 2, "out": tmp_path / "bare", "dtype": "fp32",
    }.items()]  # fmt: skip
    code, said, _ = run(capsys, *keys)
    assert code == 0 and (tmp_path / "bare" / "model" / "model.safetensors").is_file()
    assert "validation" not in said


def test_the_configuration_is_printed_and_nothing_is_done(capsys, file, tmp_path):
    code, printed, _ = run(capsys, file, "--lr", "0.5", "--print_config")
    assert code == 0 and parse_config(printed) == small_run(tmp_path, "--lr", "0.5")
    assert not (tmp_path / "out").exists()
    code, printed, _ = run(capsys, "--print-config")
    assert code == 0 and parse_config(printed) == parse_config(EXAMPLE)
    code, printed, _ = run(capsys, "--print-config", "--name", "m", "--train", "x")
    assert code == 0 and parse_config(printed).model.name == "m"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "unknown key learning_rat; the nearest is learning_rate"),
        (["--lr", "0"], "optim.lr must be above 0"),
        (["--name", "nowhere"], "nowhere: no such folder"),
        (["--train", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--packs_per_step", "3", "--accumulate", "2"], "packs_per_step must be a multiple of"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(capsys, file, arguments, message):
    code, _, err = run(capsys, file, *arguments)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("varlen-sft: error: ") and message in err


def test_a_traceback_only_with_debug_wherever_it_stands(capsys, file):
    with pytest.raises(ValueError, match="no such folder"):
        run(capsys, file, "--name", "nowhere", "--debug")
    assert run(capsys)[0] == 2
    code, _, err = run(capsys, "--lr", "1", file)
    assert code == 2 and f"expected --key value after the configuration file, got '{file}'" in err


def test_help_teaches_by_an_example_without_importing_anything_heavy():
    code = """
import sys
from varlen_sft.cli import main
try:
    main(["train", "any.yaml", "--lr", "3", "--help"])
finally:
    heavy = {"torch", "numpy", "yaml", "jsonargparse", "rich"} & sys.modules.keys()
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: varlen-sft train [CONFIG] [--key value ...]" in done.stdout
    for line in EXAMPLE.splitlines():
        assert f"  {line}\n" in done.stdout
