"""Inverse frequencies of every RoPE type that Hugging Face's Llama knows, in fp32.

The operations and their order are those of ``transformers.modeling_rope_utils`` (5.23), so that the
fp32 results are bit-equal to the model's own; the tests compare bits.

Sources: RoPE, Su et al. 2104.09864; linear scaling (position interpolation), Chen et al.
2306.15595; dynamic NTK and YaRN, Peng et al. 2309.00071; LongRoPE, Ding et al. 2402.13753; llama3,
the Llama 3.1 model card.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Length = int | Tensor | None
Frequencies = tuple[Tensor, float]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")
"""Types whose frequencies depend on how long a sequence is."""


def resolve_rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read a HF ``config.json`` into one self-contained RoPE dictionary.

    Accepts ``rope_parameters`` (transformers 5) and ``rope_theta`` + ``rope_scaling`` (older
    files).

    Args:
        config: the parsed ``config.json`` of a Llama-like model.

    Returns:
        HF's RoPE keys plus ``rope_type``, ``rope_theta``, ``max_position_embeddings`` and, where
        the type uses it, ``original_max_position_embeddings``.

    Raises:
        ValueError: the type is none of ``ROPE_TYPES``, or a key that the type needs is missing.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    parameters = dict(given)
    parameters["rope_type"] = parameters.get("rope_type") or parameters.pop("type", "default")
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0
    parameters["rope_theta"] = float(theta)
    parameters["max_position_embeddings"] = int(config.get("max_position_embeddings", 2048))
    if config.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if parameters["rope_type"] in ("llama3", "yarn", "longrope"):
        # Phi-3 keeps the pretrained length outside the RoPE dictionary; HF gives that one priority.
        original = config.get("original_max_position_embeddings")
        if original is not None:
            parameters["original_max_position_embeddings"] = original
        parameters.setdefault(
            "original_max_position_embeddings", parameters["max_position_embeddings"]
        )
    _validate(parameters)
    return parameters


def rotary_dims(parameters: Mapping[str, Any], head_dim: int) -> int:
    """R, the leading dimensions of a head that are rotated: partial_rotary_factor of D."""
    return int(head_dim * float(parameters.get("partial_rotary_factor") or 1.0))


def inverse_frequencies(
    parameters: Mapping[str, Any],
    head_dim: int,
    *,
    sequence_length: int | Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """Frequencies that rotate a sequence of the given length.

    Args:
        parameters: HF's ``rope_parameters``, as ``resolve_rope_parameters`` returns them.
        head_dim: D.
        sequence_length: tokens of the sequence, for "dynamic" and "longrope"; None means no longer
            than the model was pretrained for. Other types ignore it, as their formula does.
            "dynamic" takes a (T, 1) tensor too and then gives (T, R/2).
        device: where to compute.

    Returns:
        ``inv_freq`` (R/2,) fp32 and the attention scaling that multiplies cosine and sine.

    Raises:
        ValueError: an unknown type, or a key that the type needs is missing.
    """
    _validate(parameters)
    dim = rotary_dims(parameters, head_dim)
    return _COMPUTE[parameters["rope_type"]](parameters, dim, sequence_length, device)


def needs_long_frequencies(parameters: Mapping[str, Any], sequence_length: int) -> bool:
    """Whether a sequence of this length has other frequencies than a short one."""
    limit = {
        "dynamic": "max_position_embeddings",
        "longrope": "original_max_position_embeddings",
    }.get(parameters["rope_type"])
    return limit is not None and sequence_length > parameters[limit]


_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _validate(parameters: Mapping[str, Any]) -> None:
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in _REQUIRED:
        raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
    missing = [key for key in _REQUIRED[rope_type] if key not in parameters]
    if missing:
        raise ValueError(
            f"rope_parameters of type {rope_type!r} must have {', '.join(_REQUIRED[rope_type])}, "
            f"missing: {', '.join(missing)}"
        )


def _powers(base: float | Tensor, dim: int, device: Any) -> Tensor:
    return base ** (torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim)


def _default(p: Mapping[str, Any], dim: int, length: Length, device: Any) -> Frequencies:
    return 1.0 / _powers(p.get("rope_theta") or 10_000.0, dim, device), 1.0


def _linear(p: Mapping[str, Any], dim: int, length: Length, device: Any) -> Frequencies:
    inv_freq, scaling = _default(p, dim, length, device)
    return inv_freq / p["factor"], scaling


def _dynamic(p: Mapping[str, Any], dim: int, length: Length, device: Any) -> Frequencies:
    limit, factor = p["max_position_embeddings"], p["factor"]
    # HF takes the length from a tensor and so stretches in fp32: a Python int would differ in bits.
    length = torch.as_tensor(limit if length is None else length, device=device).clamp(min=limit)
    stretch = (factor * length / limit) - (factor - 1)
    # The power in fp64, rounded, is HF's bits; fp32 vectors of it differ in a bit from scalars, and
    # so from row to row.
    base = p["rope_theta"] * (stretch.double() ** (dim / (dim - 2))).float()
    return 1.0 / _powers(base, dim, device), 1.0


def _yarn(p: Mapping[str, Any], dim: int, length: Length, device: Any) -> Frequencies:
    base, original = p["rope_theta"], p["original_max_position_embeddings"]
    factor = p["factor"] or p["max_position_embeddings"] / original
    fast, slow = p.get("beta_fast") or 32, p.get("beta_slow") or 1

    def correction_dim(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = correction_dim(fast), correction_dim(slow)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
    extrapolated = 1 - torch.clamp(ramp, 0, 1).to(device=device, dtype=torch.float)
    powers = _powers(base, dim, device)
    inv_freq = 1.0 / (factor * powers) * (1 - extrapolated) + 1.0 / powers * extrapolated
    return inv_freq, _yarn_attention_factor(p, factor)


def _yarn_attention_factor(p: Mapping[str, Any], factor: float) -> float:
    def mscale(scale: float, m: float = 1) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    if p.get("attention_factor") is not None:
        return p["attention_factor"]
    m, m_all = p.get("mscale"), p.get("mscale_all_dim")
    if m and m_all:
        return float(mscale(factor, m) / mscale(factor, m_all))
    return mscale(factor)


def _longrope(p: Mapping[str, Any], dim: int, length: Length, device: Any) -> Frequencies:
    original = p["original_max_position_embeddings"]
    factor = p.get("factor")
    if factor is None:
        factor = p.get("max_position_embeddings", original) / original
    scaling = p.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    key = "long_factor" if needs_long_frequencies(p, int(length or 0)) else "short_factor"
    stretch = torch.tensor(p[key], dtype=torch.float32, device=device)
    if stretch.numel() != dim // 2:
        raise ValueError(f"{key} must have R/2 = {dim // 2} numbers, got {stretch.numel()}")
    return 1.0 / (stretch * _powers(p["rope_theta"], dim, device)), scaling


def _llama3(p: Mapping[str, Any], dim: int, length: Length, device: Any) -> Frequencies:
    inv_freq, scaling = _default(p, dim, length, device)
    factor, low, high = p["factor"], p["low_freq_factor"], p["high_freq_factor"]
    original = p["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelength < original / high) * ~(wavelength > original / low)
    return torch.where(medium, smoothed, scaled), scaling


_COMPUTE: dict[str, Callable[..., Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
