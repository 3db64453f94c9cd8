"""Greedy answers by transformers' own generate, from a checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from varlen_sft.data.formats import Conversation, Message
from varlen_sft.tools.demo_data import answer

__all__ = ["generate"]


def generate(
    folder: Path,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 48,
    progress: Callable[[float], None] = lambda share: None,
) -> list[str]:
    """What the model says next in each conversation.

    Args:
        folder: a HF checkpoint folder with tokenizer and chat template.
        prompts: messages of each conversation, the user's last.
        max_new_tokens: an answer is cut there.
        progress: told the share done.

    Returns:
        The answers' text, without special tokens.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # it would write into ours
    progress(0.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for done, messages in enumerate(prompts, start=1):
        ids = tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            out = model.generate(**ids, do_sample=False, max_new_tokens=max_new_tokens)
        answers.append(
            tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        )
        progress(done / len(prompts))
    return answers


def prompts(held_out: Sequence[Conversation]) -> list[Conversation]:
    """Two conversations to answer: one that a program can check, if there is one, and one other."""
    checkable = [c for c in held_out if expected_answer(c.messages[:-1]) is not None]
    others = [c for c in held_out if expected_answer(c.messages[:-1]) is None]
    return [*others[:1], *checkable[:1], *others[1:], *checkable[1:]][:2]


def expected_answer(messages: Sequence[Message]) -> str | None:
    """The right answer of a register machine dialogue, None for any other."""
    try:
        return answer(messages)
    except ValueError:
        return None
