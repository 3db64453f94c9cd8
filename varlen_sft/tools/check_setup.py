"""Find the well-known mistakes of packing in a training set-up that is not ours.

Call it in your own training script, on the batch that goes into the model:

    from varlen_sft.tools.check_setup import inspect_batch
    for mistake in inspect_batch(batch, model, samples):
        print(mistake)

An empty list means that nothing was found. ``varlen-sft check --batch FILE`` does the same with a
batch written to a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from varlen_sft.tools.check_batch import BatchView
from varlen_sft.tools.check_batch_edges import edge_mistakes
from varlen_sft.tools.check_batch_labels import label_mistakes
from varlen_sft.tools.check_batch_masks import mask_mistakes
from varlen_sft.tools.check_mistake import Mistake, ModelFacts
from varlen_sft.tools.check_rotary import length_mistakes, length_note, table_mistakes

__all__ = ["Mistake", "inspect_batch", "inspect_model"]


def inspect_batch(
    batch: Mapping[str, Any], model: Any = None, samples: Sequence[Any] | None = None
) -> list[Mistake]:
    """What is wrong with a batch that a Hugging Face model is called with.

    Asked are: a mask or a cache beside packed ids, positions that are not reset, zero-padded
    position ids, edges that FlashAttention cannot use, boundary labels that are trained, labels
    shifted twice, pad = eos masked by value, a mask with holes, padding that is trained, RoPE that
    depends on the longest of the batch, and, where the model itself is given, RoPE tables that
    were rounded.

    Args:
        batch: (B, L) ``input_ids``, and what else there is of ``labels``, ``shift_labels``,
            ``position_ids``, ``attention_mask`` (2-D or 4-D), ``seq_idx`` and the four
            keywords of FlashAttention: tensors on any device, arrays or nested lists. Others are
            not read. A ``lengths`` says how many tokens each sample of a single row has.
        model: a Hugging Face model, its config, or ``ModelFacts``; it knows stop tokens, pad token
            and RoPE.
        samples: what the batch was made of, each a ``Sample``, a mapping with ``input_ids`` (and
            unshifted ``labels``) or token ids. With it edges and targets are known, not guessed.

    Returns:
        One ``Mistake`` per kind, at the first place where it is seen; [] if none is.

    Raises:
        ValueError: a batch that cannot be read, or that does not hold the samples.
    """
    found = inspect_view(BatchView.of(batch, samples), _facts(model))
    if hasattr(model, "named_modules"):
        found += table_mistakes(model)
    return found


def inspect_view(view: BatchView, facts: ModelFacts) -> list[Mistake]:
    """``inspect_batch`` of a batch that has been read, for what is known of a model."""
    return [
        *mask_mistakes(view, facts),
        *edge_mistakes(view, facts),
        *label_mistakes(view, facts),
        *length_mistakes(view, facts),
    ]


def inspect_model(model: Any) -> list[Mistake]:
    """What is wrong with a model's RoPE before any batch is seen.

    Args:
        model: a Hugging Face model as it goes into the training.

    Returns:
        Tables that were rounded; and, as a suspicion, a RoPE whose frequencies depend on the
        longest sample of a batch.
    """
    return [*table_mistakes(model), *length_note(ModelFacts.of(model))]


def _facts(model: Any) -> ModelFacts:
    if model is None:
        return ModelFacts()
    return model if isinstance(model, ModelFacts) else ModelFacts.of(model)
