"""Rows without a chat template: documents, prompts with completions, tokens made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from varlen_sft.data.control import ControlTokens
from varlen_sft.data.conversation import ConversationError, Text, Tokens
from varlen_sft.data.masks import MaskOptions, balanced
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.search import AnswerSearch


class PlainEncoder:
    """Documents and completions to samples.

    A row is BOS, if the tokenizer adds one, the prompt, the completion, and EOS, each special token
    once: a text that already begins or ends with one keeps that one. Prompt and completion are
    tokenised apart, as at inference, where the prompt ends before the answer begins. Anything else
    in them that spells a control token is text.

    Args:
        control: the tokenizer's control tokens.
        special_tokens: ``bos_token`` and ``eos_token`` by name.
        adds_bos: whether the tokenizer begins a text with BOS by itself.
    """

    def __init__(
        self, control: ControlTokens, special_tokens: Mapping[str, str], adds_bos: bool
    ) -> None:
        self._control = control
        self._bos = special_tokens.get("bos_token", "") if adds_bos else ""
        self._eos = special_tokens.get("eos_token", "")

    def encode(self, row: Text, options: MaskOptions) -> Sample:
        """A sample of L tokens; every token of the completion and EOS weigh ``row.weight``.

        Raises:
            ConversationError: the tokenizer has no EOS, or does not keep the text.
        """
        if self._eos not in self._control.ids:
            raise ConversationError("the tokenizer has no eos_token, so a text could never end")
        prompt, completion = row.prompt, row.completion.removesuffix(self._eos)
        if self._bos and prompt:
            prompt = prompt.removeprefix(self._bos)
        elif self._bos:
            completion = completion.removeprefix(self._bos)
        head = [self._control.ids[self._bos]] if self._bos else []
        before = [*head, *self._control.plain_ids(prompt)]
        after = [*self._control.plain_ids(completion), self._control.ids[self._eos]]
        ids = np.array(before + after, dtype=np.int32)
        weights = np.full(len(ids), options.prompt_weight, dtype=np.float32)
        weights[len(before) :] = row.weight
        if options.supervision_mode == "all":
            weights[: len(before)] = row.weight
        roles = np.zeros(len(ids), dtype=np.uint8)
        if row.prompt:
            roles[len(head) : len(before)] = ROLES.index("user")
            roles[len(before) :] = ROLES.index("assistant")
        return Sample(ids, balanced(weights, options), roles)


def tokens_sample(row: Tokens, options: MaskOptions, search: AnswerSearch) -> Sample:
    """Tokens as they are; what is trained counts as the assistant's.

    Raises:
        ConversationError: answers are to be searched for, and that cannot be done.
    """
    if row.search:
        answers = np.zeros(len(row.input_ids), dtype=np.float32)
        for start, end in search.answers(row.input_ids):
            answers[start:end] = 1
        row = Tokens(row.input_ids, row.token_weights * answers)
    roles = np.where(row.token_weights > 0, ROLES.index("assistant"), 0).astype(np.uint8)
    weights = balanced(row.token_weights.astype(np.float32), options)
    return Sample(row.input_ids.astype(np.int32), weights, roles)
