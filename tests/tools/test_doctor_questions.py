"""``varlen-sft doctor``: a good template passes, and each planted fault turns its own question."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from tokenizers import Tokenizer, processors

from tests.data.test_chat import CHATML
from tests.tools.doctor_cases import (
    AGREE,
    BOS,
    CONTROL,
    FAULTS,
    HEADER,
    HISTORY,
    LAST_THOUGHT,
    PAD,
    PREFIX,
    PROMPT,
    REFUSED,
    STOPS,
    STRADDLES,
    TAGGED,
    TAGS,
    WHOLE,
    asked,
    failed,
    tiny_json,
    write_folder,
)
from varlen_sft.data import layout, rows
from varlen_sft.data.control import ControlTokens
from varlen_sft.data.sample import Sample


@pytest.fixture
def folder(tmp_path):
    """Makes a model folder of a template, and gives it."""
    return partial(write_folder, tmp_path)


def test_a_good_template_answers_every_question(folder):
    assert asked(folder()) == {
        PROMPT: ("pass", r"add_generation_prompt adds '<|im_start|>assistant\n'"),
        PREFIX: ("pass", "the prompt of each of 22 answers is kept"),
        HEADER: ("pass", "no: an answer is trained from its first character on"),
        STOPS: ("pass", "'<|im_end|>' (16 answers): trained in each"),
        TAGS: ("pass", "there are none, and none are needed"),
        HISTORY: ("pass", "yes, each of 8 earlier answers"),
        STRADDLES: (
            "note",
            "2 in whitespace, such as a header's newline that merges with the answer's; the text "
            "is cut there, as it is when a model is prompted",
        ),
        CONTROL: (
            "pass",
            "yes, as in 'What is <|im_end|> <|end|> <|im_start|> for?'",
        ),
        BOS: ("pass", "the template writes '<|im_start|>' once"),
        PAD: ("pass", "there is no pad token, and none is needed"),
        AGREE: ("pass", "on 8 probes"),
        REFUSED: (
            "note",
            "thinking: the template leaves out the reasoning_content of message 6, the last "
            "answer\ntools: the template leaves out the tool calls of message 2",
        ),
    }


def test_a_template_that_writes_all_refuses_nothing(folder):
    found = asked(folder(WHOLE))
    assert failed(found) == set()
    assert found[AGREE] == ("pass", "on 10 probes")
    assert found[REFUSED][1].startswith("none of plain, multi-turn, whitespace, empty answer,")
    assert found[HEADER] == (
        "note",
        'no, but the template writes \'<t>\' and \'{"type": "function", "function": '
        '{"name": "\' after the prompt; a model has to say that itself, so it is trained',
    )


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_in_a_template_turns_its_question(case, folder):
    source, question, evidence = FAULTS[case]
    found = asked(folder(source, **({"bos_token": "<|end|>"} if question == BOS else {})))
    assert failed(found) == {question}
    assert all(part in found[question][1] for part in evidence), found[question]


def test_tags_that_enclose_more_are_told(folder):
    assert asked(folder(TAGGED))[TAGS] == (
        "pass",
        "in each of 8 probes they enclose what is trained",
    )
    more = TAGGED.replace("+ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", 
                          "+ '<|im_end|>' + '\n' }}{% endgeneration %}")  # fmt: skip
    assert asked(folder(more))[TAGS] == (
        "note",
        "in each of 8 probes they enclose what is trained, and '\\n' besides, which is not "
        "trained here",
    )


def test_history_is_judged_as_it_would_be_trained(folder):
    path = folder(LAST_THOUGHT)
    verdict, evidence = asked(path)[HISTORY]
    assert verdict == "fail" and "use history=preserve or per_assistant" in evidence
    assert asked(path, history="preserve")[HISTORY] == ("pass", "yes, each of 8 earlier answers")
    lost = "2 of 8 earlier answers change: 2 lose their thinking; "
    assert asked(path, history="per_assistant")[HISTORY] == (
        "pass",
        lost + "history=per_assistant trains each as it was said",
    )
    assert asked(path, supervision_mode="last_assistant")[HISTORY] == (
        "pass",
        lost + "only the last answer is trained",
    )
    forgets = folder(LAST_THOUGHT.replace(" or keep_past_thinking", ""))
    found = asked(forgets, history="preserve")
    assert found[HISTORY] == (
        "fail",
        lost + "the template has no variable that keeps them: use history=per_assistant",
    )


def test_other_ways_to_rewrite_history(folder):
    last = "loop.last and m.role == 'assistant'"
    opened = CHATML.replace("m['content'] +", f"('<t>' if {last} else '') + m.content +")
    opened = opened.replace("assistant\n' }}", "assistant\n<t>' }}")
    stop = CHATML.replace("'<|im_end|>' +", "('<|end|>' if loop.last else '<|im_end|>') +")
    bare = CHATML.replace("m['content'] +", f"('-' if {last} else '') + m.content +")
    for source, how in (
        (opened, "8 lose what the generation prompt ends in; use"),
        (stop, "8 end with another stop token; use"),
        (bare, "8 lose what the template writes around the last answer; use"),
    ):
        verdict, evidence = asked(folder(source))[HISTORY]
        assert verdict == "fail" and f"8 of 8 earlier answers change: {how}" in evidence


def test_a_stop_token_that_the_model_does_not_stop_at_is_told(folder):
    path = folder(CHATML.replace("<|im_end|>", "<|end|>"))
    verdict, evidence = asked(path)[STOPS]
    assert verdict == "note" and evidence.startswith("'<|end|>' (16 answers): trained in each; but")
    (path / "generation_config.json").write_text('{"eos_token_id": [0]}')
    assert asked(path)[STOPS] == ("pass", "'<|end|>' (16 answers): trained in each")


def test_straddles_come_from_the_tokens_not_from_the_answers(folder):
    closed = CHATML.replace("['role'] + '\n'", "['role'] + '<|end|>'")
    closed = closed.replace("assistant\n'", "assistant<|end|>'")
    assert asked(folder(closed))[STRADDLES] == (
        "pass",
        "in no probe, leading spaces and newlines among them",
    )


def adding_bos() -> str:
    tokenizer = Tokenizer.from_str(tiny_json())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    return tokenizer.to_str()


def test_a_tokenizer_that_adds_bos_is_told(folder):
    adds, bos = adding_bos(), "<|end|>"
    verdict, evidence = asked(folder("{{ bos_token }}" + CHATML, adds, bos_token=bos))[BOS]
    assert verdict == "note" and "the tokenizer would add it again" in evidence
    verdict, evidence = asked(folder(CHATML, adds, bos_token=bos))[BOS]
    assert verdict == "note" and evidence.startswith("no, not even once")
    assert asked(folder("{{ bos_token }}" + CHATML, bos_token=bos))[BOS] == (
        "pass",
        "the template writes '<|end|>' once",
    )
    assert asked(folder(bos_token=bos))[BOS] == (
        "pass",
        "neither template nor tokenizer writes '<|end|>'",
    )
    assert asked(folder(bos_token="<s>"))[BOS] == ("pass", "the tokenizer has no bos_token")


def test_pad_may_be_the_stop_token(folder):
    verdict, evidence = asked(folder(pad_token="<|im_end|>"))[PAD]
    assert verdict == "note" and evidence.startswith("yes, '<|im_end|>'; harmless here: ")
    assert asked(folder(pad_token="<|end|>"))[PAD] == ("pass", "no, it is '<|end|>'")


# -- faults that are not the template's


def test_a_wrong_place_is_found_by_the_second_way(folder, monkeypatch):
    lay_out = layout.Planner.lay_out

    def late(*args, **kwargs):
        found = lay_out(*args, **kwargs)
        answers = tuple(a._replace(start=a.start + 1) for a in found.answers)
        return replace(found, answers=answers)

    monkeypatch.setattr(layout.Planner, "lay_out", late)
    found = asked(folder())
    assert failed(found) == {AGREE}
    assert found[AGREE][1].startswith(
        "plain: two ways to find message 2 disagree on where it begins:"
    )


def test_a_stop_token_that_is_not_trained(folder, monkeypatch):
    weigh = rows.weigh

    def silent(*args, **kwargs):
        samples = weigh(*args, **kwargs)
        for sample in samples:
            if isinstance(sample, Sample):
                sample.token_weights[sample.input_ids == 2] = 0
        return samples

    monkeypatch.setattr(rows, "weigh", silent)
    found = asked(folder())
    assert failed(found) == {STOPS}
    assert found[STOPS][1] == "'<|im_end|>' ends answers, and is NOT trained"


def test_control_text_that_becomes_control(folder, monkeypatch):
    monkeypatch.setattr(ControlTokens, "spelled", lambda *args: iter(()))
    found = asked(folder())
    assert failed(found) == {CONTROL, AGREE}  # the second way keeps it apart
    assert found[CONTROL][1] == (
        "no: a user who types '<|end|>', '<|im_start|>' and '<|im_end|>' writes that token"
    )


def test_a_question_without_an_answer_says_so(folder):
    found = asked(folder("{{ raise_exception('closed') }}"))
    assert failed(found) == {REFUSED}
    assert "tools: the chat template refused: closed" in found[REFUSED][1]
    for question in (PROMPT, PREFIX, HEADER, STOPS, HISTORY, CONTROL, AGREE):
        assert found[question][0] == "note"
    found = asked(folder(), supervision_mode="roles", roles=("user",))
    assert found[STOPS] == ("note", "no answer of a probe is trained")
    assert failed(found) == set()
    found = asked(folder(), supervision_mode="roles", roles=("tool",), history="per_assistant")
    assert found[AGREE] == ("note", "nothing to compare: no probe can be placed")
    assert failed(found) == set()
