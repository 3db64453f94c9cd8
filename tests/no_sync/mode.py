"""A fake CUDA device that remembers what ran, and refuses what would wait for a real one."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

OURS = ("varlen_sft/", "tests/no_sync/")


class HostSync(Exception):
    """An operation that waits for the device, or that only its data can shape."""


class NoSync(TorchDispatchMode):
    """Raise HostSync where an operation on a fake device would make the host wait.

    The bodies of this package's opaque ops run too, as they would on a device; a Triton launch is
    noted and does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.bodies: list[str] = []
        self.launches: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reason := waits(func, args, kwargs):
            raise HostSync(f"{func} {reason}, at {_where()}")
        self.ops.append(str(func))
        if func.namespace == "varlen_sft":
            self.bodies.append(func.name().split("::")[1])
            with self:  # a mode is off inside its own handler
                return _body(func)(*args, **kwargs)
        return func(*args, **kwargs)


def waits(func, args, kwargs) -> str:
    """Why an op would wait for the device; "" if it does not."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    name = func.name()
    to = kwargs.get("device")
    devices = {x.device.type for x in tensors} | ({torch.device(to).type} if to else set())
    if "cuda" not in devices:
        return ""
    if "index" in name and any(x.dtype in (torch.bool, torch.uint8) for x in _indices(func, args)):
        return "with a mask has to count its rows"
    if name == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is not None:
        return ""
    if name in ("aten::index.Tensor", "aten::_unsafe_index.Tensor"):  # tagged, for the mask's sake
        return "with an index from the host" if len(devices) > 1 else ""
    if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
        return "gives what only the data can tell"
    copies = name in ("aten::_to_copy", "aten::copy_")
    blocking = not kwargs.get("non_blocking") and not (name == "aten::copy_" and args[2:])
    if copies and len(devices) > 1 and blocking:
        return f"copies between {' and '.join(sorted(devices))} and waits"
    return ""


INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}


def _indices(func, args) -> list[Tensor]:
    if func.name().split("::")[1].split(".")[0] not in INDEXING:
        return []
    return [index for index in args[1] if index is not None]


def _body(func):
    """What a ``torch.library.custom_op`` runs on a device."""
    from torch._library.custom_ops import OPDEFS

    definition = OPDEFS[func.name()]
    assert definition._backend_fns.keys() <= {None, "cuda", "cpu"}
    return definition._init_fn


def _where() -> str:
    """The newest line of ours on the stack."""
    ours = [
        frame
        for frame in traceback.extract_stack()
        if any(folder in frame.filename for folder in OURS) and frame.filename != __file__
    ]
    line = ours[-1]
    return f"{'/'.join(Path(line.filename).parts[-3:])}:{line.lineno}: {line.line}"


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors inside are fake, "cuda" is one of their devices, and no Triton launch happens."""
    import triton

    def launch(kernel, *args, **kwargs) -> None:
        for mode in reversed(_get_current_dispatch_mode_stack()):
            if isinstance(mode, NoSync):
                mode.launches.append(kernel.fn.__name__)

    patches = (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", launch),
        mock.patch.object(FakeTensor, "data_ptr", _address),
        mock.patch.object(torch.cuda, "_exchange_device", lambda index: 0),
        mock.patch.object(torch.cuda, "_maybe_exchange_device", lambda index: 0),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        # Modes get the eager formulas; what is to be seen here is what a device would run.
        mock.patch("varlen_sft.ops.elementwise.is_plain", lambda x: True),
    )
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode())
        yield


def _address(tensor: Tensor) -> int:
    """Equal for views that begin together, as addresses are."""
    return tensor.untyped_storage()._cdata * 4096 + tensor.storage_offset()
