"""One line that makes a Hugging Face model compute packs: ``varlen_sft.patch(model)``.

On this instance only. A hook of the base model reads what a call says about its pack, once, and
hands it down as keyword ``packed=``; attention, RoPE and loss of that call are ours. A call that
speaks of no pack goes where it went before.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn

from varlen_sft.integrations import hf_attention, hf_checks, hf_rope, trl_guard
from varlen_sft.integrations.families import Family
from varlen_sft.integrations.hf_blocks import block_forwards
from varlen_sft.integrations.hf_call import forget_call, install_call, rotary_forward, share_call
from varlen_sft.integrations.hf_checks import inner_model
from varlen_sft.integrations.hf_report import PatchReport, layer_reports
from varlen_sft.integrations.instance import allow_replicas, forward_of, refuse_replicas
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
    elementwise: bool = True,
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
        elementwise: norms and SwiGLU in one pass over memory each, where ``attention`` is ours and
            where they have Llama's formulas.
        prune_last_layer: the last block on supervised rows only; needs ``loss``.
        numerics: rounding of RoPE, see ``apply_rope``. With "hf", which promises HF's own bits,
            norms and SwiGLU stay as they are.

    Returns:
        What was replaced, layer by layer; ``print`` it.

    Raises:
        TypeError: not a transformers or PEFT model.
        ValueError: something that is not supported, named, with what is. Nothing is changed then.
    """
    inner = inner_model(model)
    if _KEY in vars(inner):
        raise ValueError("model is patched already: call varlen_sft.unpatch(model) first")
    plan = _plan(inner, _Options(rope, attention, loss, elementwise, prune_last_layer, numerics))
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
    allow_replicas(inner.base_model)
    if record.attention:
        hf_attention.restore(inner.config)
    if record.loss:
        trl_guard.unguard(inner)


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
class _Options:
    """What ``patch`` was asked for."""

    rope: bool
    attention: bool
    loss: bool
    elementwise: bool
    prune_last_layer: bool
    numerics: Numerics

    def __post_init__(self) -> None:
        if not (self.rope or self.attention or self.loss):
            raise ValueError("one of rope, attention and loss must be True")
        if self.prune_last_layer and not self.loss:
            raise ValueError(
                "prune_last_layer=True needs loss=True: only our loss asks for few rows"
            )
        if self.numerics not in ("fp32", "hf"):
            raise ValueError(f"numerics must be 'fp32' or 'hf', got {self.numerics!r}")


@dataclass(frozen=True)
class _Plan:
    """All that will be put in place, made while nothing is changed yet."""

    report: PatchReport
    tables: Mapping[str | None, RotaryEmbedding]  # none where RoPE is HF's
    forwards: list[tuple[nn.Module, MethodType]]  # of attention layers, blocks, norms and MLPs
    loss: MethodType | None


def _plan(model: Any, options: _Options) -> _Plan:
    family = hf_checks.check_model(model)
    layers = [layer.self_attn for layer in model.base_model.layers]
    tables: dict[str | None, RotaryEmbedding] = {}
    forwards: list[tuple[nn.Module, MethodType]] = []
    if options.attention:
        hf_checks.check_attention(layers)
    if options.rope:
        hf_checks.check_rope(layers)
        tables = hf_rope.rotary_tables(model.config, family)
        numerics: Numerics = "fp32" if family.fp32_rope else options.numerics
        forwards = hf_rope.attention_forwards(layers, numerics)
    method = None
    if options.loss:
        from varlen_sft.integrations.hf_loss import loss_forward

        method = _while_patched(model, loss_forward(model))
    if options.prune_last_layer:
        from varlen_sft.integrations.prune import pruned_forwards

        forwards += pruned_forwards(model, dict(forwards).get(layers[-1]))
    blocks: list[tuple[nn.Module, MethodType]] = []
    if options.elementwise and options.attention and options.numerics == "fp32":
        blocks = block_forwards(model.base_model.layers, forwards)
    report = _report(model, family, layers, tables, options, [module for module, _ in blocks])
    return _Plan(report, tables, forwards + blocks, method)


def _report(
    model: Any,
    family: Family,
    layers: list[nn.Module],
    tables: Mapping[str | None, RotaryEmbedding],
    options: _Options,
    blocks: list[nn.Module],
) -> PatchReport:
    rounded = hf_rope.rounded_tables(model.base_model.rotary_emb, tables)
    return PatchReport(
        model=type(model).__name__,
        family=family.title,
        layers=layer_reports(family, layers, options.attention, tables),
        attention_before=model.config._attn_implementation,
        numerics=options.numerics,
        loss=options.loss,
        elementwise=_counted(blocks),
        prune_last_layer=options.prune_last_layer,
        notes=tuple(f"HF's {name} was rounded with the model; ours is not" for name in rounded),
        saving=saving(model.config) if options.prune_last_layer else None,
    )


def _counted(blocks: list[nn.Module]) -> tuple[tuple[str, int], ...]:
    """Classes of norms and MLPs; the blocks around them compute nothing by themselves."""
    parts = (module for module in blocks if not hasattr(module, "self_attn"))
    return tuple(Counter(type(module).__name__ for module in parts).items())


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
        share_call(base, module)
    refuse_replicas(base)
    if plan.loss is not None:
        record.replace(model, plan.loss)
        trl_guard.guard(model)
