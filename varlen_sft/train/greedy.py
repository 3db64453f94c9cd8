"""What a model in training says, greedily, as its ranks run it: alone, by DDP or by FSDP2.

Each rank reads its own share of the prompts, in as many calls as any other: under FSDP2 a call is a
call of all ranks. Nothing is drawn, nothing of the model is left changed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varlen_sft.models.decode import instead, llama_decoder
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.train.distributed import World
from varlen_sft.train.parallel import give_back
from varlen_sft.train.setup_model import PatchedForSFT

__all__ = ["Prompt", "decoder", "greedy"]


class Prompt(NamedTuple):
    """Where an answer begins, and at which tokens it ends."""

    ids: Sequence[int]  # at least 1
    stops: frozenset[int]


@torch.no_grad()
def greedy(
    model: nn.Module, prompts: Sequence[Prompt], max_new_tokens: int, world: World
) -> list[list[int]]:
    """The most likely token after each prompt, and so on through its stop token.

    Args:
        model: as it is trained, on the world's device. All ranks call it with the same prompts.
        prompts: at least one.
        max_new_tokens: an answer without a stop token ends there.

    Returns:
        The new ids of each prompt, its stop token among them, on every rank.
    """
    mine = range(world.rank, len(prompts), world.size)
    share = [prompts[k] for k in mine]
    idle = -(-len(prompts) // world.size) - len(share)  # a rank with less reads something again
    was_training = model.training
    model.eval()
    with decoder(model):
        said = _said(model, [*share, *[prompts[0]] * idle], len(share), max_new_tokens, world)
    model.train(was_training)
    table = torch.zeros(len(prompts), max_new_tokens + 1, dtype=torch.int64, device=world.device)
    for k, ids in zip(mine, said, strict=False):
        table[k, 0] = len(ids)
        table[k, 1 : 1 + len(ids)] = torch.tensor(ids)
    return [row[1 : 1 + row[0]] for row in world.sum(table).tolist()]


def _said(
    model: nn.Module, prompts: Sequence[Prompt], count: int, max_new_tokens: int, world: World
) -> list[list[int]]:
    """Of this rank's prompts, of which the first ``count`` matter."""
    said: list[list[int]] = [[] for _ in prompts]
    next_ids = [torch.tensor(list(prompt.ids), device=world.device) for prompt in prompts]
    going = list(range(count))
    for _ in range(max_new_tokens):
        best = model(next_ids).argmax(-1)
        next_ids = list(best.split(1))
        for k, token in enumerate(best.tolist()):
            if k in going:
                said[k].append(token)
        going = [k for k in going if said[k][-1] not in prompts[k].stops]
        # Every token: so that no rank waits longer for another than for one call.
        if not int(world.sum(torch.tensor([len(going)], device=world.device))):
            break
    return said


def decoder(model: nn.Module) -> AbstractContextManager[None]:
    """Meanwhile ``model(ids)`` reads on in sequences, see ``llama_decoder``.

    Raises:
        TypeError: neither a LlamaForSFT nor a PatchedForSFT.
    """
    if isinstance(model, LlamaForSFT):
        return _gathered(model, llama_decoder(model))
    if isinstance(model, PatchedForSFT):
        return _gathered(model, instead(model, "forward", _PatchedReader(model.model)))
    raise TypeError(f"model must be a LlamaForSFT or a PatchedForSFT, got {type(model).__name__}")


@contextmanager
def _gathered(model: nn.Module, changed: AbstractContextManager[None]) -> Iterator[None]:
    """FSDP2 leaves parameters whole until a backward, which does not come here."""
    with changed:
        yield
    give_back(model)


def _eagerly() -> AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:  # takes a second, and nothing was compiled without it
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


class _PatchedReader:
    """transformers' own way, sequence by sequence: a call that speaks of no pack is not ours.

    Blocks that were compiled for packs run eagerly: lengths and caches of every prompt would be
    compiled anew.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.caches: dict[int, Any] = {}

    def __call__(self, ids: Sequence[Tensor]) -> Tensor:
        """In the place of the model's forward: (B, V)."""
        with _eagerly():
            return torch.stack([self._last(k, of) for k, of in enumerate(ids)])

    def _last(self, k: int, ids: Tensor) -> Tensor:
        made = self.model(
            input_ids=ids[None],
            past_key_values=self.caches.get(k),
            use_cache=True,
            logits_to_keep=1,
        )
        self.caches[k] = made.past_key_values
        return made.logits[0, -1]
