"""TRL's SFTTrainer with the patched loss: TRL's data handling and metrics, our head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import trl
from torch import Tensor, nn

from varlen_sft.integrations.exact import keep_exact
from varlen_sft.integrations.trainer import targets
from varlen_sft.integrations.trl_guard import OUR_TAG, loss_is_patched
from varlen_sft.types import IGNORE_INDEX, LossOutput

__all__ = ["SFTTrainer"]


class SFTTrainer(trl.SFTTrainer):
    """``trl.SFTTrainer`` for a model that ``varlen_sft.patch`` changed.

    TRL calls a head of its own in place of the model's loss. Here a step calls the patched loss;
    entropy and token accuracy, which TRL logs, come from the same pass.

    Raises:
        ValueError: in the first step, if the model's loss is not patched, or if another loss is
            asked for (``loss_type="dft"``, label smoothing, ``compute_loss_func``, the load
            balancing of experts, sequence parallelism).
    """

    _tag_names = ["trl", "sft", OUR_TAG]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        keep_exact(self.accelerator)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The patched loss over ``num_items_in_batch``, and TRL's metrics of it."""
        self._require_our_loss()
        inputs = {**inputs, "use_cache": False, "skip_logits": True}
        # Past TRL's compute_loss to Trainer's, which knows accumulation and ranks.
        loss, outputs = super(trl.SFTTrainer, self).compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self._log_metrics(outputs.loss_output, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            unlabelled = {k: v for k, v in inputs.items() if k not in _LABELS}
            return loss, model(**unlabelled)

    def _require_our_loss(self) -> None:
        if not loss_is_patched(self.model):
            raise ValueError(
                "varlen_sft.integrations.trl.SFTTrainer needs a model whose loss is patched: call "
                "varlen_sft.patch(model), or use trl.SFTTrainer"
            )
        parallel = self.accelerator.parallelism_config
        others = {
            f"loss_type={self.args.loss_type!r}": self.args.loss_type != "nll",
            "label_smoothing_factor": self.label_smoother is not None,
            "compute_loss_func": self.compute_loss_func is not None,
            "router_aux_loss_coef": self.aux_loss_enabled,
            "sequence parallelism": parallel is not None and parallel.sp_enabled,
        }
        for name, wanted in others.items():
            if wanted:
                raise ValueError(
                    f"the patched loss does not know {name}: use trl.SFTTrainer for it"
                )

    def _log_metrics(self, output: LossOutput, inputs: Mapping[str, Any]) -> None:
        """Means over the supervised tokens of all ranks, under TRL's names; one wait in all."""
        mode = "train" if self.model.training else "eval"
        sums = torch.stack(
            [
                (targets(inputs) != IGNORE_INDEX).sum().float(),
                output.entropy.sum().float(),
                output.correct.sum().float(),
                _real_tokens(inputs).float(),
            ]
        )
        valid, entropy, correct, tokens = self.accelerator.gather(sums[None]).sum(0).tolist()
        self._metrics[mode]["entropy"].append(entropy / valid if valid else 0.0)
        self._metrics[mode]["mean_token_accuracy"].append(correct / valid if valid else 0.0)
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


_LABELS = ("labels", "shift_labels", "shift_weights", "rows", "skip_logits")


def _real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Tokens of a batch as TRL counts them: all of a pack, those under the mask of a padded one."""
    if inputs.get("attention_mask") is not None:
        return inputs["attention_mask"].sum()
    ids = inputs["input_ids"]
    return torch.tensor(ids.numel(), device=ids.device)
