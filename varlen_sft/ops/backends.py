"""Who computes an op: one table of implementations, one rule that picks."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

from varlen_sft import _extension


class Backend(NamedTuple):
    """One implementation of an op, and whether it can run here."""

    name: str
    device_types: tuple[str, ...]
    missing: str = ""  # why it cannot run here, if it cannot


def _unless_installed(package: str, name: str) -> str:
    """Why a package's implementation cannot run; "" when it can. Imports nothing heavy."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    return "" if found else f"{name} is not installed"


# Found out once, here: torch.compile then sees constants, and an op asks nothing per call.
CPP = Backend("cpp", ("cpu",), "" if _extension.load() else _extension.status())
REFERENCE = Backend("reference", ("cpu", "cuda"))
SDPA = Backend("sdpa", ("cpu", "cuda"))
# Triton's interpreter runs the kernels on the CPU, slowly: never picked there, only asked for.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON = Backend(
    "triton", ("cuda", "cpu") if INTERPRETED else ("cuda",), _unless_installed("triton", "triton")
)

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "sequences": (REFERENCE,),
    "rope": (CPP, TRITON, REFERENCE),
    "attention": (CPP, SDPA, REFERENCE),
    "cross_entropy": (CPP, TRITON, REFERENCE),
    "elementwise": (CPP, REFERENCE),
}
"""Implementations of each op, the preferred one first."""


def resolve(op: str, impl: str | None, device: torch.device) -> str:
    """Name of the implementation that will run.

    Args:
        op: a key of ``BACKENDS``.
        impl: the one that the caller asks for, or None for the first that can run on the device.
        device: where the tensors live.

    Raises:
        ValueError: ``impl`` is unknown, or does not run on this device.
        RuntimeError: ``impl`` is known but not installed. An explicit request never falls back.
    """
    known = {backend.name: backend for backend in BACKENDS[op]}
    if impl is None:
        return next(
            name
            for name, backend in known.items()
            if device.type in backend.device_types and not backend.missing
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
        "available", or why it cannot run.
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
    return "picked" if backend.name == picked else "available"
