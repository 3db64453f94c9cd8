"""What prepare takes of memory, with vocabularies as models have them, and rows of any length."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.data.prepared import chat, jsonl
from tests.data.test_chat import CHATML

RUN = """
import sys
from pathlib import Path
from varlen_sft.data.prepare import PrepareOptions, prepare
model, data, out, workers = sys.argv[1:]
done = prepare(PrepareOptions(inputs=(data,), model=Path(model), out=Path(out),
                              workers=int(workers), sample_processor="noting:note"))
with open("/proc/self/status") as status:
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
print(peak, done.manifest["counts"]["tokens"])
"""
NOTING = """
import atexit, os
def tell():
    with open("/proc/self/status") as status:
        (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM"))
    with open(os.path.join(os.path.dirname(__file__), f"peak.{os.getpid()}"), "w") as file:
        file.write(peak)
if os.environ.get("TOKENIZERS_PARALLELISM") == "false":  # in a worker
    atexit.register(tell)
def note(row):
    return row
"""
WORKER, ALL = 200 * 1024, 600 * 1024  # kilobytes: of one worker; of all beside the workers


def model(folder: Path, tokenizer_json: str) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer_json)
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return folder


def rows(count: int, words: int) -> list[dict]:
    draw = random.Random(count)
    known = ["the", "model", "reads", "Äpfel", "漢字", "tokens", "and", "1024", "masks;\n"]
    texts = (" ".join(draw.choices(known, k=words)) for _ in range(2 * count))
    return [chat(question, answer) for question, answer in zip(texts, texts, strict=True)]


def test_memory_does_not_grow_with_the_length_of_rows(tmp_path, base):
    folder = model(tmp_path / "model", base("qwen")._encoder.tokenizer.to_str())
    (tmp_path / "noting.py").write_text(NOTING)
    # All of the long ones at once would take a hundred megabytes more.
    data = jsonl(tmp_path / "data.jsonl", [*rows(40, 5000), *rows(512, 2)])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    command = [sys.executable, "-c", RUN, folder, data, tmp_path / "set", 2]
    done = subprocess.run(list(map(str, command)), env=environment, check=True,
                          capture_output=True, text=True)  # fmt: skip
    peak, tokens = map(int, done.stdout.split())
    workers = [int(path.read_text()) for path in tmp_path.glob("peak.*")]
    assert len(workers) == 2 and tokens > 600_000
    assert max(workers) < WORKER
    assert peak < ALL
