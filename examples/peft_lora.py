"""LoRA through PEFT, on Hugging Face's Trainer without padding.

    python examples/peft_lora.py MODEL_FOLDER chats.jsonl OUT

Adapters may sit on any projection; one on the head needs ``patch(model, loss=False)``.
"""

import sys

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import varlen_sft
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.load import tokenize_source


def main(folder, chats, out, **settings):
    tokenizer = ChatTokenizer.from_folder(folder)
    samples = [sample for _, row in tokenize_source(chats, tokenizer) for sample in row]

    model = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
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
