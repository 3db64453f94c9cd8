"""Who computes an op: one table of implementations, one rule that picks."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from varlen_sft import _extension
from varlen_sft.ops import attention_flash


class Backend(NamedTuple):
    """One implementation of an op, and whether it can run here."""

    name: str
    device_types: tuple[str, ...]
    missing: str = ""  # why it cannot run here, if it cannot
    note: str = ""  # what a user should know before asking for it


def _unless_installed(package: str, name: str) -> str:
    """Why a package's implementation cannot run; "" when it can. Imports nothing heavy."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    return "" if found else f"{name} is not installed"


def _without_cuda_kernels() -> str:
    """Why the loaded C++ library has no CUDA kernels; "" when it has."""
    if not _extension.load():
        return _extension.status()
    if torch._C._dispatch_has_kernel_for_dispatch_key("varlen_sft_c::sequences", "CUDA"):
        return ""
    if torch.version.cuda is None:
        return f"built without CUDA kernels: torch {torch.__version__} is a build without CUDA"
    return "built without CUDA kernels: build with VARLEN_SFT_REQUIRE_CUDA=1 to see the reason"


# Found out once, here: torch.compile then sees constants, and an op asks nothing per call.
CPP = Backend("cpp", ("cpu",), "" if _extension.load() else _extension.status())
CUDA = Backend("cuda", ("cuda",), _without_cuda_kernels())
REFERENCE = Backend("reference", ("cpu", "cuda"))
SDPA = Backend("sdpa", ("cpu", "cuda"))
# Triton's interpreter runs the kernels on the CPU, slowly: never picked there, only asked for.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON = Backend(
    "triton", ("cuda", "cpu") if INTERPRETED else ("cuda",), _unless_installed("triton", "triton")
)

FLASH = {
    name: Backend(
        name,
        ("cuda",),
        attention_flash.missing(name),
        "untested: only the signature is checked" if name.endswith(("_3", "_4")) else "",
    )
    for name in attention_flash.IMPLS
}

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "sequences": (CUDA, CPP, REFERENCE),
    "rope": (CPP, TRITON, REFERENCE),
    "attention": (
        FLASH["flash_attn_2"],
        FLASH["torch_varlen"],
        CPP,
        SDPA,
        REFERENCE,
        FLASH["flash_attn_3"],
        FLASH["flash_attn_4"],
    ),
    "cross_entropy": (CPP, TRITON, REFERENCE),
    "elementwise": (CPP, TRITON, REFERENCE),
}
"""Implementations of each op, the preferred one first."""


def resolve(
    op: str,
    impl: str | None,
    device: torch.device,
    refuses: Callable[[str], object] = lambda name: None,
) -> str:
    """Name of the implementation that will run.

    Args:
        op: a key of ``BACKENDS``.
        impl: the one that the caller asks for, or None for the first that can run on the device.
        device: where the tensors live.
        refuses: says whether an implementation cannot take these inputs; such a one is not picked,
            but runs, and raises, when it is asked for.

    Raises:
        ValueError: ``impl`` is unknown, or does not run on this device.
        RuntimeError: ``impl`` is known but not installed. An explicit request never falls back.
    """
    known = {backend.name: backend for backend in BACKENDS[op]}
    if impl is None:
        return next(
            name
            for name, backend in known.items()
            if device.type in backend.device_types and not backend.missing and not refuses(name)
        )
    if impl not in known:
        raise ValueError(f"impl must be None or one of {', '.join(known)}, got {impl!r}")
    if device.type not in known[impl].device_types:
        raise ValueError(
            f"impl={impl!r} runs on {' and '.join(known[impl].device_types)}, "
            f"got tensors on {device.type}"
        )
    if known[impl].missing:
        raise RuntimeError(f"impl={impl!r} cannot run: {known[impl].missing}")
    return impl


def backends(device: torch.device | str = "cpu") -> dict[str, list[tuple[str, str]]]:
    """What each op would run on a device, and why.

    Returns:
        For each op its implementations in order of preference, each with a word: "picked",
        "available", or why it cannot run, and what else one should know of it.
    """
    device = torch.device(device)
    table: dict[str, list[tuple[str, str]]] = {}
    for op, candidates in BACKENDS.items():
        picked = resolve(op, None, device)
        table[op] = [(backend.name, _word(backend, device, picked)) for backend in candidates]
    return table


def _word(backend: Backend, device: torch.device, picked: str) -> str:
    if device.type not in backend.device_types:
        return f"runs on {' and '.join(backend.device_types)} only"
    if backend.missing:
        return backend.missing
    word = "picked" if backend.name == picked else "available"
    return f"{word}; {backend.note}" if backend.note else word
