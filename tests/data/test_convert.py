"""convert: tokens and weights come back bit for bit, and text is what the tokens spell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.megatron_files import write
from tests.data.prepared import chat, contents, jsonl, made, model_folder
from varlen_sft import cli
from varlen_sft.data.convert import convert
from varlen_sft.data.masks import MaskOptions
from varlen_sft.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("convert") / "model")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    rows = [chat("hello", "it is."), chat("what?", "é🤖", weight=0.1)]
    made(folder / "set", model, jsonl(folder / "chats.jsonl", rows))
    return folder / "set"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tokens_and_weights_there_and_back(tmp_path, model, prefix):
    assert convert(str(prefix), tmp_path / "back.jsonl") == 2
    first, second = lines(tmp_path / "back.jsonl")
    assert first.keys() == second.keys() == {"input_ids", "loss_mask"}
    assert set(first["loss_mask"]) == {0, 1}
    assert set(second["loss_mask"]) == {0, float(np.float32(0.1))}
    made(tmp_path / "again", model, tmp_path / "back.jsonl", masks=MaskOptions())
    for suffix in (".bin", ".idx", ".weights"):
        assert contents(tmp_path / "again")[suffix] == contents(prefix)[suffix]


def test_the_text_of_each_run(tmp_path, model, prefix, capsys):
    out = tmp_path / "text.jsonl"
    assert cli.main(["convert", str(prefix), str(out), "--decode", str(model)]) == 0
    assert capsys.readouterr().out == f"{out}: 2 samples\n"
    assert [list(s.values()) for s in lines(out)[1]["segments"]] == [
        ["none", 0, "<|im_start|>user\n"],
        ["user", 0, "what?"],
        ["none", 0, "<|im_end|>\n<|im_start|>assistant\n"],
        ["assistant", float(np.float32(0.1)), "é🤖<|im_end|>"],
        ["none", 0, "\n"],
    ]
    with pytest.raises(InputError, match=r"row 1: expected 'input_ids', 'messages'"):
        made(tmp_path / "no", model, out)  # nobody takes it for data


def test_other_sets_say_what_is_trained(tmp_path):
    plain = write(tmp_path / "plain", [[[1, 2]], [[3, 1, 0, 1]]])
    with pytest.raises(InputError, match=r"plain, row 1: input_ids without labels"):
        convert(str(plain), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(f"pretrain:{plain}", tmp_path / "out")
    assert lines(tmp_path / "out") == [
        {"input_ids": [1, 2], "loss_mask": [1, 1]},
        {"input_ids": [3, 1, 0, 1], "loss_mask": [1, 1, 1, 1]},
    ]
    convert(f"sft:{write(plain, [[[3, 1, 1, 0]]])}", tmp_path / "out")
    assert lines(tmp_path / "out") == [{"input_ids": [3, 1], "loss_mask": [0, 1]}]
    for row in ({"text": "x"}, chat("a", "b")):
        with pytest.raises(InputError, match="row 1: expected tokens and what of them is trained"):
            convert(str(jsonl(tmp_path / "rows.jsonl", [row])), tmp_path / "no")
    with pytest.raises(InputError, match=r"no/out: cannot be written: No such file"):
        convert(f"sft:{plain}", tmp_path / "no" / "out")


def test_ids_of_another_tokenizer_are_named(tmp_path, model, prefix):
    from varlen_sft.data.chat import ChatTokenizer

    plain = write(tmp_path / "plain", [[[1, 2]], [[9999]]])
    tokenizer = ChatTokenizer.from_folder(model)
    with pytest.raises(InputError, match=r"plain, row 2: not of this tokenizer: ids must be in"):
        convert(f"pretrain:{plain}", tmp_path / "out", tokenizer)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("source", ["packed", "sft:masked", "pretrain:plain", "tokens+mask"])
def test_every_kind_of_set_is_the_same_after_json_lines(tmp_path, model, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = -(2**31)
    pack = [0x53465442, 1, 2, 0, 3, 5, 6 + trained, 7, 8, 9 + trained]
    write(Path("packed"), [[pack]], 4)
    write(Path("masked"), [[[5, 6, 7, 0, 1, 0]], [[8, 9, 0, 0]]])
    write(Path("plain"), [[[5, 6, 7]], [[8, 9]]])
    if source == "tokens+mask":
        rows = [chat("hello", "it is."), chat("what?", "hello")]
        made(tmp_path / source, model, jsonl(tmp_path / "rows.jsonl", rows), layout=source)
    assert convert(source, tmp_path / "rows.jsonl") == 2
    made(tmp_path / "straight", model, source)
    made(tmp_path / "around", model, tmp_path / "rows.jsonl")
    straight, around = contents(tmp_path / "straight"), contents(tmp_path / "around")
    for suffix in (".bin", ".idx", ".weights"):
        assert straight[suffix] == around[suffix]
    if source in ("packed", "sft:masked"):
        assert [line["loss_mask"] for line in lines(tmp_path / "rows.jsonl")] == [[0, 0, 1], [0, 0]]


def test_a_multimodal_set_is_refused_by_every_command(tmp_path, model, capsys):
    write(tmp_path / "set", [[[1, 2], [3]]], modes=b"\0\1")
    source = f"pretrain:{tmp_path / 'set'}"
    told = f"varlen-sft: error: {tmp_path / 'set'}.idx: a multimodal data set (it stores modes), "
    for command in (
        ["convert", source, str(tmp_path / "out")],
        ["prepare", source, "--model", str(model), "--out", str(tmp_path / "out")],
    ):
        assert cli.main(command) == 2
        assert capsys.readouterr().err.startswith(told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.bin", "set.idx"]
