"""A loop of one's own under Accelerate: FSDP2, gradient accumulation, no padding.

    accelerate launch --num-processes 2 examples/accelerate_fsdp2.py MODEL_FOLDER chats.jsonl OUT

Each process packs its own batches. Of a step, ``denominator`` counts what is trained (the sum of
weights, if there are any) over all its packs; every loss is divided by that.
"""

import sys
from itertools import islice

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import varlen_sft
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.load import tokenize_source
from varlen_sft.integrations import denominator


def main(
    folder, chats, out, *, batch_size=8, accumulate=2, lr=1e-5, epochs=1, dtype=torch.bfloat16
):
    # Weights are kept and summed in fp32. By default FSDP would also round what goes into the
    # model, the number of trained tokens among it; patched models refuse that.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=policy,
        state_dict_type="FULL_STATE_DICT",
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    tokenizer = ChatTokenizer.from_folder(folder)
    samples = [sample for _, row in tokenize_source(chats, tokenizer) for sample in row]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    varlen_sft.patch(model)
    collator = varlen_sft.Collator(fractional_weights=True)
    loader = DataLoader(samples, batch_size=batch_size, shuffle=True, collate_fn=collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    for _ in range(epochs):
        packs = iter(loader)
        while step := list(islice(packs, accumulate)):
            losses.append(train_step(accelerator, model, optimizer, step))
            accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")
    accelerator.unwrap_model(model).save_pretrained(
        out,
        state_dict=accelerator.get_state_dict(model),
        is_main_process=accelerator.is_main_process,
    )
    return losses


def train_step(accelerator, model, optimizer, packs):
    total = accelerator.reduce(denominator(packs), "sum")
    sums = []
    for pack in packs:
        loss = model(**pack, num_items_in_batch=total).loss
        # FSDP averages gradients over the processes; they are parts of one sum.
        accelerator.backward(loss * accelerator.num_processes)
        sums.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    return float(accelerator.reduce(torch.stack(sums).sum(), "sum"))


if __name__ == "__main__":
    main(*sys.argv[1:])
