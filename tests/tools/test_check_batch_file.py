"""``varlen-sft check --batch``: a batch in a file, the mistakes in it on the screen and as JSON."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tools.setups import BOS, EOS, features, packed, padded
from varlen_sft import cli

SAMPLES = features([5, 7, 4])
CONFIG = {
    "model_type": "llama", "eos_token_id": EOS, "bos_token_id": BOS, "num_attention_heads": 4,
    "hidden_size": 64, "max_position_embeddings": 6,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A model of which only the small files are there: pad is the stop token, by its tokenizer."""
    made = tmp_path / "model"
    made.mkdir()
    token = {"id": EOS, "content": "<end>"}
    files = {
        "config.json": CONFIG,
        "tokenizer_config.json": {"pad_token": "<end>"},
        "tokenizer.json": {"added_tokens": [token]},
    }
    for name, value in files.items():
        (made / name).write_text(json.dumps(value))
    return made


def written(path, batch, **more):
    lists = {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in batch.items()
    }
    path.write_text(json.dumps({**lists, **more}))
    return str(path)


def test_a_right_batch_passes(tmp_path, capsys):
    path = written(tmp_path / "b.json", packed(SAMPLES, flash=True))
    assert cli.main(["check", "--batch", path]) == 0
    screen = capsys.readouterr().out
    assert "1 row of 16 tokens, 3 samples by cu_seq_lens_q" in screen
    assert "no mistake found" in screen


def test_mistakes_are_told_and_written(tmp_path, folder, capsys):
    batch = padded(SAMPLES, pad=EOS)
    batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == EOS, -100)
    ids = [sample["input_ids"].tolist() for sample in SAMPLES]
    path = written(tmp_path / "b.json", batch, samples=ids)
    out = tmp_path / "out.json"
    assert cli.main(["check", str(folder), "--batch", path, "--json", str(out)]) == 1
    screen = capsys.readouterr().out
    assert "pad = eos is masked by value\n  row 0, column 4: token 2" in screen
    assert "what it does: the stop token is never trained" in screen
    assert "RoPE depends on the longest of the batch\n  row 0, column 0: sample 0 has 5" in screen
    assert "2 mistakes" in screen
    result = json.loads(out.read_text())
    assert [(m["name"], m["row"], m["column"]) for m in result["mistakes"]] == [
        ("pad = eos is masked by value", 0, 4),
        ("RoPE depends on the longest of the batch", 0, 0),
    ]
    assert result["samples"][1] == {"row": 1, "start": 0, "end": 7}


def test_the_pad_token_is_the_tokenizers(tmp_path, folder, capsys):
    batch = packed(SAMPLES, flash=True)
    batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == EOS, -100)
    path = written(tmp_path / "b.json", batch)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["check", str(folder), "--batch", path]) == 1
    assert "pad = eos is masked by value\n  row 0, column 4" in capsys.readouterr().out
    assert cli.main(["check", "--batch", path]) == 0  # nobody says what the pad token is
    (folder / "tokenizer.json").unlink()
    assert cli.main(["check", str(folder), "--batch", path]) == 0


def test_safetensors_and_a_suspicion(tmp_path, folder, capsys):
    save_file = pytest.importorskip("safetensors.torch").save_file
    batch = packed(SAMPLES)
    save_file({"input_ids": batch["input_ids"][:, :5].repeat(1, 1)}, tmp_path / "one.safetensors")
    assert cli.main(["check", str(folder), "--batch", str(tmp_path / "one.safetensors")]) == 0
    ids = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_type"] = "default"
    (folder / "config.json").write_text(json.dumps(config))
    save_file(ids, tmp_path / "b.safetensors")
    capsys.readouterr()
    assert cli.main(["check", str(folder), "--batch", str(tmp_path / "b.safetensors")]) == 0
    screen = capsys.readouterr().out
    assert (
        "positions are not reset (suspected)\n  row 0, column 5: token 1, which can begin" in screen
    )
    assert "no mistake found, 1 suspected" in screen
    numbers = packed(SAMPLES, flash=True)
    numbers["cu_seq_lens_k"] = numbers["cu_seq_lens_k"].clone()
    tensors = {key: torch.as_tensor(value) for key, value in numbers.items()}
    save_file(tensors, tmp_path / "flash.safetensors")
    assert cli.main(["check", "--batch", str(tmp_path / "flash.safetensors")]) == 0


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("b.pt", "", "from .safetensors or .json, got '.pt' (a pickle would run code)"),
        ("b.json", "{", "not JSON"),
        ("b.json", "[1]", "must hold an object of lists by name"),
        ("b.json", '{"labels": [[1]]}', "batch must have input_ids, got labels"),
        ("b.json", '{"input_ids": [[1, 2], [3]]}', "b.json: "),
        ("b.safetensors", "x", "not a readable safetensors file"),
    ],
)
def test_bad_files_are_named(name, content, reason, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert cli.main(["check", "--batch", str(tmp_path / name)]) == 2
    assert reason in capsys.readouterr().err


def test_options_that_do_not_go_together(tmp_path, folder, capsys):
    path = written(tmp_path / "b.json", packed(SAMPLES))
    assert cli.main(["check", "--batch", path, "--html", "x.html"]) == 2
    assert "takes MODEL and --json" in capsys.readouterr().err
    assert cli.main(["check", "--batch", str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path), "--batch", path]) == 2
    assert "no config.json" in capsys.readouterr().err
    (folder / "config.json").write_text("[]")
    assert cli.main(["check", str(folder), "--batch", path]) == 2
    assert "must hold a JSON object" in capsys.readouterr().err


def test_a_tensor_is_read_as_it_is():
    """What a training loop has at hand: other dtypes, and keys that say nothing here."""
    from varlen_sft.tools.check_setup import inspect_batch

    batch = packed(SAMPLES)
    batch = {key: value.int() for key, value in batch.items()} | {"num_items_in_batch": 3}
    assert inspect_batch(batch, samples=[s["input_ids"].numpy() for s in SAMPLES]) == []
    batch["attention_mask"] = torch.ones(1, 16, dtype=torch.bfloat16)
    assert [m.name for m in inspect_batch(batch)] == ["a mask beside packed ids"]
