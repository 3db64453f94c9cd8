"""Is a model's RoPE what its config says, in fp32? And does it depend on a sample's neighbours?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varlen_sft.rope_frequencies import (
    LENGTH_DEPENDENT_ROPE_TYPES,
    inverse_frequencies,
    needs_long_frequencies,
)
from varlen_sft.tools.check_batch import BatchView
from varlen_sft.tools.check_mistake import Mistake, ModelFacts, rope_tables

__all__ = ["length_mistakes", "length_note", "table_mistakes"]

ROUNDED = "a RoPE table is rounded to {}"
PATCH = "varlen_sft.patch(model) keeps tables of its own in fp32"
CACHES = ("cos_cached", "sin_cached", "cos", "sin")
SPACING = torch.finfo(torch.float32).eps


def table_mistakes(model: nn.Module) -> Iterator[Mistake]:
    """Every rotary module against an fp32 recomputation; one mistake per module at most."""
    for name, module in model.named_modules():
        buffers = dict(module.named_buffers(recurse=False))
        if not any(b.endswith("inv_freq") or b in CACHES for b in buffers):
            continue
        found = (
            _frequencies(name, module, buffers) or _caches(name, buffers) or _angles(name, module)
        )
        if found is not None:
            yield found


def _frequencies(name: str, module: nn.Module, buffers: Mapping[str, Tensor]) -> Mistake | None:
    """inv_freq in a lower dtype, or in fp32 again after it was."""
    for key, buffer in buffers.items():
        if not key.endswith("inv_freq"):
            continue
        kind = key.removesuffix("inv_freq").removesuffix("original_").removesuffix("_")
        expected = _expected(module, kind, buffer)
        low = buffer.dtype if buffer.dtype.itemsize < 4 else _rounded_to(buffer, expected)
        if low is None:
            continue
        wanted = buffer if expected is None else expected.to(buffer.device)
        longest = _longest(module, kind)
        error = float((buffer.double() - wanted.double()).abs().max()) * longest
        off = "" if expected is None else f", {error:.2g} radians at position {longest:,}"
        was = f"was rounded to {_short(low)}, and casting back restores nothing"
        return Mistake(
            ROUNDED.format(_short(low)),
            f"{name}.{key} {f'is {_short(low)}' if buffer.dtype == low else was}",
            f"angles are off by up to 2^{-8 if low == torch.bfloat16 else -11} of themselves{off}: "
            "far positions are mixed up, and other code that loads the model computes others",
            "load in the dtype you want (from_pretrained(..., dtype=...)) instead of "
            f"model.to(dtype) or model.half(), which cast buffers, too; {PATCH}",
        )
    return None


def _rounded_to(buffer: Tensor, expected: Tensor | None) -> torch.dtype | None:
    if expected is None or buffer.shape != expected.shape:
        return None
    wanted = expected.to(buffer.device)
    if torch.allclose(buffer.float(), wanted, rtol=4 * SPACING, atol=0):
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if torch.allclose(buffer.float(), wanted.to(dtype).float(), rtol=4 * SPACING, atol=0):
            return dtype
    return None


def _caches(name: str, buffers: Mapping[str, Tensor]) -> Mistake | None:
    """Cosines and sines that are held in a low dtype."""
    for key, buffer in buffers.items():
        if key in CACHES and buffer.is_floating_point() and buffer.dtype.itemsize < 4:
            return _rounded_table(f"{name}.{key} is {_short(buffer.dtype)}", buffer.dtype)
    return None


def _rounded_table(what: str, dtype: torch.dtype) -> Mistake:
    return Mistake(
        ROUNDED.format(_short(dtype)),
        what,
        f"every cosine and sine has {8 if dtype == torch.bfloat16 else 11} bits: neighbouring "
        "positions turn alike, and the model is not the one that was trained before",
        f"make cosines and sines in fp32 and cast q and k after the turn, if at all; {PATCH}",
    )


# -------------------------------------------------------------------- angles


@torch.no_grad()
def _angles(name: str, module: nn.Module) -> Mistake | None:
    """What the module answers for fp32 inputs, against angles that are made here."""
    if getattr(module, "config", None) is None:
        return None
    for kind, parameters in _tables(module).items():
        ids = _positions(parameters)
        answer = _ask(module, kind, ids)
        expected = _expected(module, kind)
        if answer is None or expected is None:
            continue
        _, scaling = inverse_frequencies(parameters, _head_dim(module))
        angles = ids[:, None].float() * expected
        # An angle's own rounding, and one more of what is made of it.
        allowed = 4 * SPACING * (1 + angles)
        half = expected.numel()
        for got, wanted in zip(
            answer, (angles.cos() * scaling, angles.sin() * scaling), strict=True
        ):
            got = got.reshape(len(ids), -1)[:, :half].float().cpu()
            wrong = ((got - wanted).abs() > allowed).nonzero()
            if len(wrong):
                return _name_angle(name, got, wanted, ids, wrong)
    return None


def _name_angle(name: str, got: Tensor, wanted: Tensor, ids: Tensor, wrong: Tensor) -> Mistake:
    for dtype in (torch.bfloat16, torch.float16):
        step = torch.finfo(dtype).eps
        if torch.allclose(got, wanted.to(dtype).float(), rtol=step * 1e-3, atol=4 * SPACING):
            return _rounded_table(f"{name} answers fp32 with values of {_short(dtype)}", dtype)
    at, frequency = (int(i) for i in wrong[0])
    position = int(ids[at])
    return Mistake(
        "RoPE angles are not those of the config",
        f"{name}, frequency {frequency} at position {position:,}: {float(got[at, frequency]):.6g}, "
        f"by the config {float(wanted[at, frequency]):.6g}",
        "q and k are turned by other angles than those the weights were trained with"
        + (", from the position on where a low dtype stops counting" if position > 255 else ""),
        "make angles in fp32 from integer positions with the base and scaling of config.json",
    )


def _ask(module: nn.Module, kind: str, ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and sin by a copy of the module: some change their buffers as they answer."""
    device = next(module.buffers()).device
    twin = copy.deepcopy(module)
    x = torch.zeros(1, 1, 1, dtype=torch.float32, device=device)
    answer = twin(x, ids[None].to(device), *([kind] if kind else []))
    is_pair = isinstance(answer, tuple) and len(answer) == 2
    return answer if is_pair and all(isinstance(a, Tensor) for a in answer) else None


def _positions(parameters: Mapping[str, Any]) -> Tensor:
    """The first, those around powers of two, and the last, all of one length's frequencies."""
    limit = int(parameters["max_position_embeddings"])
    if parameters["rope_type"] in LENGTH_DEPENDENT_ROPE_TYPES:
        limit = min(limit, _limit(parameters)) - 1  # at its limit HF keeps what was there before
    powers = [2**k for k in range(4, limit.bit_length())]
    near = {p + d for p in powers for d in (-1, 0, 1)} | set(range(16)) | {limit - 1}
    return torch.tensor(sorted(p for p in near if p < limit))


def _tables(module: nn.Module) -> dict[str, dict[str, Any]]:
    config: Any = getattr(module, "config", None)
    return {} if config is None else rope_tables(config.to_dict())


def _expected(module: nn.Module, kind: str, like: Tensor | None = None) -> Tensor | None:
    """inv_freq (R/2,) fp32 by the config; None where a longer sample may have changed it."""
    parameters = _tables(module).get(kind)
    if parameters is None:
        return None
    inv_freq, _ = inverse_frequencies(parameters, _head_dim(module))
    if like is not None and parameters["rope_type"] in LENGTH_DEPENDENT_ROPE_TYPES:
        near = like.shape == inv_freq.shape and torch.allclose(
            like.float().cpu(), inv_freq, rtol=2**-7, atol=0
        )
        return inv_freq if near else None
    return inv_freq


def _head_dim(module: nn.Module) -> int:
    config: Any = module.config
    width = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def _longest(module: nn.Module, kind: str) -> int:
    parameters = _tables(module).get(kind)
    return int(parameters["max_position_embeddings"]) - 1 if parameters else 0


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype))


# ------------------------------------------------------------------- lengths

LENGTHS = "RoPE depends on the longest of the batch"
LENGTHS_EFFECT = (
    "transformers picks {} frequencies by the longest sample of a batch: a sample's loss and "
    "gradients then depend on its neighbours, and differ from those it has alone"
)
LENGTHS_MEND = (
    "varlen_sft.patch(model), LlamaForSFT and RotaryEmbedding give each sample the frequencies of "
    "its own length; or train on samples that are all on one side of the limit"
)


def length_note(facts: ModelFacts) -> Iterator[Mistake]:
    """That such a model must be watched, before any batch is seen."""
    for kind, parameters in facts.rope:
        if parameters["rope_type"] in LENGTH_DEPENDENT_ROPE_TYPES and not facts.patched:
            where = f" in {kind} layers" if kind else ""
            yield Mistake(
                LENGTHS,
                f"rope_type {parameters['rope_type']!r}{where}, samples above "
                f"{_limit(parameters):,} tokens",
                LENGTHS_EFFECT.format(parameters["rope_type"]),
                LENGTHS_MEND,
                certain=False,
            )


def length_mistakes(view: BatchView, facts: ModelFacts) -> Iterator[Mistake]:
    """Samples of this batch that a longer one gives other frequencies than they have alone."""
    if facts.patched:
        return
    positions = view.position_ids
    seen = view.input_ids.shape[1] if positions is None else int(positions.max()) + 1
    for _, parameters in facts.rope:
        if parameters["rope_type"] not in LENGTH_DEPENDENT_ROPE_TYPES:
            continue
        if not needs_long_frequencies(parameters, seen):
            continue
        dynamic = parameters["rope_type"] == "dynamic"  # whose frequencies go on with the length
        own = np.array([len(span) for span in view.spans])
        moved = np.flatnonzero(own != seen if dynamic else own <= _limit(parameters))
        if len(moved):
            span = view.spans[int(moved[0])]
            yield Mistake(
                LENGTHS,
                f"{view.place(span)} has {len(span):,} tokens and is turned with the "
                f"{parameters['rope_type']} frequencies of {seen:,} (the model's limit is "
                f"{_limit(parameters):,}); so are {len(moved)} of {len(own)} samples",
                LENGTHS_EFFECT.format(parameters["rope_type"]),
                LENGTHS_MEND,
                span.row,
                span.start,
            )
            return


def _limit(parameters: Mapping[str, Any]) -> int:
    is_dynamic = parameters["rope_type"] == "dynamic"
    return int(
        parameters["max_position_embeddings" if is_dynamic else "original_max_position_embeddings"]
    )
