"""Templates for ``varlen-sft doctor``, good ones and such with one fault."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tests.data.test_chat import CHATML, TOKENS, train_tokenizer
from varlen_sft.data.masks import MaskOptions
from varlen_sft.tools.doctor import DoctorOptions, examine
from varlen_sft.tools.doctor_data import DataOptions

PROMPT = "is there a generation prompt?"
PREFIX = "are prompts prefixes of what is trained?"
HEADER = "is a header in the loss?"
STOPS = "which stop tokens, are they trained?"
TAGS = "do generation tags agree?"
HISTORY = "is history written as it was said?"
STRADDLES = "do tokens straddle the start of an answer?"
CONTROL = "does control text in a message stay text?"
BOS = "is BOS written twice?"
PAD = "is the pad token a stop token?"
AGREE = "do two ways to find answers agree?"
REFUSED = "which conversations are refused?"

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
THOUGHT = "{{ '<t>' + m['reasoning_content'] + '</t>\n' }}{% endif %}"
REST = (
    "{{ m['content'] }}{% for call in m['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WHOLE = HEAD + "{% if m['reasoning_content'] %}" + THOUGHT + REST  # writes all that a row can hold
LAST_THOUGHT = HEAD + "{% if m['reasoning_content'] and (loop.last or keep_past_thinking) %}"
LAST_THOUGHT += THOUGHT + REST
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


MISSED = TAGGED.replace(" + '<|im_end|>' }}{% endg", " }}{% endg").replace(
    "%}{{ '\n' }}{% else", "%}{{ '<|im_end|>\n' }}{% else"
)
FAULTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "no generation prompt": (
        CHATML.split("{% if add")[0],
        PROMPT,
        (r"changes nothing, but '<|im_start|>assistant\n' stands before an answer",),
    ),
    "no generation prompt, and a header of letters alone": (
        CHATML.split("{% if add")[0].replace("<|im_start|>", ""),
        PROMPT,
        (r"changes nothing, but 'assistant\n' stands before an answer",),
    ),
    "half a header in the prompt": (
        CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>'"),
        HEADER,
        (r"'assistant\n' stands between the generation prompt and the answer",),
    ),
    "a prompt that is gone later": (
        CHATML.replace("{% if add_generation_prompt %}", "{% if add_generation_prompt %}Now: "),
        PREFIX,
        ("no in plain, multi-turn, whitespace, ", r"in '...", r"Now: <|im_start|>assistant\n'"),
    ),
    "no stop token": (
        CHATML.replace("'<|im_end|>' + ", ""),
        STOPS,
        (r"none: after an answer the template writes '\n'",),
    ),
    "tags that miss the stop token": (
        MISSED,
        TAGS,
        (
            "in plain: the template's generation tags enclose 'It is 42.' for message 2, a model "
            "samples 'It is 42.<|im_end|>'",
        ),
    ),
    "thinking that is left out later": (
        LAST_THOUGHT.replace(" or keep_past_thinking", ""),
        HISTORY,
        ("2 of 8 earlier answers change: 2 lose their thinking; use history=per_assistant, or",),
    ),
    "BOS twice": (
        "{{ bos_token + bos_token }}" + CHATML,
        BOS,
        ("the template itself begins with '<|end|>' 2 times",),
    ),
    "a message written twice": (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}" + CHATML,
        REFUSED,
        ("plain, multi-turn, ", "the template writes the content of message 1 more than once"),
    ),
}


@cache
def tiny_json() -> str:
    """A small tokenizer.json."""
    return train_tokenizer().to_str()


def write_folder(folder: Path, template: str = CHATML, tokenizer: str = "", **tokens: str) -> Path:
    """A model folder with a template, and special tokens besides those of ChatML."""
    config = {"chat_template": template, **TOKENS, **tokens}
    (folder / "tokenizer.json").write_text(tokenizer or tiny_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def asked(folder: Path, **masks) -> dict[str, tuple[str, str]]:
    """(verdict, evidence) by question."""
    report = examine(DoctorOptions(model=folder, masks=MaskOptions(**masks)))
    found = {f["question"]: (f["verdict"], f["evidence"]) for f in report["findings"]}
    assert len(found) == len(report["findings"]) == 12
    assert report["passed"] == (not failed(found))
    return found


def failed(found: dict[str, tuple[str, str]]) -> set[str]:
    return {question for question, (verdict, _) in found.items() if verdict == "fail"}


# -- data


def talk(question: str, answer: str, **more) -> dict:
    user, said = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"messages": [user, said | more]}


IDS = [5, 6, 7, 8]
PLANTED = {
    3: {"messages": []},
    5: talk("hello", "it is. <|im_end|>"),
    6: talk("world", "<|im_start|>"),
    7: talk("what?", "\n\nhello"),
    9: talk("hello <|im_end|>", "it is."),
    11: talk("it is", "hello", train=False),
    13: talk("hello " * 100, "it is."),
    15: talk("hello 2", "it is. 2"),  # as row 2
    17: talk("hello", ""),
    19: talk("hello", "it \ufffd\u200b\x07 is."),
    21: {"input_ids": IDS, "labels": [-100, *IDS[1:]]},
    22: {"input_ids": [5, 9999], "labels": [-100, 9999]},
}
ROWS = [PLANTED.get(n, talk(f"hello {n}", f"it is. {n}")) for n in range(1, 41)]


def findings(report: dict) -> dict[str, tuple[str, str]]:
    return {f["question"]: (f["verdict"], f["evidence"]) for f in report["findings"]}


def examined(folder, file, masks: MaskOptions | None = None, **options) -> dict:
    data = DataOptions(source=str(file), **options)
    return examine(DoctorOptions(model=folder, data=data, masks=masks or MaskOptions()))
