"""The last block of a Hugging Face model on supervised rows only, inside our own loss alone.

Its keys and values are computed everywhere; queries, output projection, MLP and the norm after the
block for the rows that the loss reads. ``hf_loss`` hands those rows down as a keyword; a call
without it goes where it went before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn

from varlen_sft.integrations.families import Family, family_of
from varlen_sft.integrations.hf_attention import AttentionName
from varlen_sft.integrations.hf_blocks import in_pack
from varlen_sft.integrations.hf_rope import PackRotation, has_rope
from varlen_sft.integrations.instance import forward_of, replace_forwards
from varlen_sft.integrations.packed import Packed
from varlen_sft.ops.last_layer import LastRows, last_rows, pick_rows

__all__ = ["install_pruning", "pruned_forwards", "rows_of_last_layer"]

KEYWORD = "last_rows"

_NORMS = {
    "before": ("input_layernorm", "", "post_attention_layernorm", ""),
    "after": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "around": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}  # fmt: skip
"""Names of the norms before and after attention, before and after the MLP."""


def install_pruning(model: Any) -> Callable[[], None]:
    """Prune the last block of a ``*ForCausalLM`` whose loss is ``hf_loss.loss_forward``.

    Returns:
        A function that restores the instance.

    Raises:
        ValueError: as ``pruned_forwards``.
    """
    return replace_forwards(pruned_forwards(model))


def pruned_forwards(
    model: Any, attention: MethodType | None = None
) -> list[tuple[nn.Module, MethodType]]:
    """Forwards of the last block and of its attention that can be pruned; changes nothing.

    Args:
        model: a ``*ForCausalLM`` of a supported family.
        attention: what the forward of the last attention layer will be by then; None: what it is.

    Raises:
        ValueError: an unknown family, or a block that is not built as that family's.
    """
    family, layer = family_of(model.config), _last_layer(model)
    _require_block(layer, family)
    attn: Any = layer.self_attn
    block = _block_forward(family, forward_of(layer))
    own = attn.forward if attention is None else attention
    rotate = _rotation_of(own, type(attn))
    inner = _attention_forward(family, rotate, forward_of(attn, attention))
    return [(attn, MethodType(inner, attn)), (layer, MethodType(block, layer))]


def rows_of_last_layer(
    model: Any, rows: Tensor, total: int, packed: Packed | None, call: Mapping[str, Any]
) -> LastRows | None:
    """What the last block has to compute in a call of the loss; None: all of it.

    Args:
        model: a ``*ForCausalLM``.
        rows: (S,) int64 supervised rows of the T that the call has, ascending, padded with -1.
        total: T.
        packed: the pack of the call, if it is one.
        call: keywords of the call. Whoever asks for hidden states gets all of them.
    """
    asked = (call.get(key, getattr(model.config, key, False)) for key in _OUTPUTS)
    if not _prunes(_last_layer(model)) or any(value not in (None, False) for value in asked):
        return None
    if packed is None or not isinstance(model.config._attn_implementation, AttentionName):
        return last_rows(rows, total)
    # Rows that the call did not bring were waited for already.
    return last_rows(rows, total, packed.sequences, wait=packed.rows is None)


_OUTPUTS = ("output_hidden_states", "output_attentions")


def _last_layer(model: Any) -> Any:
    return model.base_model.layers[model.config.num_hidden_layers - 1]


def _prunes(layer: nn.Module) -> bool:
    return getattr(getattr(layer.forward, "__func__", None), "prunes", False)


def _require_block(layer: nn.Module, family: Family) -> None:
    expected = {"self_attn", "mlp", *_NORMS[family.norms]} - {""}
    found = {name for name, _ in layer.named_children()}
    if found != expected:
        raise ValueError(
            f"prune_last_layer: {type(layer).__name__} must hold {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(found))}"
        )
    parts = {"q_proj", "k_proj", "v_proj", "o_proj"}
    parts |= {"q_norm", "k_norm"} if family.qk_norm else set()
    attention: Any = layer.self_attn
    missing = parts - {name for name, _ in attention.named_children()}
    if missing:
        raise ValueError(
            f"prune_last_layer: {type(attention).__name__} must hold {', '.join(sorted(missing))}"
        )


# ------------------------------------------------------------------------ block


def _block_forward(family: Family, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        last = kwargs.pop(KEYWORD, None)
        if last is None:
            return original(self, hidden_states, *args, **kwargs)
        block = partial(_block_in_pack, self, family, last, kwargs)
        if self.gradient_checkpointing and self.training:  # as GradientCheckpointingLayer does
            return self._gradient_checkpointing_func(block, hidden_states)
        return block(hidden_states)

    forward.prunes = True  # type: ignore[attr-defined]
    return forward


def _block_in_pack(
    layer: Any, family: Family, last: LastRows, call: Mapping[str, Any], hidden: Tensor
) -> Tensor:
    with in_pack(layer, call):
        return _block(layer, family, last, call, hidden)


def _block(
    layer: Any, family: Family, last: LastRows, call: Mapping[str, Any], hidden: Tensor
) -> Tensor:
    """(B, L, C) to (1, S, C)."""

    def normed(name: str, x: Tensor) -> Tensor:
        return getattr(layer, name)(x) if name else x

    def scaled(x: Tensor) -> Tensor:
        name = family.residual_multiplier
        return x * getattr(layer, name) if name else x

    before, after, before_mlp, after_mlp = _NORMS[family.norms]
    update, _ = layer.self_attn(hidden_states=normed(before, hidden), **{KEYWORD: last}, **call)
    stream = pick_rows(hidden.flatten(0, 1), last.rows)[None]
    stream = stream + scaled(normed(after, update))
    return stream + scaled(normed(after_mlp, layer.mlp(normed(before_mlp, stream))))


# -------------------------------------------------------------------- attention


def _attention_forward(
    family: Family, rotate: Callable[..., Any] | None, original: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        last = kwargs.pop(KEYWORD, None)
        if last is None:
            return original(self, *args, **kwargs)
        return _attend(self, family, rotate, last, **kwargs), None

    return forward


def _attend(
    attn: Any,
    family: Family,
    rotate: Callable[..., Any] | None,
    last: LastRows,
    *,
    hidden_states: Tensor,  # (B, L, C)
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    """(1, S, C) after the output projection."""
    runs, rows = last.runs, None if last.runs is None else last.runs.rows
    queried = hidden_states if rows is None else pick_rows(hidden_states[0], rows)[None]
    q = _heads(attn, "q", queried, family)
    k, v = (_heads(attn, kind, hidden_states, family) for kind in "kv")
    if rotate is not None and has_rope(attn):
        q, k = _rotated(rotate, q, k, position_embeddings, rows)
    if runs is not None:
        kwargs |= {"q_sequences": runs.sequences, "k_sequences": runs.k_sequences}
        if runs.k_rows is not None:
            k, v = (_picked_keys(x, runs.k_rows) for x in (k, v))
    out = _interface(attn)(attn, q, k, v, attention_mask, **_options(attn, family), **kwargs)[0]
    out = out.flatten(0, 1).flatten(1)  # (B, L, H, D) to (B L, H D)
    kept = last.rows if runs is None else runs.kept
    return attn.o_proj((out if kept is None else pick_rows(out, kept))[None])


def _heads(attn: Any, kind: str, hidden: Tensor, family: Family) -> Tensor:
    """(B, heads, L, D) of q, k or v."""
    x = getattr(attn, f"{kind}_proj")(hidden)
    norm = getattr(attn, f"{kind}_norm") if family.qk_norm and kind != "v" else None
    if norm is not None and family.qk_norm == "all":
        x = norm(x)
    x = x.unflatten(-1, (-1, attn.head_dim))
    if norm is not None and family.qk_norm == "head":
        x = norm(x)
    return x.transpose(1, 2)


def _rotation_of(forward: Any, kind: Any) -> Callable[..., Any] | None:
    """The function by which an attention layer's forward turns q and k, ours or HF's."""
    function: Any = inspect.unwrap(getattr(forward, "__func__", kind.forward))
    return function.__globals__.get("apply_rotary_pos_emb")


def _rotated(
    rotate: Callable[..., Any], q: Tensor, k: Tensor, embeddings: Any, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    cos, sin = embeddings
    if rows is None:
        return rotate(q, k, cos, sin)
    own = (cos.at(rows), sin) if isinstance(cos, PackRotation) else (cos[:, rows], sin[:, rows])
    return rotate(q, q[:, :0], *own)[0], rotate(k[:, :0], k, cos, sin)[1]


def _picked_keys(x: Tensor, rows: Tensor) -> Tensor:
    return pick_rows(x.transpose(1, 2)[0], rows, repeated=True)[None].transpose(1, 2)


def _options(attn: Any, family: Family) -> dict[str, Any]:
    """What HF's own forward of this layer tells its attention function."""
    dropout = getattr(attn, "attention_dropout", 0.0) if attn.training else 0.0
    softcap = attn.attn_logit_softcapping if family.attention_softcap else None
    window = family.window_size(attn)
    named = {"dropout": dropout, "scaling": attn.scaling}
    named |= {"sliding_window": window, "softcap": softcap}
    return {key: value for key, value in named.items() if value is not None}


def _interface(attn: Any) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = inspect.unwrap(type(attn).forward).__globals__["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager)
