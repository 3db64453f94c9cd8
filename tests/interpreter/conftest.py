"""These tests run Triton's interpreter, which has to be chosen before a kernel is imported."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    _convert_float = interpreter._convert_float

    def _convert_float_like_hardware(data, source, target, rounding_mode):
        """The interpreter cuts fp32 off to bf16; GPUs, and Triton's compiler, round to nearest."""
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(data)).to(torch.bfloat16).view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):  # only faster
            return (data.astype(np.uint32) << 16).view(np.float32)
        return _convert_float(data, source, target, rounding_mode)

    interpreter._convert_float = _convert_float_like_hardware
