"""TRL's SFTTrainer without padding, with its metrics.

python examples/trl_sft.py MODEL_FOLDER chats.jsonl OUT
"""

import sys

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import varlen_sft
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.load import tokenize_source
from varlen_sft.integrations.trl import SFTTrainer


def main(folder, chats, out, **settings):
    tokenizer = ChatTokenizer.from_folder(folder)
    rows = [
        {
            "input_ids": sample.input_ids,
            "labels": np.where(sample.token_weights > 0, sample.input_ids, -100),
        }
        for _, row in tokenize_source(chats, tokenizer)
        for sample in row
    ]

    model = AutoModelForCausalLM.from_pretrained(folder)
    print(varlen_sft.patch(model))
    trainer = SFTTrainer(
        model,
        # TRL would cut what is longer than 1024 tokens.
        SFTConfig(out, max_length=None, **settings),
        train_dataset=Dataset.from_list(rows),
        data_collator=varlen_sft.Collator(),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    trainer.save_model(out)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
