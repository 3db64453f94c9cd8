from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from varlen_sft.data.formats import Conversation, Message, read_conversations
from varlen_sft.tools import register_machine
from varlen_sft.tools.demo_data import (
    answer,
    chatterbot_conversations,
    register_machine_conversations,
    write_demo_data,
)


def user(*said: str) -> list[Message]:
    return [Message("user", words) for words in said]


# -- the register machine

START = "Start with A=3 B=0 C=9 D=1 LIST=[4,2]."


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("Set B to 7.", "A=3 B=7 C=9 D=1 LIST=[4,2]"),
        ("Put the value 0 into A.", "A=0 B=0 C=9 D=1 LIST=[4,2]"),
        ("Let D be 5.", "A=3 B=0 C=9 D=5 LIST=[4,2]"),
        ("Copy A to B.", "A=3 B=3 C=9 D=1 LIST=[4,2]"),
        ("Make A the same as B.", "A=0 B=0 C=9 D=1 LIST=[4,2]"),
        ("Swap A and C.", "A=9 B=0 C=3 D=1 LIST=[4,2]"),
        ("Exchange the values of D and B.", "A=3 B=1 C=9 D=0 LIST=[4,2]"),
        ("Increment A.", "A=4 B=0 C=9 D=1 LIST=[4,2]"),
        ("Add one to C.", "A=3 B=0 C=0 D=1 LIST=[4,2]"),
        ("Count B up by one.", "A=3 B=1 C=9 D=1 LIST=[4,2]"),
        ("Push C.", "A=3 B=0 C=9 D=1 LIST=[4,2,9]"),
        ("Append A to the list.", "A=3 B=0 C=9 D=1 LIST=[4,2,3]"),
        ("Pop into A.", "A=2 B=0 C=9 D=1 LIST=[4]"),
        (
            "Take the last value off the list and store it in D.",
            "A=3 B=0 C=9 D=2 LIST=[4]",
        ),
    ],
)
def test_every_phrase_means_what_it_says(said, state):
    assert answer(user(START, said)) == state


def test_every_phrase_is_tested_above():
    (mark,) = test_every_phrase_means_what_it_says.pytestmark
    patterns = {pattern for _, pattern in register_machine._PATTERNS}
    assert len(mark.args[1]) == len(patterns) == 14
    assert all(sum(bool(p.fullmatch(said)) for p in patterns) == 1 for said, _ in mark.args[1])


def test_an_answer_follows_from_all_that_was_said():
    said = user("Start with all registers at 0 and an empty list.", "Add one to A.", "Push A.")
    assert answer(said[:1]) == "A=0 B=0 C=0 D=0 LIST=[]"
    assert answer(said) == "A=1 B=0 C=0 D=0 LIST=[1]"
    wrong = [said[0], Message("assistant", "A=9 B=9 C=9 D=9 LIST=[9]"), *said[1:]]
    assert answer(wrong) == "A=1 B=0 C=0 D=0 LIST=[1]"  # what the model said decides nothing
    assert answer(user("The machine begins at A=1 B=2 C=3 D=4 LIST=[]. What is the state?")) == (
        "A=1 B=2 C=3 D=4 LIST=[]"
    )


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([], "no user message"),
        (["hello"], "no initial state in 'hello'"),
        ([START, "Jump."], "not an instruction: 'Jump.'"),
        ([START, "Push A.", "Push A.", "Push A."], r"push is illegal on LIST=\[4, 2, 3, 3\]"),
        ([START, "Pop into A."] + ["Pop into B."] * 2, r"pop is illegal on LIST=\[\]"),
    ],
)
def test_what_has_no_answer_is_refused(said, reason):
    with pytest.raises(ValueError, match=reason):
        answer(user(*said))


def test_every_drawn_answer_is_the_computed_one():
    drawn = register_machine_conversations(300, seed=5, min_turns=1, max_turns=20)
    turns = set()
    for conversation in drawn:
        messages = conversation.messages
        turns.add(sum(m.role == "user" for m in messages))
        for k, message in enumerate(messages):
            if message.role == "assistant":
                assert message.content == answer(messages[:k])
    assert turns == set(range(1, 21))
    systems = [c.messages[0] for c in drawn if c.messages[0].role == "system"]
    assert systems == [Message("system", register_machine.SYSTEM_PROMPT)] * 150


def test_every_operation_and_every_edge_is_drawn():
    drawn = register_machine_conversations(300, seed=0, min_turns=10, max_turns=10)
    said = [m.content for c in drawn for m in c.messages if m.role == "user"]
    for _, pattern in register_machine._PATTERNS:
        assert any(pattern.fullmatch(words) for words in said)
    states = {
        m.content.split("LIST=")[1]
        for c in drawn
        for m in c.messages
        if m.role != "user" and "LIST=" in m.content
    }
    assert "[]" in states and any(state.count(",") == 3 for state in states)
    assert not any(state.count(",") > 3 for state in states)


def test_the_seed_decides():
    def of(seed: int) -> list[Conversation]:
        return register_machine_conversations(20, seed, 2, 5)

    assert of(1) == of(1)
    assert of(1) != of(2)


@pytest.mark.parametrize("arguments", [(-1, 0, 1, 2), (1, 0, 0, 2), (1, 0, 3, 2)])
def test_bad_counts_are_refused(arguments):
    with pytest.raises(ValueError, match="expected n >= 0 and 1 <= min_turns <= max_turns, got n="):
        register_machine_conversations(*arguments)


# -- the chatterbot corpus


def test_the_corpus():
    pytest.importorskip("chatterbot_corpus")
    conversations, counts = chatterbot_conversations()
    assert counts["read"] == sum(
        counts[name] for name in ("kept", "malformed", "blank", "unanswered", "duplicates")
    )
    assert counts["kept"] == len(conversations) == len(set(conversations)) > 500
    assert conversations[0].messages == (
        Message("user", "What is AI?"),
        Message(
            "assistant",
            "Artificial Intelligence is the branch of engineering and science devoted to "
            "constructing machines that think.",
        ),
    )


@pytest.fixture
def corpus_folder(tmp_path, monkeypatch) -> Path:
    corpus = ModuleType("chatterbot_corpus")
    corpus.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, "chatterbot_corpus", corpus)
    folder = tmp_path / "data" / "english"
    folder.mkdir(parents=True)
    return folder


def test_what_the_corpus_holds_is_kept_or_counted(corpus_folder):
    folder = corpus_folder
    (folder / "b.yml").write_text("conversations:\n- - hi\n  - hello\n- - hi\n  - hello\n  - bye\n")
    (folder / "a.yml").write_text(
        "conversations:\n- - ' one '\n  - |\n    two\n    lines\n  - three\n  - four\n  - five\n"
        "- just text\n- - 1\n  - one\n- - a\n  - ' '\n- - alone\n"
    )
    conversations, counts = chatterbot_conversations()
    assert [[(m.role, m.content) for m in c.messages] for c in conversations] == [
        [("user", "one"), ("assistant", "two\nlines"), ("user", "three"), ("assistant", "four")],
        [("user", "hi"), ("assistant", "hello")],
    ]
    assert counts == {
        "read": 7,
        "kept": 2,
        "malformed": 2,
        "blank": 1,
        "unanswered": 1,
        "duplicates": 1,
        "trailing_dropped": 1,
    }


# -- the files


def said(conversation: Conversation) -> str:
    words = [m.content for m in conversation.messages if m.role == "user"]
    return " ".join("\n".join(words).lower().split())


def read(path: Path) -> list[Conversation]:
    return [conversation for _, conversation in read_conversations(path)]


def test_the_files_share_no_question(tmp_path):
    pytest.importorskip("chatterbot_corpus")
    data = write_demo_data(tmp_path / "new", seed=3, n_dialogues=200, validation_share=0.1)
    train, validation = read(data.train), read(data.validation)
    assert (data.train.name, data.validation.name) == ("train.jsonl", "validation.jsonl")
    assert not {said(c) for c in train} & {said(c) for c in validation}
    counts = data.counts
    for kind in ("chatterbot", "register_machine"):
        kept, held_out = counts[f"{kind}_train"], counts[f"{kind}_validation"]
        assert kept + held_out == counts[f"{kind}_kept"]
        assert 0.08 < held_out / counts[f"{kind}_kept"] < 0.13
    assert len(train) == counts["chatterbot_train"] + counts["register_machine_train"]
    held_out = counts["chatterbot_validation"] + counts["register_machine_validation"]
    assert len(validation) == held_out
    everything = chatterbot_conversations()[0] + register_machine_conversations(200, 3, 2, 12)
    assert set(train) | set(validation) == set(everything)
    is_machine = [c.messages[-1].content.startswith("A=") for c in validation]
    assert sum(is_machine) == counts["register_machine_validation"]


def test_a_question_in_other_letters_is_the_same_question(corpus_folder, tmp_path):
    questions = "".join(f"- - what is {k}\n  - a\n- - What  is {k}\n  - b\n" for k in range(30))
    (corpus_folder / "a.yml").write_text("conversations:\n" + questions)
    data = write_demo_data(tmp_path, n_dialogues=10, validation_share=0.3)
    assert data.counts["chatterbot_validation"] == 18
    held_out = {said(c) for c in read(data.validation) if len(said(c)) < 12}
    assert len(held_out) == 9
    assert not held_out & {said(c) for c in read(data.train)}


def test_the_files_are_the_same_bytes_every_time(tmp_path):
    pytest.importorskip("chatterbot_corpus")
    first, second = (write_demo_data(tmp_path / name, seed=3, n_dialogues=20) for name in "ab")
    assert first.train.read_bytes() == second.train.read_bytes()
    assert first.validation.read_bytes() == second.validation.read_bytes()
    other = write_demo_data(tmp_path / "c", seed=4, n_dialogues=20)
    assert other.train.read_bytes() != first.train.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"validation_share": 0.0}, r"validation_share must be in \(0, 1\), got 0.0"),
        ({"n_dialogues": 1}, "1 dialogues cannot be split"),
        ({"n_dialogues": 0}, "0 dialogues cannot be split"),
    ],
)
def test_a_split_with_an_empty_side_is_refused(tmp_path, arguments, reason):
    pytest.importorskip("chatterbot_corpus")
    with pytest.raises(ValueError, match=reason):
        write_demo_data(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []
