"""Whom the drop-in benchmark compares: trainers with their own collators, one step each."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from varlen_sft.data.sample import Sample
from varlen_sft.tools.step_bench import Load
from varlen_sft.tools.step_candidates import load_hf
from varlen_sft.types import IGNORE_INDEX


def features(samples: Sequence[Sample]) -> list[dict[str, list[int]]]:
    """As data sets hold them: token ids, and labels that are not shifted."""
    made = []
    for sample in samples:
        ids = sample.input_ids.tolist()
        trained = (sample.token_weights > 0).tolist()
        trained[0] = False  # nothing predicts a first token
        labels = [t if own else IGNORE_INDEX for t, own in zip(ids, trained, strict=True)]
        made.append({"input_ids": ids, "labels": labels})
    return made


class Steps:
    """A trainer's own way to one step: its collator, its count of items, its training_step."""

    def __init__(self, trainer: Any, rows: Sequence[dict[str, Any]], micro_batch: int) -> None:
        self.trainer = trainer
        starts = range(0, len(rows), micro_batch)
        groups = [list(rows[start : start + micro_batch]) for start in starts]
        self.batches = [trainer.data_collator(group) for group in groups]
        self.trainer.current_gradient_accumulation_steps = len(self.batches)
        self.tokens = sum(batch["input_ids"].numel() for batch in self.batches)

    def step(self) -> float:
        trainer = self.trainer
        trainer.model.zero_grad(set_to_none=True)
        count = trainer._get_num_items_in_batch(self.batches, torch.device("cpu"))
        losses = [
            trainer.training_step(trainer.model, dict(batch), count) for batch in self.batches
        ]
        return float(sum(losses))


def _arguments(cls: Any, **changes: Any) -> Any:
    return cls(
        output_dir=tempfile.gettempdir(), use_cpu=True, report_to=[], remove_unused_columns=False,
        save_strategy="no", disable_tqdm=True, bf16=False, activation_checkpointing=False,
        **changes,
    )  # fmt: skip


class HFPadded(Steps):
    """transformers' Trainer as its documentation has it."""

    def __init__(self, load: Load) -> None:
        from transformers import Trainer, TrainingArguments

        trainer = Trainer(
            load_hf(load, "sdpa"),
            _arguments(TrainingArguments),
            data_collator=pad,
            train_dataset=[],
        )
        super().__init__(trainer, features(load.samples()), 4)


def pad(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """What DataCollatorForSeq2Seq does with a tokenizer: right padding, labels -100 there."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": filled("input_ids", 0),
        "attention_mask": torch.tensor(mask),
        "labels": filled("labels", IGNORE_INDEX),
    }


class Patched(Steps):
    """One line and our collator."""

    def __init__(self, load: Load, *, prune: bool = False) -> None:
        from transformers import Trainer, TrainingArguments

        import varlen_sft

        model = load_hf(load, "sdpa")
        varlen_sft.patch(model, prune_last_layer=prune)
        trainer = Trainer(
            model, _arguments(TrainingArguments), data_collator=varlen_sft.Collator(),
            train_dataset=[],
        )  # fmt: skip
        rows = features(load.samples())
        super().__init__(trainer, rows, len(rows))


def _trl(load: Load, patched: bool) -> tuple[Any, list[dict[str, Any]]]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    import varlen_sft

    rows = features(load.samples())
    model: Any = load_hf(load, "sdpa")
    options: dict[str, Any] = {"padding_free": not patched, "max_length": None}
    cls: Any = SFTTrainer
    if patched:
        from varlen_sft.integrations.trl import SFTTrainer as cls  # noqa: N813

        varlen_sft.patch(model)
    trainer = cls(
        model=model, args=_arguments(SFTConfig, **options), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(load.model),
        **({"data_collator": varlen_sft.Collator()} if patched else {}),
    )  # fmt: skip
    return trainer, rows


class TRLPacked(Steps):
    """TRL's padding-free mode, and its own loss head."""

    def __init__(self, load: Load) -> None:
        trainer, rows = _trl(load, patched=False)
        super().__init__(trainer, rows, len(rows))


class PatchedTRL(Steps):
    """TRL's trainer over a patched model."""

    def __init__(self, load: Load) -> None:
        trainer, rows = _trl(load, patched=True)
        super().__init__(trainer, rows, len(rows))


CANDIDATES: dict[str, Any] = {
    "hf padded": HFPadded,
    "TRL packed": TRLPacked,
    "patched": Patched,
    "patched, pruned": partial(Patched, prune=True),
    "patched TRL": PatchedTRL,
}
