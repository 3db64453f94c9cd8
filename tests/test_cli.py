from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.helpers import tiny_hf_config, tiny_model
from varlen_sft import cli

QUESTION = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def run(capsys, *arguments) -> tuple[int, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


@pytest.fixture
def model_folder(tmp_path, smollm2_tokenizer_dir):
    """A tiny Llama with SmolLM2's tokenizer and template, whose vocabulary is cut to 40,000."""
    folder = tmp_path / "model"
    config = tiny_hf_config(vocab_size=40_000, max_position_embeddings=2048)
    tiny_model(config).save_pretrained(folder, copy_from=smollm2_tokenizer_dir)
    return folder


def jsonl(tmp_path, *rows):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "chats.jsonl, row 2: not JSON"),
        (
            {"messages": [{"role": "robot", "content": "x"}, ANSWER]},
            "row 2: .*unknown role 'robot'",
        ),
        ({"messages": []}, "row 2: .*empty"),
        # "zebra" and the like have ids above 40,000 in SmolLM2's vocabulary.
        (
            {"messages": [QUESTION, {**ANSWER, "content": " inquisit"}]},
            "row 2: token .* has the id",
        ),
        (
            {"messages": [QUESTION, {**ANSWER, "content": "a " * 200}]},
            "row 2: .* do not fit a pack",
        ),
    ],
)
def test_a_bad_row_is_one_line_and_exit_code_2(row, message, capsys, tmp_path, model_folder):
    good = {"messages": [QUESTION, ANSWER]}
    data = jsonl(tmp_path, good, row, good)
    out = tmp_path / "out"
    code, err = run(capsys, "demo", "--model", model_folder, "--data", data, "--out", out,
                    "--max-tokens", 128)  # fmt: skip
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("varlen-sft: error: ")
    assert re.search(message, err), err
    assert not out.exists()


def test_bad_files_and_folders(capsys, tmp_path, model_folder):
    code, err = run(capsys, "demo", "--model", model_folder, "--data", tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl: " in err
    code, err = run(capsys, "demo", "--model", tmp_path)
    assert code == 2 and "no config.json" in err
    one = jsonl(tmp_path, {"messages": [QUESTION, ANSWER]})
    code, err = run(capsys, "demo", "--model", model_folder, "--data", one)
    assert code == 2 and "two conversations or more are needed" in err
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    code, err = run(capsys, "demo", "--model", model_folder, "--data", one)
    assert code == 2 and "model_type must be one of llama, got 'gemma3'" in err


def test_a_traceback_only_with_debug(tmp_path):
    with pytest.raises(Exception, match="no config.json"):
        cli.main(["demo", "--debug", "--model", str(tmp_path)])


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--minutes", "x"], ["--dtype", "fp8"], []])
def test_wrong_usage_exits_with_2(wrong):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *wrong] if wrong else [])
    assert stop.value.code == 2


def test_help_teaches_without_importing_torch():
    code = """
import sys
from varlen_sft.cli import main
try:
    main(["demo", "--help"])
finally:
    heavy = {"torch", "numpy", "transformers", "rich"} & sys.modules.keys()
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "(default: 2048)" in done.stdout
