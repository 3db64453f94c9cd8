"""The C++ extension: loaded when it can be, and plain words when it cannot."""

import subprocess
import warnings

import pytest

from varlen_sft import _extension


@pytest.fixture
def fresh(monkeypatch):
    """Forgets the answer of this process before and after a test."""

    def forget():
        _extension.load.cache_clear()
        _extension._outcome.cache_clear()

    forget()
    monkeypatch.delenv(_extension.DISABLE_VARIABLE, raising=False)
    yield monkeypatch
    monkeypatch.undo()
    forget()


def test_absent_library_warns_once_and_says_how_to_build(fresh, tmp_path):
    fresh.setattr(_extension, "LIBRARY", tmp_path / "_C.so")
    with pytest.warns(RuntimeWarning, match="not built.*torch path.*make setup") as caught:
        assert _extension.load() is False
        assert _extension.load() is False
    assert len(caught) == 1
    assert _extension.status() == f"not built ({tmp_path}/_C.so does not exist)"


def test_broken_library_says_why(fresh, tmp_path):
    (tmp_path / "_C.so").write_bytes(b"junk")
    fresh.setattr(_extension, "LIBRARY", tmp_path / "_C.so")
    with pytest.warns(RuntimeWarning, match="failed to load with torch .*file too short"):
        assert _extension.load() is False
    assert _extension.status().endswith("_C.so: file too short")


def test_disabled_is_quiet(fresh):
    fresh.setenv(_extension.DISABLE_VARIABLE, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _extension.load() is False
    assert _extension.status() == "disabled by VARLEN_SFT_DISABLE_EXTENSION=1"


def test_library_needs_no_python():
    if not _extension.LIBRARY.exists():
        pytest.skip("the extension is not built here")
    needed = subprocess.run(
        ["ldd", str(_extension.LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    assert "libtorch_cpu.so" in needed
    assert "libpython" not in needed and "libtorch_python" not in needed
