"""What a LlamaForSFT says next: sequences read on, with keys and values kept.

A model may be sharded or compiled for training. So nothing here calls its layers by another way
than as modules: for the time of a decoder the model's own forward, and that of each block, give way
to the ones below, and come back after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from varlen_sft.models.llama import Block, LlamaForSFT, Residual
from varlen_sft.modules import Rotation
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.reference import position_ids_from_lengths
from varlen_sft.types import Sequences

__all__ = ["instead", "llama_decoder"]


@contextmanager
def llama_decoder(model: LlamaForSFT) -> Iterator[None]:
    """Meanwhile ``model(ids)`` reads on in sequences, which begin with the first call.

    ``ids`` are the next tokens (n_i,) int64 of each sequence on the model's device, n_i at least 1:
    the prompts first. The result, (B, V), are the logits of what follows the last of each.
    """
    reader = _Reader(model)
    blocks: Any = model.layers
    with ExitStack() as changes:
        changes.enter_context(instead(model, "forward", reader.forward))
        for number, block in enumerate(blocks):
            changes.enter_context(instead(block, "forward", partial(reader.block, number, block)))
        # A longer table than training has made could only be one of the same numbers; but then
        # nobody has to believe that.
        changes.enter_context(instead(model.rotary, "_table", model.rotary._table))
        yield


@contextmanager
def instead(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Another value for an attribute of this module alone."""
    held = vars(module)
    before = {name: held[name]} if name in held else {}
    held[name] = value
    try:
        yield
    finally:
        del held[name]
        held.update(before)


class _Reader:
    """B sequences as far as they were read; T_k tokens, laid one sequence after the other."""

    def __init__(self, model: LlamaForSFT) -> None:
        self.model = model
        self.lengths: list[int] = []  # read so far
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values (T_k, K, D) by layer
        self.order = torch.empty(0)  # (T_k,) of what was kept and what is new, behind it
        self.sequences: Sequences  # of all T_k

    def forward(self, ids: Sequence[Tensor]) -> Tensor:
        """In the place of the model's."""
        model, device = self.model, ids[0].device
        new = [len(of) for of in ids]
        rows = self._lay_out(new, device)
        rotation = model.rotary(position_ids_from_lengths(self.lengths).to(device), self.sequences)
        own = rotation._replace(position_ids=rotation.position_ids[rows])
        sequences = _on(device, new)
        residual = Residual(model.embed_tokens(torch.cat(list(ids))))
        for block in model.layers:
            residual = block(residual, own, sequences)
        last = sequences.cu_seqlens[1:].long() - 1
        return model.lm_head(model.norm(residual)[0][last])

    def block(
        self,
        number: int,
        block: Block,
        residual: Residual,
        rotation: Rotation,
        sequences: Sequences,
    ) -> Residual:
        """In the place of a block's, which it is but for the keys that came before."""
        normed, stream = block.input_layernorm(residual)
        update = block.self_attn.read_on(normed, rotation, sequences, partial(self._keep, number))
        normed, stream = block.post_attention_layernorm(Residual(stream, update))
        return Residual(stream, block.mlp(normed))

    def _lay_out(self, new: Sequence[int], device: torch.device) -> Tensor:
        """Make room for the next tokens; where they are among all, in their order."""
        before = self.lengths or [0] * len(new)
        self.lengths = [a + b for a, b in zip(before, new, strict=True)]
        self.sequences = _on(device, self.lengths)
        number = torch.arange(len(new))
        owners = [number.repeat_interleave(torch.tensor(counts)) for counts in (before, new)]
        order = torch.cat(owners).argsort(stable=True)
        rows = (order >= sum(before)).nonzero().flatten()
        self.order = order.to(device)
        return rows.to(device)

    def _keep(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Sequences]:
        if layer in self.kept:
            pairs = zip(self.kept[layer], (k, v), strict=True)
            k, v = (torch.cat(pair)[self.order] for pair in pairs)
        self.kept[layer] = k, v
        return k, v, self.sequences


def _on(device: torch.device, lengths: Sequence[int]) -> Sequences:
    made = sequences_from_lengths(lengths)
    return Sequences(made.cu_seqlens.to(device), made.max_seqlen, made.num_sequences.to(device))
