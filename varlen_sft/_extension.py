"""Loads the C++ operators of csrc/ (namespace `varlen_sft_c`), built into `_C.so` beside this file.

The ops ask `load()` before they use one. Where it answers False they use plain torch instead:
the same results, more memory traffic.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

LIBRARY = Path(__file__).with_name("_C.so")
DISABLE_VARIABLE = "VARLEN_SFT_DISABLE_EXTENSION"
_HOW_TO_BUILD = (
    "to build it: `make setup` in a checkout, or `pip install --no-build-isolation` from source "
    "with torch>=2.11 and a C++ compiler"
)


@functools.cache
def load() -> bool:
    """Whether the operators `torch.ops.varlen_sft_c.*` can be called; loads them the first time.

    Warns (RuntimeWarning) once when they cannot, with the reason, unless they were disabled by
    VARLEN_SFT_DISABLE_EXTENSION=1. The answer holds for the life of the process.
    """
    loaded, state, disabled = _outcome()
    if not loaded and not disabled:
        text = f"varlen_sft: C++ extension {state}. CPU ops use the torch path; {_HOW_TO_BUILD}."
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return loaded


def status() -> str:
    """One line for people: loaded, disabled, not built, or why loading failed. Never warns."""
    return _outcome()[1]


@functools.cache
def _outcome() -> tuple[bool, str, bool]:
    """(loaded, the state in words, disabled by the environment); tries once per process."""
    value = os.environ.get(DISABLE_VARIABLE, "")
    if value not in ("", "0"):
        return False, f"disabled by {DISABLE_VARIABLE}={value}", True
    if not LIBRARY.exists():
        return False, f"not built ({LIBRARY} does not exist)", False

    import torch  # not at the top: `varlen_sft._extension` itself must import without torch

    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        reason = error.__cause__ or error  # torch's own text names the file, the linker's the fault
        return False, f"failed to load with torch {torch.__version__}: {reason}", False
    return True, f"loaded from {LIBRARY}", False
