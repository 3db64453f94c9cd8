"""Argument checks of the ops. Messages name the argument, what was expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def require_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """TypeError unless the tensor has one of the dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def require_shape(name: str, tensor: Tensor, letters: str, *sizes: int | None) -> None:
    """ValueError unless the tensor has these sizes; None leaves a size free."""
    if tensor.dim() == len(sizes) and all(
        want is None or got == want for got, want in zip(tensor.shape, sizes, strict=True)
    ):
        return
    wanted = ", ".join(
        letter if size is None else f"{letter}={size}"
        for letter, size in zip(letters.split(), sizes, strict=True)
    )
    raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")


def require_same_device(**tensors: Tensor | None) -> None:
    """ValueError unless all tensors that are there live on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is not None and first is not None and tensor.device != first.device:
            raise ValueError(
                f"{name} must be on {first.device} like {first_name}, got {tensor.device}"
            )


def require_last_axis_contiguous(name: str, tensor: Tensor) -> None:
    """ValueError unless neighbours on the last axis are neighbours in memory."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous on its last axis, got strides {tensor.stride()}"
        )


def last_axis_dense(grad: Tensor) -> Tensor:
    """A gradient as kernels read it: an expanded one (of a sum, say) is copied, others pass."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()
