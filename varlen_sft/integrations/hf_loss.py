"""The loss of a Hugging Face ``*ForCausalLM``: the head on supervised rows only.

``loss_forward`` takes the place of the model's forward. A call with labels runs the base model and
then ``linear_cross_entropy``; a call without goes where it went before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from varlen_sft.integrations.exact import require_exact
from varlen_sft.integrations.families import family_of
from varlen_sft.integrations.hf_head import check_head, head_of
from varlen_sft.integrations.hf_targets import Targets
from varlen_sft.integrations.instance import forward_of, replace_forwards
from varlen_sft.integrations.packed import ROWS, Packed
from varlen_sft.integrations.prune import KEYWORD, rows_of_last_layer
from varlen_sft.integrations.trl_guard import guard, refuse_fused_head, unguard
from varlen_sft.ops.cross_entropy import linear_cross_entropy, masked_cross_entropy
from varlen_sft.ops.last_layer import rows_cross_entropy
from varlen_sft.types import LossOptions, LossOutput

__all__ = ["CausalLMLossOutput", "install_loss", "loss_forward"]


_LOGITS_WANTED = (
    "a Trainer with compute_loss_func or label_smoothing_factor takes the labels out and wants "
    "logits, which the patched loss never makes. Leave these out, or call "
    "varlen_sft.patch(model, loss=False)"
)


@dataclass
class CausalLMLossOutput(CausalLMOutputWithPast):
    """``CausalLMOutputWithPast`` with what the loss's own pass knew anyway."""

    loss_output: LossOutput | None = None
    """Sums, and per row of the batch, flattened, loss, entropy and whether the label was best."""

    def __getitem__(self, key: Any) -> Any:
        if key == "logits" and "logits" not in self:
            raise KeyError(f"no logits were made: {_LOGITS_WANTED}")
        return super().__getitem__(key)


def install_loss(model: Any) -> Callable[[], None]:
    """Replace the forward of a ``*ForCausalLM`` by ``loss_forward``.

    Returns:
        A function that restores the instance.

    Raises:
        ValueError: as ``loss_forward``.
    """
    undo = replace_forwards([(model, loss_forward(model))])
    guard(model)

    def restore() -> None:
        undo()
        unguard(model)

    return restore


def loss_forward(model: Any, original: Any = None) -> MethodType:
    """A forward for this model whose loss meets supervised rows only; changes nothing.

    Called with ``labels`` (B, L), unshifted, or ``shift_labels``, and optionally ``shift_weights``
    (like them, fp32), ``rows`` (the supervised ones, (S,) int64 padded with -1: nothing then waits
    for a device) and ``num_items_in_batch`` (a tensor or a number), it returns a
    ``CausalLMLossOutput``. Its loss is the weighted sum over ``num_items_in_batch``, or where that
    is not given the weighted mean of this batch; without a supervised row it is 0. In training
    ``logits`` is None, unless ``skip_logits=False`` is given; in evaluation logits are made, unless
    ``skip_logits=True``.

    In a pack no row learns the first token of the next sequence, whatever ``labels`` says there.
    A call without labels, with a cache, or with ``logits_to_keep`` goes to the original.

    Args:
        model: a ``*ForCausalLM`` of a supported family.
        original: its forward, as it is or will be; None: as it is.

    Raises:
        ValueError: an unknown family, or a head that this loss does not know (``check_head``).
    """
    family_of(model.config)
    check_head(model)
    before = forward_of(model, original)
    signature = inspect.signature(model.forward if original is None else original)
    names = tuple(signature.parameters)

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        refuse_fused_head(call)
        skip = call.pop("skip_logits", None)
        if not _wants_loss(call):
            return before(self, **call)
        return_dict = call.pop("return_dict", None)
        run = _without_logits if (self.training if skip is None else skip) else _with_logits
        output = run(self, before, call)
        if self.config.return_dict if return_dict is None else return_dict:
            return output
        return output.to_tuple()

    return MethodType(forward, model)


_OURS = ("labels", "shift_labels", "shift_weights", "num_items_in_batch", ROWS)


def _wants_loss(call: Mapping[str, Any]) -> bool:
    """Whether this call is one of training or evaluation by labels.

    Raises:
        ValueError: labels were taken out on the way, or weights would be passed by.
    """
    packed = call.get("packed")
    labelled = [key for key in _OURS[:2] if call.get(key) is not None]
    if isinstance(packed, Packed) and packed.labels is not None:
        labelled.append("packed")
    if call.get("num_items_in_batch") is not None and not labelled:
        raise ValueError(f"num_items_in_batch came without labels: {_LOGITS_WANTED}")
    keep = call.get("logits_to_keep", 0)
    cut = not isinstance(keep, int) or keep != 0
    passed_by = not labelled or call.get("past_key_values") is not None or cut
    if passed_by and call.get("shift_weights") is not None:
        raise ValueError(
            "shift_weights need labels or shift_labels, and neither past_key_values nor "
            "logits_to_keep: another loss would leave the weights out"
        )
    return not passed_by


def _without_logits(model: Any, before: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Base model and head, as the original forward calls them, but for the rows of the head."""
    packed = Packed.from_call(call)
    targets = Targets.from_call(call, packed)
    rows = targets.supervised_rows()
    last = rows_of_last_layer(model, rows, targets.total, packed, call)
    inputs = {key: value for key, value in call.items() if key not in (*_OURS, "logits_to_keep")}
    inputs["use_cache"] = False
    if packed is not None:  # whose mask, if there is one, was found to be all ones
        inputs.update(packed=packed, attention_mask=None)
    if last is not None:
        inputs[KEYWORD] = last
    base = model.base_model(**inputs)
    hidden, head = head_of(model).read(base.last_hidden_state.flatten(0, 1))
    score = linear_cross_entropy if last is None else rows_cross_entropy
    output = score(
        hidden, head.weight, targets.labels, token_weights=targets.weights,
        rows=rows if last is None else last.rows, linear_bias=head.bias, options=_options(model),
    )  # fmt: skip
    return CausalLMLossOutput(
        loss=_mean(output, call.get("num_items_in_batch")),
        hidden_states=base.hidden_states,
        attentions=base.attentions,
        loss_output=output,
    )


def _with_logits(model: Any, before: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The original's logits, and the loss of those."""
    targets = Targets.from_call(call, Packed.from_call(call))
    inputs = {key: value for key, value in call.items() if key not in _OURS}
    made = before(model, **inputs, return_dict=True)
    output = masked_cross_entropy(
        made.logits.flatten(0, 1), targets.labels, token_weights=targets.weights
    )
    loss = _mean(output, call.get("num_items_in_batch"))
    result = CausalLMLossOutput(**{**made, "loss": loss})
    # No item (assigning an attribute makes one): Trainer takes all but the loss for predictions.
    result.__dict__["loss_output"] = output
    return result


def _options(model: Any) -> LossOptions:
    family = family_of(model.config)
    return LossOptions(
        softcap=family.logit_softcap(model.config), logit_scale=family.logit_scale(model.config)
    )


def _mean(output: LossOutput, items: Tensor | float | None) -> Tensor:
    """The sum over ``items``, which may be on another device: nothing waits for it.

    Raises:
        TypeError: items of 16 bits.
    """
    total = output.loss_sum
    divisor = output.weight_sum if items is None else torch.as_tensor(items)
    require_exact("num_items_in_batch", divisor)
    divisor = divisor.to(total.device, total.dtype, non_blocking=True)
    return total / divisor.clamp(min=torch.finfo(total.dtype).tiny)
