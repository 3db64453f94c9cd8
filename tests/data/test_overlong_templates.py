"""An agent's turn cut under the stock chat templates of other people's models."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest

from tests.data.templates import tokenizers
from tests.data.templates.conversations import answer, call, calling, result, talk, user
from tests.data.templates.prove import chat_tokenizer, trained, with_template
from tests.data.templates.templates import FACTS, sources
from varlen_sft.data.conversation import Conversation, ConversationError
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.overlong import fit_rows

pytestmark = pytest.mark.skipif(
    not sources(), reason="needs the chat templates in trl: pip install trl"
)
STEPS = 5


def agent(reasoning: bool) -> Conversation:
    messages = [user("Where is it warm?")]
    for k in range(STEPS):
        thought = f"thought {k}" if reasoning else None
        place = call("weather", {"city": f"city{k}"}, k + 1)
        messages += [calling(place, reasoning=thought), result(f"{k} degrees", number=k + 1)]
    return talk(*messages, answer("nowhere"), tools=True)


@pytest.mark.parametrize("reasoning", [False, True])
def test_what_is_left_is_calls_with_their_stop_tokens_and_all_results_between_them(reasoning):
    """Under each template that takes the row; some have no way to write a last call's reasoning."""
    base = chat_tokenizer(tokenizers.with_all_tokens(tokenizers.byte_level()), "qwen3")
    row, outcomes = agent(reasoning), Counter[str]()
    for name in sources():
        chat, facts = with_template(base, name), FACTS[name]
        (whole,) = chat.encode_rows([row], MaskOptions())
        if isinstance(whole, ConversationError):
            outcomes["refused"] += 1
            continue
        (wanted,) = chat.encode_rows([replace(row, messages=row.messages[:6])], MaskOptions())
        takes = not isinstance(wanted, ConversationError)
        limit = len(wanted[0]) - 1 if takes else len(whole[0]) - 2
        (fitted,) = fit_rows(chat, [row], MaskOptions(), limit, "truncate")
        assert not isinstance(fitted, ConversationError), (name, fitted)
        outcomes[fitted.outcome] += 1
        for sample in fitted.samples:
            assert len(sample) - 1 <= limit
            text, runs = chat.decode(sample.input_ids), trained(chat, sample)
            calls = len(runs)
            assert calls == 3 and takes, name
            for k, run in enumerate(runs):
                assert re.findall(r"city(\d)", run) == [str(k)], (name, run)
                assert run.endswith((facts.eos, *facts.stops, facts.end.strip())), (name, run)
                assert "degrees" not in run
            assert re.findall(r"(\d) degrees", text) == [str(k) for k in range(calls - 1)], name
    assert outcomes["truncated"] >= (15 if reasoning else 30), outcomes
    assert not outcomes["dropped"] or reasoning, outcomes
