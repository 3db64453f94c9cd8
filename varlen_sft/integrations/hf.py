"""One line that makes a Hugging Face model compute packs: ``varlen_sft.patch(model)``.

On this instance only. A hook of the base model reads what a call says about its pack, once, and
hands it down as keyword ``packed=``; attention, RoPE and loss of that call are ours. A call that
speaks of no pack goes where it went before.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from varlen_sft.integrations import hf_attention, hf_checks, hf_rope
from varlen_sft.integrations.families import Family
from varlen_sft.integrations.hf_call import forget_call, install_call, rotary_forward
from varlen_sft.integrations.hf_checks import inner_model
from varlen_sft.integrations.hf_report import LayerReport, PatchReport
from varlen_sft.integrations.instance import forward_of
from varlen_sft.integrations.saving import saving
from varlen_sft.modules import RotaryEmbedding
from varlen_sft.types import Numerics

__all__ = ["PatchReport", "is_patched", "patch", "unpatch"]

_KEY = "_varlen_sft_patch"


def patch(
    model: nn.Module,
    *,
    rope: bool = True,
    attention: bool = True,
    loss: bool = True,
    prune_last_layer: bool = False,
    numerics: Numerics = "fp32",
) -> PatchReport:
    """Make a Hugging Face model compute packs exactly, without padding.

    Parameters and their names stay as they are, and ``generate``, evaluation, saving, PEFT and
    gradient checkpointing work on: a call that speaks of no pack goes where it went before. What
    speaks of a pack is told in ``Packed.from_call``; ``varlen_sft.Collator`` makes such calls.

    Args:
        model: a loaded model of a family in ``families.FAMILIES``, or a PEFT model around one;
            before any other wrapper.
        rope: RoPE by position ids from fp32 tables, by each sequence's own length.
        attention: every sequence with itself alone; no T x T mask.
        loss: head and cross-entropy on supervised rows only.
        prune_last_layer: the last block on supervised rows only; needs ``loss``.
        numerics: rounding of RoPE, see ``apply_rope``.

    Returns:
        What was replaced, layer by layer; ``print`` it.

    Raises:
        TypeError: not a transformers or PEFT model.
        ValueError: something that is not supported, named, with what is. Nothing is changed then.
    """
    inner = inner_model(model)
    if _KEY in vars(inner):
        raise ValueError("model is patched already: call varlen_sft.unpatch(model) first")
    if not (rope or attention or loss):
        raise ValueError("one of rope, attention and loss must be True")
    if prune_last_layer and not loss:
        raise ValueError("prune_last_layer=True needs loss=True: only our loss asks for few rows")
    if numerics not in ("fp32", "hf"):
        raise ValueError(f"numerics must be 'fp32' or 'hf', got {numerics!r}")
    plan = _plan(inner, rope, attention, loss, prune_last_layer, numerics)
    if attention:
        hf_attention.register()
    inner.__dict__[_KEY] = record = _Patch(attention, loss)
    try:
        _apply(model, inner, plan, record)
    except BaseException:
        unpatch(model)
        raise
    return plan.report


def unpatch(model: nn.Module) -> None:
    """Take ``patch`` back: the model computes bit for bit what it computed before.

    Raises:
        ValueError: the model is not patched.
    """
    inner = inner_model(model)
    record: _Patch | None = vars(inner).pop(_KEY, None)
    if record is None:
        raise ValueError("model must be patched, got one that is not")
    for handle in record.handles:
        handle.remove()
    forget_call(inner.base_model)
    for module, before, ours in reversed(record.forwards):
        if vars(module).get("forward") is not ours:
            continue  # wrapped since (by Accelerate, say): ours stays inside and passes calls on
        del module.forward
        if before is not None:
            module.forward = before
        forget_call(module)
    if record.attention:
        hf_attention.restore(inner.config)
    if record.loss:
        from varlen_sft.integrations.trl_guard import unguard

        unguard(inner)


def is_patched(model: nn.Module) -> bool:
    """Whether ``patch`` was called on this model, or on the one inside a PEFT model."""
    return _KEY in vars(inner_model(model))


@dataclass(eq=False)
class _Patch:
    """On the model, for ``unpatch``. A copied model has its own; a pickled one would lose it."""

    attention: bool
    loss: bool
    forwards: list[tuple[nn.Module, MethodType | None, MethodType]] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def replace(self, module: Any, ours: MethodType) -> None:
        self.forwards.append((module, vars(module).get("forward"), ours))
        module.forward = ours

    def __deepcopy__(self, memo: dict[int, Any]) -> _Patch:
        memo[id(self)] = other = _Patch(self.attention, self.loss)
        other.forwards = copy.deepcopy(self.forwards, memo)
        other.handles = copy.deepcopy(self.handles, memo)
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a patched model cannot be pickled: save_pretrained and state_dict work as ever, and "
            "varlen_sft.unpatch(model) makes the model what it was"
        )


@dataclass(frozen=True)
class _Plan:
    """All that will be put in place, made while nothing is changed yet."""

    report: PatchReport
    tables: Mapping[str | None, RotaryEmbedding]  # none where RoPE is HF's
    forwards: list[tuple[nn.Module, MethodType]]  # of attention layers, of a pruned block
    loss: MethodType | None


def _plan(
    model: Any, rope: bool, attention: bool, loss: bool, prune: bool, numerics: Numerics
) -> _Plan:
    family = hf_checks.check_model(model)
    layers = [layer.self_attn for layer in model.base_model.layers]
    tables: dict[str | None, RotaryEmbedding] = {}
    rounded: list[str] = []
    forwards: list[tuple[nn.Module, MethodType]] = []
    if attention:
        hf_checks.check_attention(layers)
    if rope:
        hf_checks.check_rope(layers)
        tables = hf_rope.rotary_tables(model.config, family)
        rounded = hf_rope.rounded_tables(model.base_model.rotary_emb, tables)
        forwards = _attention_forwards(layers, "fp32" if family.fp32_rope else numerics)
    report = PatchReport(
        model=type(model).__name__,
        family=family.title,
        layers=_layer_reports(family, layers, attention, tables),
        attention_before=model.config._attn_implementation,
        numerics=numerics,
        loss=loss,
        prune_last_layer=prune,
        notes=tuple(f"HF's {name} was rounded with the model; ours is not" for name in rounded),
        saving=saving(model.config) if prune else None,
    )
    method = None
    if loss:
        from varlen_sft.integrations.hf_loss import loss_forward

        method = _while_patched(model, loss_forward(model))
    if prune:
        from varlen_sft.integrations.prune import pruned_forwards

        forwards += pruned_forwards(model, dict(forwards).get(layers[-1]))
    return _Plan(report, tables, forwards, method)


def _layer_reports(
    family: Family,
    layers: list[nn.Module],
    attention: bool,
    tables: Mapping[str | None, RotaryEmbedding],
) -> tuple[LayerReport, ...]:
    reports = []
    for index, layer in enumerate(layers):
        table = "table" if None in tables else str(getattr(layer, "layer_type", None))
        rope = "hf" if not tables else table if _has_rope(layer) else "none"
        reports.append(LayerReport(index, attention, family.window_size(layer), rope))
    return tuple(reports)


def _has_rope(layer: Any) -> bool:
    return bool(getattr(layer, "use_rope", True))  # SmolLM3 has layers without positions


def _attention_forwards(
    layers: list[nn.Module], numerics: Numerics
) -> list[tuple[nn.Module, MethodType]]:
    made: dict[FunctionType, FunctionType] = {}
    forwards = []
    for layer in filter(_has_rope, layers):
        theirs: Any = type(layer).forward
        if theirs not in made:
            made[theirs] = hf_rope.attention_forward(theirs, numerics)
        forwards.append((layer, MethodType(made[theirs], layer)))
    return forwards


def _while_patched(model: Any, ours: MethodType) -> MethodType:
    """A forward that is the one before after ``unpatch``: somebody may have wrapped it by then."""
    inner, before = ours.__func__, forward_of(model)

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (inner if _KEY in vars(self) else before)(self, *args, **kwargs)

    return MethodType(forward, model)


def _apply(outer: nn.Module, model: Any, plan: _Plan, record: _Patch) -> None:
    base = model.base_model
    if record.attention:
        hf_attention.rename(outer, model.config)
    record.handles = install_call(base, record.attention, plan.tables)
    if plan.tables:
        record.replace(base.rotary_emb, MethodType(rotary_forward, base.rotary_emb))
    for module, forward in plan.forwards:
        record.replace(module, forward)
    if plan.loss is not None:
        from varlen_sft.integrations.trl_guard import guard

        record.replace(model, plan.loss)
        guard(model)
