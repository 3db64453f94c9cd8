"""Whole dialogues with a trained model, by transformers' generate: how many are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from varlen_sft.data.formats import Conversation, Message

__all__ = ["Score", "from_folder", "held_out_loss", "score"]

Reply = Callable[[Sequence[Sequence[Message]]], Sequence[str | None]]
"""What is said next in each of several dialogues; None where no end was found."""
Talk = list[Message]
LONGEST = 64  # tokens of an answer: the longest right one has 32 characters


class Score(NamedTuple):
    """How many are exactly right."""

    dialogues: int  # every answer in them
    of_dialogues: int
    answers: int
    of_answers: int
    wrong: list[tuple[str, str, str | None]]  # the first few: asked, right answer, answer

    @property
    def share(self) -> float:
        """Of dialogues."""
        return self.dialogues / self.of_dialogues

    def facts(self) -> dict[str, Any]:
        """For the JSON."""
        return self._asdict() | {"share": self.share}


def score(dialogues: Sequence[Conversation], reply: Reply, *, shown: int = 3) -> Score:
    """Lead every dialogue to its end, with the model's own answers as its past.

    An answer is right if it is the true one character for character, and ended by itself. After a
    wrong one the dialogue goes on, and what follows is measured against the truth.
    """
    talks: list[Talk] = [[] for _ in dialogues]
    good = [True] * len(dialogues)
    right = asked = 0
    wrong: list[tuple[str, str, str | None]] = []
    for turn in range(max(len(d.messages) for d in dialogues)):
        open_ = [k for k, d in enumerate(dialogues) if turn < len(d.messages)]
        for k in open_:
            if dialogues[k].messages[turn].role != "assistant":
                talks[k].append(dialogues[k].messages[turn])
        answering = [k for k in open_ if dialogues[k].messages[turn].role == "assistant"]
        said = reply([talks[k] for k in answering]) if answering else []
        for k, answer in zip(answering, said, strict=True):
            truth = dialogues[k].messages[turn].content
            if answer != truth:
                good[k] = False
                wrong.append((talks[k][-1].content, truth, answer))
            right, asked = right + (answer == truth), asked + 1
            talks[k].append(Message("assistant", answer or ""))
    return Score(sum(good), len(good), right, asked, wrong[:shown])


def from_folder(folder: Path, *, batch: int = 50, dtype: str = "float32") -> Reply:
    """Greedy answers of an exported model, by the tokenizer and the template beside it."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=getattr(torch, dtype)).eval()
    stop = tokenizer.eos_token_id

    def some(talks: Sequence[Sequence[Message]]) -> list[str | None]:
        texts = [_prompt(tokenizer, talk) for talk in talks]
        asked = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        made = model.generate(
            input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], do_sample=False,
            max_new_tokens=LONGEST, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        rows = made[:, asked["input_ids"].shape[1] :].tolist()
        return [tokenizer.decode(r[: r.index(stop)]) if stop in r else None for r in rows]

    def reply(talks: Sequence[Sequence[Message]]) -> list[str | None]:
        order = sorted(range(len(talks)), key=lambda k: sum(len(m.content) for m in talks[k]))
        said: dict[int, str | None] = {}
        with torch.inference_mode():
            for start in range(0, len(order), batch):
                group = order[start : start + batch]
                said |= dict(zip(group, some([talks[k] for k in group]), strict=True))
        return [said[k] for k in range(len(talks))]

    return reply


def _prompt(tokenizer: Any, talk: Sequence[Message]) -> str:
    rows = [{"role": message.role, "content": message.content} for message in talk]
    return tokenizer.apply_chat_template(rows, add_generation_prompt=True, tokenize=False)


def held_out_loss(folder: Path, dialogues: Sequence[Conversation], *, group: int = 10) -> float:
    """Mean loss of the tokens of all answers, of packs that are right, whatever was trained on."""
    import torch

    from varlen_sft.data.batch import collate
    from varlen_sft.data.chat import ChatTokenizer
    from varlen_sft.models.llama import LlamaForSFT

    tokenizer = ChatTokenizer.from_folder(folder)
    model = LlamaForSFT.from_pretrained(folder, dtype=torch.float32).eval()
    samples = [tokenizer.encode(dialogue) for dialogue in dialogues]
    loss = weight = 0.0
    with torch.no_grad():
        for start in range(0, len(samples), group):
            found = model(collate(samples[start : start + group]))
            loss, weight = loss + float(found.loss_sum), weight + float(found.weight_sum)
    return loss / weight
