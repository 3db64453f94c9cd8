"""``varlen-sft doctor --env``: what would compute each op here, and versions."""

from __future__ import annotations

import platform
from typing import Any

__all__ = ["describe_environment"]

PACKAGES = ("varlen-sft", "torch", "triton", "transformers", "tokenizers", "numpy")


def describe_environment() -> dict[str, Any]:
    """Versions, the state of the C++ extension, and ``varlen_sft.backends()`` of each device.

    Returns:
        versions: of python and PACKAGES, "not installed" for those that are missing.
        extension: in one line.
        devices: of "cpu", and "cuda" where torch finds one.
        backends: for each device, for each op, (implementation, "picked", "available" or why not).
    """
    import torch

    from varlen_sft import _extension
    from varlen_sft.ops.backends import backends
    from varlen_sft.tools.environment import version_of

    devices = {"cpu": platform.machine()}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name()
    return {
        "versions": {"python": platform.python_version()} | {p: version_of(p) for p in PACKAGES},
        "extension": _extension.status(),
        "devices": devices,
        "backends": {device: backends(device) for device in devices},
    }
