"""What a table was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from varlen_sft import _extension

__all__ = ["environment", "version_of"]


def environment() -> dict[str, Any]:
    """What a table was measured on: versions, processor, threads, commit, date; no paths."""
    packages = ("varlen-sft", "torch", "transformers", "numpy")
    return {
        "versions": {"python": platform.python_version()} | {p: version_of(p) for p in packages},
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "cpp_extension": _extension.load(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def version_of(package: str) -> str:
    """Of an installed package, "not installed" for any other."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str:
    """Short hash of the checkout, "+" if it was changed since; "" where there is none.

    A copy that lacks its history is told in VARLEN_SFT_COMMIT what it is of.
    """
    if told := os.environ.get("VARLEN_SFT_COMMIT"):
        return told
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=9"]
    try:
        done = subprocess.run([*words, "--dirty=+"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
