"""``varlen-sft doctor``: its screen, its JSON, its exit codes, and ``--env``."""

from __future__ import annotations

import json
import re
from functools import partial
from importlib.metadata import version

import pytest

import varlen_sft
from tests.data.test_chat import CHATML
from tests.tools.doctor_cases import LAST_THOUGHT, ROWS, examined, write_folder
from varlen_sft import _extension, cli


@pytest.fixture
def folder(tmp_path):
    return partial(write_folder, tmp_path)


@pytest.fixture
def file(tmp_path):
    def make(*rows: dict):
        path = tmp_path / "chats [b].jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return path

    return make


@pytest.fixture
def doctor(capsys):
    def run(*words: object) -> tuple[int, str, str]:
        return cli.main(["doctor", *map(str, words)]), *capsys.readouterr()

    return run


def cells(screen: str) -> str:
    """The text of a table, its rules left out and its lines joined."""
    return re.sub(r"[\s│┃]+", " ", screen)


def test_the_screen_and_the_exit_code(doctor, folder, file, tmp_path):
    out = tmp_path / "report.json"
    code, screen, err = doctor(folder(), "--data", file(*ROWS), "--json", out)
    assert (code, err) == (1, "")
    assert f"template: {tmp_path}" in screen and "chats [b].jsonl" in screen
    assert "are rows refused? FAIL 4 of 40 rows, for 3 reasons, see below" in cells(screen)
    assert "2 5, 6 the content of message 2 spells the control token '<|im_end|>'" in cells(screen)
    assert re.search(r" 15 2\.\d the same as row 2 ", cells(screen))
    assert re.search(r"^2 failed, \d+\.\d s$", screen, flags=re.M)
    written = json.loads(out.read_text())
    again = examined(tmp_path, tmp_path / "chats [b].jsonl")
    del written["seconds"], again["seconds"]
    assert written == json.loads(json.dumps(again))
    code, screen, _ = doctor(folder())
    assert code == 0 and "nothing failed" in screen and "FAIL" not in screen


def test_a_template_of_its_own(doctor, folder, tmp_path):
    template = tmp_path / "other.jinja"
    template.write_text(CHATML.replace("'<|im_end|>' + ", ""))
    code, screen, _ = doctor(template, "--tokenizer", folder())
    assert code == 1 and "none: after an answer the template writes '\\n'" in cells(screen)
    template.write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert doctor(template, "--tokenizer", tmp_path)[0] == 0


def test_options_of_masks_are_heard(doctor, folder):
    model = folder(LAST_THOUGHT)
    assert [doctor(model, *words)[0] for words in ([], ["--history", "preserve"])] == [1, 0]


BAD = {
    "nothing to examine": ((), "which TEMPLATE-OR-MODEL?"),
    "no such folder": (("{}/none",), "none: no such folder or template"),
    "a template alone": (("{}/t.jinja",), "t.jinja: a template needs --tokenizer FOLDER"),
    "a folder with a tokenizer": (("{}", "--tokenizer", "{}"), "--tokenizer goes with a template"),
    "not Jinja": (("{}/t.jinja", "--tokenizer", "{}"), "t.jinja: not a Jinja template: line 1"),
    "no such file": (("{}", "--data", "{}/none.jsonl"), "none.jsonl: no such file"),
    "a machine and a model": (("{}", "--env"), "--env is asked alone"),
    "no place for JSON": (("{}", "--json", "{}/none/r.json"), "r.json: cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_line(case, doctor, folder, tmp_path):
    words, reason = BAD[case]
    folder()
    (tmp_path / "t.jinja").write_text("{% if %}")
    code, _, err = doctor(*(word.format(tmp_path) for word in words))
    assert code == 2 and err.count("\n") == 1 and reason in err


def test_env_tells_what_would_be_picked(doctor, tmp_path):
    out = tmp_path / "env.json"
    code, screen, _ = doctor("--env", "--json", out)
    told = json.loads(out.read_text())
    assert code == 0
    expected = {op: [list(one) for one in each] for op, each in varlen_sft.backends().items()}
    assert told["backends"]["cpu"] == expected
    assert told["versions"]["torch"] == version("torch")
    assert told["versions"]["tokenizers"] == version("tokenizers")
    assert told["extension"] == _extension.status()
    for op, candidates in expected.items():
        picked = next(name for name, word in candidates if word.startswith("picked"))
        assert re.search(rf"{picked} picked", cells(screen)), op
    assert "cross_entropy " in screen and f"torch {version('torch')}" in screen
