"""Fractional token weights under Hugging Face's Trainer: the denominator is a sum of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from varlen_sft.integrations.collator import FEATURE_KEYS, Collator
from varlen_sft.integrations.exact import keep_exact
from varlen_sft.integrations.trl_guard import loss_is_patched
from varlen_sft.types import IGNORE_INDEX

__all__ = ["WeightedTrainerMixin", "denominator", "targets"]


def denominator(batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """What the losses of the micro-batches of one step are divided by, on this rank.

    The sum of ``shift_weights``, or where a batch has none the number of its targets. Add it up
    over ranks and hand it to the model as ``num_items_in_batch``.

    Returns:
        () fp32, on the device of the batches.

    Raises:
        ValueError: no batches, or one without labels.
    """
    sums = [_weight_sum(batch) for batch in batches]
    if not sums:
        raise ValueError("batches must hold at least one batch, got none")
    return torch.stack(sums).sum()


def targets(batch: Mapping[str, Any]) -> Tensor:
    """The label of each row, -100 where there is none; (..., L - 1) of labels that are unshifted.

    Raises:
        ValueError: neither ``shift_labels`` nor ``labels`` in the batch.
    """
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    if batch.get("labels") is not None:
        return batch["labels"][..., 1:]
    raise ValueError(f"a batch must have shift_labels or labels, it has {sorted(batch)}")


def _weight_sum(batch: Mapping[str, Any]) -> Tensor:
    supervised = targets(batch) != IGNORE_INDEX
    if batch.get("shift_weights") is None:
        return supervised.sum().float()
    return (batch["shift_weights"] * supervised).sum(dtype=torch.float32)


class WeightedTrainerMixin:
    """Makes a Trainer divide by the sum of token weights, over accumulation and ranks::

        class WeightedTrainer(WeightedTrainerMixin, Trainer):
            pass

    A Trainer counts labels, so that with weights other than 0 and 1 its loss would be no weighted
    mean; ``Collator`` refuses such weights under any other trainer. Also for
    ``varlen_sft.integrations.trl.SFTTrainer``.

    Raises:
        ValueError: the model's loss does not read weights (``varlen_sft.patch(model)`` makes it),
            or the trainer is set up so that the model does not see the labels.
        TypeError: a Trainer without the methods that this changes.
    """

    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("_get_num_items_in_batch", "_set_signature_columns_if_needed"):
            if not hasattr(super(), name):
                raise TypeError(
                    f"WeightedTrainerMixin must come before a Trainer that has {name}, as "
                    f"transformers 5 has it; the classes are {type(self).__mro__}"
                )
        super().__init__(*args, **kwargs)
        keep_exact(self.accelerator)  # type: ignore[attr-defined]
        _require_weighted_loss(self)
        if isinstance(self.data_collator, Collator):
            self.data_collator = replace(self.data_collator, fractional_weights=True)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The denominator of a step in place of its number of labels, () fp32 on the device."""
        if not batch_samples:
            return None
        trainer: Any = self
        total = denominator(batch_samples).to(device)
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            total = trainer.accelerator.gather(total).sum()
        # Ranks that hold the same batch counted it once each.
        return total / (trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size())

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that the collator reads stay in the data set, though no model takes them."""
        trainer: Any = self
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        known = trainer._signature_columns
        trainer._signature_columns = [*known, *(key for key in FEATURE_KEYS if key not in known)]


def _require_weighted_loss(trainer: Any) -> None:
    if not loss_is_patched(trainer.model):
        raise ValueError(
            "WeightedTrainerMixin needs a model whose loss reads token weights: "
            "call varlen_sft.patch(model) before the trainer is made"
        )
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        raise ValueError(
            "compute_loss_func and label_smoothing_factor replace the model's loss, which alone "
            "knows the token weights: leave them out"
        )
    if not trainer.model_accepts_loss_kwargs or trainer.args.n_gpu > 1:
        raise ValueError(
            "the denominator does not reach a model that takes no loss keywords or is cut in "
            "pieces by DataParallel: start one process per device, as torchrun does"
        )
