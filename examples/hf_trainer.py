"""Hugging Face's Trainer without padding: one line for the model, one for the batches.

python examples/hf_trainer.py MODEL_FOLDER chats.jsonl OUT
"""

import sys

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import varlen_sft
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.load import tokenize_source


def main(folder, chats, out, **settings):
    tokenizer = ChatTokenizer.from_folder(folder)
    samples = [sample for _, row in tokenize_source(chats, tokenizer) for sample in row]

    model = AutoModelForCausalLM.from_pretrained(folder)
    print(varlen_sft.patch(model))
    trainer = Trainer(
        model,
        TrainingArguments(out, **settings),
        train_dataset=samples,
        data_collator=varlen_sft.Collator(),
    )
    trainer.train()
    trainer.save_model(out)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
