"""These tests run Triton's interpreter, which has to be chosen before a kernel is imported."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
