"""Logs of runs that were never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tools.test_report import HOSTILE
from varlen_sft.tools.run_report import write_run_report

START = {
    "event": "start",
    "config": {
        "model.name": "/somewhere/of/mine/a <b> model", "model.dtype": "bf16",
        "data.train": ["/somewhere/chats.jsonl"], "data.valid": ["search:/somewhere/held.jsonl"],
        "run.out": "/somewhere/out", "optim.betas": [0.9, 0.95], "optim.lr": 1e-4,
        "data.template": None, "data.cache": "/somewhere/cache", "stages": [],
    },
    "ranks": 2, "steps": 30, "device": "CPU", "date": "2030-01-02 03:04 UTC",
    "versions": {"torch": "2.13.0"},
    "data": [
        {"use": "data", "source": "/somewhere/chats.jsonl", "fingerprint": "f", "rows": 2000,
         "samples": 1990, "tokens": 100000, "supervised": 25000,
         "left_out": {"rejected": 7, "overlong_dropped": 3}},
        {"use": "validation", "source": "search:/somewhere/held.jsonl", "fingerprint": "g",
         "rows": None, "samples": 9, "tokens": 400, "supervised": 100, "left_out": {}},
    ],
}  # fmt: skip


def step(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "event": "step", "step": number, "loss": 2.0 / number + 0.125, "grad_norm": 1.0 + number,
        "lr": 1e-5 * number, "real_tokens": 500 + number, "supervised_tokens": 100, "fill": 0.875,
        "step_time_s": 0.5, "stall_s": 0.125, "updated": True, "peak_memory": 3_000_000_000,
        "role_loss": {"assistant": 1.5, "tool": 0.5} if number % 2 else {"assistant": 1.5},
        "stop_loss": 0.25, "tflops": 1.5, "mfu": None, **changes,
    }  # fmt: skip


def sample(said: str, number: int = 1, exact: bool = False) -> dict[str, Any]:
    return {
        "source": "search:/somewhere/held.jsonl", "sample": number, "prompt": f"all of {number}",
        "asked": f"what is {number}? {HOSTILE}", "answer": "it is.<|im_end|>", "said": said,
        "exact": exact,
    }  # fmt: skip


def samples(number: int, *made: dict[str, Any]) -> dict[str, Any]:
    return {"event": "samples", "step": number, "seconds": 0.5, "samples": list(made)}


def validation(number: int, loss: float) -> dict[str, Any]:
    return {"event": "validation", "step": number, "loss": loss, "seconds": 1.0}


def whole() -> list[dict[str, Any]]:
    said = ["a", "b", HOSTILE, "d", "e", "it is.<|im_end|>"]
    events = [START, *(step(number) for number in range(1, 31))]
    for at, text in enumerate(said, 1):
        events.append(validation(5 * at, 3.0 - 0.25 * at if at < 6 else 9.0))
        exact = text.startswith("it is")
        events.append(samples(5 * at, sample(text, exact=exact), sample("no", 2)))
    return events


def page(folder: Path, *events: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(event) + "\n" for event in events]
    (folder / "log.jsonl").write_text("".join(lines), encoding="utf-8")
    return write_run_report(folder)
