"""``varlen-sft show`` says what a row trains: on the screen, without colours, and on a page."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.data.test_chat import CHATML, TOKENS, train_tokenizer
from tests.tools.test_report import Page, pixels, tokens
from varlen_sft import cli
from varlen_sft.commands import arguments, data_options
from varlen_sft.data import masks
from varlen_sft.data.batch import collate
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.formats import read_conversations
from varlen_sft.data.packing import plan_packs
from varlen_sft.data.sample import ROLES
from varlen_sft.reference import attention_mask
from varlen_sft.tools.show import ShowOptions, gather
from varlen_sft.tools.show_terminal import MARKS, attention_grid, ruler, screen

HOSTILE = "<script>alert(1)</script>[red]\"'&amp;\t\u202e"
ROWS = [
    ["hello", "it is."],
    ["what is it?", "\n\nhello", "user", "é🤖"],  # the header's newline merges with the answer's
    ["what?", HOSTILE],
    ["a " * 30, "world"],
]


def messages(contents: list[str], system: str | None = None) -> dict:
    said = [] if system is None else [{"role": "system", "content": system}]
    for k, content in enumerate(contents):
        said.append({"role": ("user", "assistant")[k % 2], "content": content})
    return {"messages": said}


def write(path, *rows: dict | str):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny tokenizer and a ChatML template."""
    made = tmp_path_factory.mktemp("a [b] model")
    (made / "tokenizer.json").write_text(train_tokenizer().to_str())
    (made / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, **TOKENS}))
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Rows 1, 2, 3 and 5; the fourth line is blank. Row 3 has a system message."""
    first, second, third, last = ROWS
    rows = [messages(first), messages(second), messages(third, "hello"), "", messages(last)]
    return write(tmp_path_factory.mktemp("data") / "chats [b].jsonl", *rows)


@pytest.fixture
def show(capsys, file, folder):
    """Run the command: (exit code, stdout, stderr)."""

    def run(*words: object, data=file) -> tuple[int, str, str]:
        code = cli.main(["show", str(data), "--model", str(folder), *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def samples(file, folder) -> dict:
    """What the rows are, by another way than through the command."""
    tokenizer = ChatTokenizer.from_folder(folder)
    return {row: tokenizer.encode(talk) for row, talk in read_conversations(file)}


def fact(screen: str, name: str) -> str:
    return re.search(rf"^{name} {{2,}}(.*)$", screen, flags=re.M)[1]


def text_of(screen: str) -> str:
    """What is between the legend and the table."""
    return screen.split("⟦ ⟧ is trained")[1].split("\n", 1)[1].split("\n\nEach row")[0]


# -- the screen


def test_the_screen_of_a_row(show, file, folder):
    code, out, err = show()
    assert (code, err) == (0, "")
    assert (
        out
        == f"""\
file           {file}
row            1
model          {folder}
tokens         17, 5 supervised (29.4%)
roles          none 10, user 2, assistant 5 (5 supervised)
stop token     <|im_end|> ends 1 answer, trained
straddles cut  0

⟦ ⟧ is trained; none, system, user, assistant, tool
<|im_start|>user↵
hello<|im_end|>↵
<|im_start|>assistant↵
⟦it is.<|im_end|>⟧↵

Each row reads `token` and learns the label, the token after it.
sequence  position  token          id  role       weight  label  learns
       1         0  <|im_start|>    1  none            0   -100
       1         1  user          281  none            0   -100
       1         2  ↵             201  none            0   -100
       1         3  hel           273  user            0   -100
       1         4  lo            276  user            0   -100
       1         5  <|im_end|>      2  none            0   -100
       1         6  ↵             201  none            0   -100
       1         7  <|im_start|>    1  none            0   -100
       1         8  as            267  none            0   -100
       1         9  sistant       295  none            0   -100
       1        10  ↵             201  none            1     75  → i
       1        11  i              75  assistant       1     86  → t
       1        12  t              86  assistant       1    264  → ·is
       1        13  ·is           264  assistant       1     16  → .
       1        14  .              16  assistant       1      2  → <|im_end|>
       1        15  <|im_end|>      2  assistant       0   -100
       1            ↵             201  none                      (the end: not read)
"""
    )


def test_a_straddle_is_cut_and_told(show):
    out = show("--row", 2)[1]
    assert fact(out, "straddles cut") == "1"
    assert fact(out, "stop token") == "<|im_end|> ends 2 answers, trained"
    assert text_of(out) == (
        "<|im_start|>user↵\nwhat is it?<|im_end|>↵\n<|im_start|>assistant↵\n"
        "⟦↵\n↵\nhello<|im_end|>⟧↵\n<|im_start|>user↵\nuser<|im_end|>↵\n"
        "<|im_start|>assistant↵\n⟦é🤖<|im_end|>⟧↵"
    )
    assert "\n       1        31  🤖            296  assistant       1      2  → <|im" in out
    learned = re.findall(r"→ (\S+)$", out, flags=re.M)
    assert learned == ["↵", "↵", "hel", "lo", "<|im_end|>", "é", "🤖", "<|im_end|>"]


def test_counts_are_those_of_the_rows_shown(show):
    assert fact(show("--row", 2, "--row", 2)[1], "straddles cut") == "2"
    assert fact(show("--row", 5, "--row", 1)[1], "straddles cut") == "0"


def test_a_long_row_is_shown_whole_and_unbroken(show, tmp_path):
    data = write(tmp_path / "long.jsonl", messages(["b " * 2500, "it is."]))
    code, out, _ = show(data=data)
    assert code == 0 and "\n" + "b " * 2500 + "<|im_end|>↵\n" in out
    assert len(re.findall("  user {12}0 ", out)) == fact_of_role(out, "user") > 2500
    code, _, err = show("--pack", data=data)
    assert code == 2 and "tokens do not fit a pack of 2048" in err


def fact_of_role(screen: str, role: str) -> int:
    return int(re.search(rf"{role} ([\d,]+)", fact(screen, "roles"))[1].replace(",", ""))


def test_only_the_tokens_of_a_role_and_rows_that_learn_one(show):
    out = show("--role", "assistant")[1]
    assert text_of(out) == "…\n⟦it is.<|im_end|>⟧…"
    lines = out.splitlines()
    assert [line.split()[1:3] for line in lines[lines.index(text_of(out)[2:]) + 4 :]] == [
        ["10", "↵"],
        ["11", "i"],
        ["12", "t"],
        ["13", "·is"],
        ["14", "."],
        ["15", "<|im_end|>"],
    ]
    out = show("--role", "user", "--role", "system", "--row", 3)[1]
    assert text_of(out) == "…\nhello…\nwhat?…"
    assert re.findall(r"(\S+) +\d+  (system|user) ", out) == [
        ("hel", "system"), ("lo", "system"), ("w", "user"), ("hat", "user"), ("?", "user"),
    ]  # fmt: skip
    assert "assistant  " not in out.split("Each row")[1]


def test_every_line_says_what_the_batch_holds(show, samples):
    out = show("--row", 5, "--row", 2)[1]
    batch = collate([samples[5], samples[2]])
    sequences = np.repeat([1, 2], batch.cu_seqlens.diff())
    roles = [ROLES[r] for row in (5, 2) for r in samples[row].roles[:-1]]
    lines = [re.split(r" {2,}", line.strip()) for line in out.split("learns\n")[1].splitlines()]
    rows = [line for line in lines if "(the end: not read)" not in line]
    assert [int(line[0]) for line in rows] == sequences.tolist()
    assert [int(line[1]) for line in rows] == batch.position_ids.tolist()
    assert [int(line[3]) for line in rows] == batch.input_ids.tolist()
    assert [line[4] for line in rows] == roles
    assert [float(line[5]) for line in rows] == batch.token_weights.tolist()
    assert [int(line[6]) for line in rows] == batch.labels.tolist()
    assert [len(line) == 8 for line in rows] == (batch.labels >= 0).tolist()
    ends = [line for line in lines if "(the end: not read)" in line]
    assert ends == [[k, "↵", "201", "none", "(the end: not read)"] for k in ("1", "2")]


def test_brackets_carry_weights_that_are_not_1(show):
    out = show("--prompt-weight", 0.25)[1]
    assert fact(out, "masks") == "prompt_weight = 0.25"
    assert text_of(out) == (
        "<|im_start|>⟦0.25: user↵\nhello<|im_end|>↵\n<|im_start|>assistant↵\n"
        "⟧⟦it is.<|im_end|>⟧⟦0.25: ↵\n⟧"
    )
    assert fact(out, "tokens") == "17, 16 supervised (94.1%)"


def test_colours_only_in_a_terminal_and_underlined_there(show, file, folder):
    shown = gather(ShowOptions(file=str(file), model=folder))
    out = io.StringIO()
    screen(Console(file=out, force_terminal=True, color_system="standard", width=110), shown)
    coloured = out.getvalue()
    assert "\x1b[1m⟦\x1b[0m\x1b[1;4;32mit is.<|im_end|>\x1b[0m\x1b[1m⟧\x1b[0m" in coloured
    assert "\x1b[34mhello\x1b[0m" in coloured  # the user's
    plain = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert plain == show()[1] and "\x1b" not in show()[1]


def test_long_tokens_are_clipped_and_parts_of_characters_named(show, tmp_path, folder):
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens(["<" + "x" * 60 + ">"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    long = tokenizer.get_vocab_size() - 1
    data = write(tmp_path / "a.jsonl", {"input_ids": [1, long], "labels": [-100, long]})
    out = show("--model", tmp_path, data=data)[1]
    assert out.count("<" + "x" * 38 + "…") == 2 and "x" * 39 not in out.split("Each row")[1]
    assert "is a part of a character" not in out
    out = show(data=write(tmp_path / "b.jsonl", messages(["hello", "\U0001f999"])))[1]
    assert "⟦\U0001f999<|im_end|>⟧" in out and out.count("→ \ufffd\n") == 3
    assert "the token after it. \ufffd is a part of a character.\n" in out


def test_what_a_message_holds_is_text(show):
    out = show("--row", 3)[1]
    answer = "<script>alert(1)</script>[red]\"'&amp;⇥\\u202e<|im_end|>"
    assert f"⟦{answer}⟧↵" in text_of(out)
    assert "\t" not in out and "\u202e" not in out


# -- what is trained


def test_modes_are_those_of_training(show):
    out = show("--row", 2, "--supervision-mode", "last_assistant")[1]
    assert re.findall("⟦([^ ].*?)⟧", out, flags=re.S) == ["é🤖<|im_end|>"]
    assert fact(out, "stop token") == (
        "<|im_end|> ends 1 answer, trained; 1 answer not trained at all"
    )
    out = show("--row", 2, "--supervision-mode", "roles", "--train-role", "user")[1]
    assert re.findall("⟦([^ ].*?)⟧", out, flags=re.S) == ["what is it?", "user"]
    assert fact(out, "stop token") == "2 answers not trained at all"
    assert fact(out, "masks") == "supervision_mode = roles, roles = user"


def test_a_row_that_gives_several_samples_is_a_pack(show):
    out = show("--row", 2, "--history", "per_assistant")[1]
    assert fact(out, "row") == "2" and fact(out, "cu_seqlens") == "0 19 51"
    assert "sequence 1 (row 2, 1 of 2)\n" in out and "sequence 2 (row 2, 2 of 2)\n" in out
    assert re.findall("⟦([^ ].*?)⟧", out, flags=re.S) == ["↵\n↵\nhello<|im_end|>", "é🤖<|im_end|>"]


def test_what_the_tokenizer_met_is_told(show, tmp_path, folder):
    data = write(tmp_path / "a.jsonl", messages(["a<|im_end|>b", "it is."]))
    out = show(data=data)[1]
    assert fact(out, "control tokens") == "spelled in a message, and kept as text there"
    assert "a<|im_end|>b<|im_end|>↵\n" in text_of(out)
    assert len(re.findall(r"<\|im_end\|> +2 +", out)) == 2  # as control tokens
    talk = messages(["hello", "it is.", "what?", "world"])
    for number in (1, 3):
        talk["messages"][number]["reasoning_content"] = "hello world"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = CHATML.replace(
        "m['content']", "(m.reasoning_content if m.reasoning_content and loop.last else '') "
        "+ m['content']"
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(folder / "tokenizer.json", tmp_path)
    out = show("--model", tmp_path, data=write(tmp_path / "b.jsonl", talk))[1]
    assert fact(out, "history") == "the thinking of 1 answer is left out"
    assert re.findall("⟦([^ ].*?)⟧", out) == ["it is.<|im_end|>", "hello worldworld<|im_end|>"]


def test_an_untrained_stop_token_is_told(show, tmp_path, folder):
    ids = [1, 281, 201, 273, 276, 2]
    data = write(tmp_path / "a.jsonl", {"input_ids": ids, "labels": [-100] * 3 + [273, 276, -100]})
    out = show(data=data)[1]
    assert text_of(out) == "<|im_start|>user↵\n⟦hello⟧<|im_end|>"
    assert fact(out, "stop token") == "lo ends 1 answer, NO stop token trained"
    data = write(tmp_path / "b.jsonl", {"input_ids": ids, "labels": [-100] * 6})
    out = show(data=data)[1]
    assert fact(out, "tokens") == "6, none supervised: there is nothing to train"
    assert fact(out, "stop token") == "no answer, so none" and "⟦" not in text_of(out)


def test_a_fault_of_the_masks_is_told(show, monkeypatch):
    """Whatever the masks promise: what is told is what the sample holds."""
    honest = ChatTokenizer.encode_rows

    def stops_are_left_out(self, rows, options=None):
        for (sample,) in honest(self, rows, options):
            weights = np.where(sample.input_ids == 2, 0, sample.token_weights)
            yield (replace(sample, token_weights=weights.astype(np.float32)),)

    monkeypatch.setattr(ChatTokenizer, "encode_rows", stops_are_left_out)
    out = show("--row", 2)[1]
    assert fact(out, "stop token") == "<|im_end|> ends 2 answers, NO stop token trained"
    assert "⟦é🤖⟧<|im_end|>↵" in text_of(out) and fact(out, "tokens") == "34, 6 supervised (17.6%)"


def test_the_first_token_of_a_document_cannot_be_trained(show, tmp_path):
    out = show(data=write(tmp_path / "a.jsonl", {"text": "hello world"}))[1]
    assert fact(out, "tokens") == "4, 3 supervised (75.0%)"
    assert text_of(out) == "hel⟦lo world<|im_end|>⟧"
    assert fact(out, "stop token") == "<|im_end|> ends 1 answer, trained"


def test_no_space_is_lost_where_decoders_lose_one(show, tmp_path):
    """SentencePiece's way: a space belongs to its word, and decoding drops the very first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(["<s>[INST] hello world [/INST] it is.</s>"] * 50, trainer)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    out = show("--model", tmp_path)[1]
    assert text_of(out) == "<s>[INST] hello [/INST]⟦ it is.</s>⟧"
    words = re.findall(r"^ +1 +\d+  (\S+)", out, flags=re.M)
    assert "".join(words) == "<s>[INST]·hello·[/INST]·it·is."


# -- packs


def test_several_rows_are_a_pack(show, samples):
    out = show("--row", 3, "--row", 1, "--max-tokens", 100)[1]
    third, first = len(samples[3]) - 1, len(samples[1]) - 1
    assert fact(out, "rows") == "3, 1"
    assert fact(out, "cu_seqlens") == f"0 {third} {third + first}"
    full = f"{third + first} input tokens of 100 ({third + first}.0% full)"
    assert fact(out, "pack") == f"2 sequences, {full}"
    pairs = third * (third + 1) // 2 + first * (first + 1) // 2
    assert fact(out, "attention").startswith(f"{pairs:,} of ")
    assert "\nsequence 2 (row 1)\n<|im_start|>user↵\nhello" in out


@pytest.mark.parametrize("first", [1, 2])
def test_pack_is_the_planned_one_of_the_row(show, samples, first):
    rows = [row for row in samples if row >= first]
    packs = plan_packs([len(samples[row]) - 1 for row in rows], 95)
    wanted = next([rows[i] for i in pack] for pack in packs if 0 in pack)
    out = show("--pack", "--row", first, "--max-tokens", 95)[1]
    assert fact(out, "rows?") == ", ".join(map(str, wanted))
    edges = np.cumsum([0, *(len(samples[row]) - 1 for row in wanted)])
    assert fact(out, "cu_seqlens") == " ".join(map(str, edges))
    assert "2 sequences" in fact(out, "pack")


def test_pack_rows_limits_what_is_packed(show):
    out = show("--pack", "--pack-rows", 1)[1]
    assert fact(out, "row") == "1" and fact(out, "pack").startswith("1 sequence, 16 input tokens")


def test_ruler():
    assert ruler([0, 20, 40, 60], 31) == [
        "0         20        40       60",
        "├─────────┼─────────┼─────────┤",
        "     1         2         3",
    ]
    # The edges 1 and 2 are drawn and not written: 0 stands too near; nor are sequences 1 and 2.
    assert ruler([0, 1, 2, 30], 20) == [
        "0                 30",
        "├┼" + "─" * 17 + "┤",
        "          3",
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("cells", [4, 32])
def test_the_picture_is_the_block_causal_mask(seed, cells):
    lengths = np.random.default_rng(seed).integers(1, 15, 4).tolist()
    total = sum(lengths)
    mask = torch.block_diag(*(attention_mask(n, n).double() for n in lengths)).numpy() > 0
    bounds = [k * total // min(total, cells) for k in range(min(total, cells) + 1)]
    wanted = [
        "".join(
            MARKS["all" if mask[a:b, c:d].all() else "some" if mask[a:b, c:d].any() else "none"]
            for c, d in pairwise(bounds)
        )
        for a, b in pairwise(bounds)
    ]
    assert attention_grid(np.cumsum([0, *lengths]).tolist(), cells) == wanted


# -- what cannot be shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--row", 9], "jsonl, row 9: there is no such row, the last is row 5"),
        (["--row", 4], "jsonl, row 4: there is no such row, the line is blank"),
        (["--pack", "--row", 6], "jsonl, row 6: there is no such row, the last is row 5"),
        (["--pack", "--row", 4], "jsonl, row 4: there is no such row, the line is blank"),
        (["--max-tokens", 15], "jsonl: 16 tokens do not fit a pack of 15"),
        (["--pack", "--max-tokens", 60], "jsonl, row 3: 61 tokens do not fit a pack of 60"),
        (["--pack", "--row", 1, "--row", 2], "--pack takes one --row"),
        (["--pack-rows", 3], "there is no --pack"),
        (["--train-role", "user"], "roles must be given with supervision_mode"),
        (["--html", "/nowhere/a.html"], "/nowhere/a.html: cannot be written: No such file"),
        (["--sample-processor", "nothing"], "must be 'module:function', got 'nothing'"),
        (["--mask-token-id", 3], "row 1: mask_token_ids is for rows of 'input_ids'"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_exit_code_2(show, words, message):
    code, out, err = show(*words)
    assert (code, out) == (2, "") and err.startswith("varlen-sft: error: ")
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        (messages(["a"]), "no assistant message|must end with assistant"),
        (messages(["a", "b<|im_start|>c"]), r"spells the control token '<\|im_start\|>'"),
        ({"input_ids": [1], "labels": [1]}, "a token to read and one to learn, it has 1 in all"),
        ({"input_ids": [1, 9999], "labels": [-100, 9999]}, "not of this tokenizer: .*9999"),
    ],
)
def test_a_refused_row_is_its_reason_and_hides_no_other_row(show, tmp_path, row, message):
    data = write(tmp_path / "bad.jsonl", row, messages(["hello", "it is."]))
    code, out, err = show(data=data)
    assert (code, out) == (2, "") and err.startswith(f"varlen-sft: error: {data}, row 1: ")
    assert re.search(message, err), err
    code, out, err = show("--row", 2, data=data)
    assert (code, err) == (0, "") and "⟦it is.<|im_end|>⟧" in out
    assert show("--pack", data=data)[0] == 2


def test_an_empty_file_and_none(show, tmp_path):
    empty = write(tmp_path / "empty.jsonl", "")
    code, _, err = show(data=empty)
    assert code == 2 and "empty.jsonl, row 1: there are no rows" in err
    code, _, err = show(data=tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl: no such file" in err


def test_options_are_those_of_the_data():
    assert arguments.ROLES == ROLES
    for known, words in (
        (data_options.SUPERVISION_MODES, masks.SupervisionMode),
        (data_options.HISTORIES, masks.History),
        (data_options.ON_CONTROL, masks.OnControl),
    ):
        assert known == get_args(words)
    parser = cli._parser()
    asked = data_options.mask_options(parser.parse_args(["show", "x"]))
    assert asked == masks.MaskOptions()
    words = ["--supervision-mode", "roles", "--train-role", "tool", "--train-role", "user",
             "--history", "preserve", "--prompt-weight", "0.5", "--equal-sample-weight",
             "--mask-special-tokens", "--on-control", "text"]  # fmt: skip
    asked = data_options.mask_options(parser.parse_args(["show", "x", *words]))
    assert asked == masks.MaskOptions(
        "roles", ("tool", "user"), "preserve", 0.5, True, True, "text"
    )


def test_help_teaches_and_imports_nothing():
    code = """
import sys
from varlen_sft.cli import main
try:
    main(["show", "--help"])
finally:
    heavy = {"torch", "numpy", "transformers", "rich", "tokenizers", "jinja2"} & sys.modules.keys()
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout and "(default: error)" in done.stdout


# -- the page


@pytest.fixture(scope="module")
def page_path(file, folder, tmp_path_factory):
    """Rows 3 and 2 as a pack."""
    path = tmp_path_factory.mktemp("a page") / "show.html"
    words = ["--row", "3", "--row", "2", "--role", "user", "--role", "assistant"]
    code = cli.main(["show", str(file), "--model", str(folder), *words, "--html", str(path)])
    assert code == 0
    return path


@pytest.fixture(scope="module")
def page(page_path) -> Page:
    return Page(page_path.read_text(encoding="utf-8"))


def test_the_page_says_what_the_screen_says(page, show):
    out = show("--row", 3, "--row", 2)[1]
    told = {a["data-field"]: text for a, text in page.where("dd") if "data-field" in a}
    names = ("rows", "tokens", "roles", "stop token", "straddles cut", "pack", "cu_seqlens")
    assert {name: told[name] for name in names} == {name: fact(out, name) for name in names}
    assert told["file"] == "chats [b].jsonl" and "/" not in told["model"]
    assert [text for _, text in page.where("h1")] == ["chats [b].jsonl, rows 3, 2"]


def test_the_page_marks_what_is_trained(page, samples, folder):
    tokenizer = ChatTokenizer.from_folder(folder)
    runs = [a for a, _ in page.where("span") if "data-text" in a]
    trained = [a for a in runs if "s" in a["class"].split()]
    assert [a["data-text"] for a in trained] == [
        f"{HOSTILE}<|im_end|>", "\n\nhello<|im_end|>", "é🤖<|im_end|>",
    ]  # fmt: skip
    assert {float(a["data-weight"]) for a in trained} == {1.0}
    assert {float(a["data-weight"]) for a in runs if a not in trained} == {0.0}
    whole = "".join(a["data-text"] for a in runs)
    assert whole == "".join(tokenizer.decode(samples[row].input_ids) for row in (3, 2))


def test_the_page_draws_the_batch(page, samples):
    batch = collate([samples[3], samples[2]])
    drawn = tokens(page)
    assert [int(a["data-id"]) for a, _ in drawn] == batch.input_ids.tolist()
    assert [int(a["data-pos"]) for a, _ in drawn] == batch.position_ids.tolist()
    assert [int(a["data-label"]) for a, _ in drawn] == batch.labels.tolist()
    edges = batch.cu_seqlens.tolist()
    assert [int(a["data-start"]) for a, _ in page.where("span") if "data-start" in a] == edges[:-1]
    assert [a["points"] for a, _ in page.where("polygon")] == [
        f"{a},{a} {a},{b} {b},{b}" for a, b in pairwise(edges)
    ]
    heads = [text for a, text in page.where("h3") if "targets" in text]
    assert (
        heads[0]
        == f"sequence 1 (row 3), {edges[1]} tokens, {(batch.labels[: edges[1]] >= 0).sum()} targets"
    )  # noqa: E501


def test_the_page_shows_the_roles_that_were_asked_for(page, page_path, file, folder, tmp_path):
    def pressed(page: Page) -> str:
        [name] = [a["id"] for a, _ in page.where("input") if "checked" in a]
        return next(text for a, text in page.where("label") if a["for"] == name)

    assert pressed(page) == "user, assistant"
    left_out = {a["data-role"] for a, _ in tokens(page) if "x" in a["class"].split()}
    assert left_out == {"none", "system"}
    for words, name in (([], "everything"), (["--role", "tool"], "tool")):
        path = tmp_path / "a.html"
        cli.main(["show", str(file), "--model", str(folder), "--html", str(path), *words])
        other = Page(path.read_text(encoding="utf-8"))
        assert pressed(other) == name
        buttons = ["everything", "targets", *ROLES]
        assert [text for _, text in other.where("label")] == buttons
        assert not other.where("polygon") and not other.where("h2", field="pack")


def test_the_page_is_alone_and_text_is_text(page, page_path, file, folder):
    text = page_path.read_text(encoding="utf-8")
    assert not {name for name, _, _ in page.elements} & {"script", "link", "img", "iframe"}
    assert not any({"src", "href"} & set(a) for _, a, _ in page.elements)
    assert "https://" not in text and "url(" not in text and "@import" not in text
    [policy] = [a["content"] for a, _ in page.where("meta") if "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert str(file.parent) not in text and str(folder.parent) not in text


@pytest.mark.parametrize(("width", "height"), [(900, 900), (390, 1100)])
def test_the_page_is_drawn(page_path, width, height, browser, tmp_path):
    image = tmp_path / "page.png"
    browser(page_path.as_uri(), f"--window-size={width},{height}", f"--screenshot={image}")
    found_width, found_height, lines = pixels(image)
    assert (found_width, found_height) == (width, height)
    step = len(lines[0]) // width
    colours = {line[k : k + step] for line in lines for k in range(0, len(line), step)}
    assert bytes([0x0B, 0x62, 0xC4]) in {c[:3] for c in colours}  # the first triangle
    assert bytes([0xB0, 0x48, 0x0A]) in {c[:3] for c in colours}  # the second


def test_the_browser_dims_and_underlines_and_scrolls_no_page(page_path, browser, tmp_path):
    """A frame of a phone's width holds the page; the page around it reads what it became."""
    shutil.copy(page_path, tmp_path / "page.html")
    (tmp_path / "frame.html").write_text(
        "<iframe src='page.html' width='390' height='800' style='border:0'></iframe><p></p>"
        "<script>onload = () => { const d = document.querySelector('iframe').contentDocument;"
        "const style = (e) => d.defaultView.getComputedStyle(e);"
        "const seen = [...d.querySelectorAll('[data-id]')].map(e => [e.dataset.role,"
        " style(e).opacity]);"
        "const runs = [...d.querySelectorAll('[data-text]')].map(e =>"
        " style(e).borderBottomWidth);"
        "d.querySelector('#f1').checked = true;"
        "const targets = [...d.querySelectorAll('[data-id]')].map(e => [e.dataset.label > -1,"
        " style(e).opacity]);"
        "const e = d.documentElement;"
        "document.querySelector('p').textContent = JSON.stringify([seen, runs, targets,"
        " e.clientWidth, e.scrollWidth]); }</script>"
    )
    dom = browser(
        (tmp_path / "frame.html").as_uri(), "--allow-file-access-from-files", "--dump-dom"
    )
    found = json.loads(re.search(r"<p>(\[.*?)</p>", dom)[1])
    seen, runs, targets, inner, scroll = found
    assert {tuple(one) for one in seen} == {
        ("none", "0.15"), ("system", "0.15"), ("user", "1"), ("assistant", "1"),
    }  # fmt: skip
    assert runs.count("3px") == 3 and set(runs) == {"0px", "3px"}
    assert {tuple(one) for one in targets} == {(True, "1"), (False, "0.15")}
    assert inner > 370 and scroll == inner
