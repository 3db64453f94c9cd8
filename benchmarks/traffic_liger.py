"""Liger's fused linear cross-entropy, made to take on a CPU the way it takes on a GPU."""

from __future__ import annotations

import sys
import types
from importlib.metadata import version
from pathlib import Path

from liger_kernel.ops import fused_linear_cross_entropy


def liger_on_cuda() -> types.ModuleType:
    """Liger's fused head as it runs on an Ampere or newer GPU, on CPU tensors.

    Its branches for CUDA accumulate the weight's gradient in place; those for the CPU, which
    nobody trains on, would add several passes over it.
    """
    text = Path(fused_linear_cross_entropy.__file__).read_text(encoding="utf-8")
    changes = {
        '.device.type == "cuda"': '.device.type == "cpu"',
        '.device.type != "cuda"': '.device.type != "cpu"',
        "torch.cuda.get_device_capability(grad_weight.device)": "(9, 0)",
    }
    for before, after in changes.items():
        if before not in text:
            sys.exit(f"Liger {version('liger-kernel')} is another one: it does not ask {before}")
        text = text.replace(before, after)
    patched = types.ModuleType(fused_linear_cross_entropy.__name__)
    exec(compile(text, fused_linear_cross_entropy.__file__, "exec"), patched.__dict__)
    return patched
