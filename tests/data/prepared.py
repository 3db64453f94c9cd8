"""A tiny model folder, rows, and the bytes of a prepared set."""

from __future__ import annotations

import json
from pathlib import Path

from tests.data.test_chat import CHATML, TOKENS, train_tokenizer
from varlen_sft.data.prepare import PrepareOptions, Progress, prepare
from varlen_sft.data.store import MANIFEST, file_of

SUFFIXES = (".bin", ".idx", ".weights", ".roles", MANIFEST)


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    train_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENS))
    return folder


def chat(question: str, answer: str, **message) -> dict:
    user = {"role": "user", "content": question}
    return {"messages": [user, {"role": "assistant", "content": answer, **message}]}


def chats(count: int = 40) -> list[dict]:
    return [chat(f"what is {i}? " + "hello " * (i % 7), f"it is {i * i}.") for i in range(count)]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(out: Path, model: Path, *inputs: object, progress: Progress = lambda *_: None, **options):
    """prepare with chunks of six rows."""
    options = {"chunk_rows": 6, "workers": 1} | options
    wanted = PrepareOptions(inputs=tuple(map(str, inputs)), model=model, out=out, **options)
    return prepare(wanted, progress)


def contents(prefix: Path) -> dict[str, bytes]:
    """All files that begin with the prefix, by what follows it."""
    files = (p for p in prefix.parent.glob(f"{prefix.name}*") if p.is_file())
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in files}


def change_manifest(prefix: Path, **fields: object) -> None:
    path = file_of(prefix, MANIFEST)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
