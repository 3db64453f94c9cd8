"""A TRL trainer over the eight samples, of whatever class, that leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
import trl
from torch import nn

from tests.integrations.families import VOCAB
from tests.integrations.steps import ONE_STEP, eight_samples


def sft_trainer(
    kind: type[trl.SFTTrainer],
    model: nn.Module,
    out: Path,
    collator: Any = None,
    *,
    fractional: bool = False,
    peft_config: Any = None,
    **arguments: Any,
) -> trl.SFTTrainer:
    """Keyword arguments are those of ``trl.SFTConfig``; by default the set-up is ``ONE_STEP``."""
    rows = datasets.Dataset.from_list(_rows(fractional))
    settings = ONE_STEP | {"max_length": None, "gradient_checkpointing": False} | arguments
    return kind(
        model,
        trl.SFTConfig(str(out), bf16=False, **settings),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=_tokenizer(),
        data_collator=collator,
        peft_config=peft_config,
    )


def _rows(fractional: bool) -> list[dict[str, list]]:
    rows = []
    for sample in eight_samples(fractional=fractional):
        row = {"input_ids": sample.input_ids.tolist()}
        row["labels"] = np.where(sample.token_weights > 0, sample.input_ids, -100).tolist()
        if fractional:
            row["token_weights"] = sample.token_weights.tolist()
        rows.append(row)
    return rows


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """TRL wants one, though the rows are tokenised."""
    words = {f"w{i}": i for i in range(VOCAB - 2)} | {"<pad>": VOCAB - 2, "<end>": VOCAB - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<end>"
    )
