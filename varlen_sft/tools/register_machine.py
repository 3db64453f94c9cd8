"""Seeded dialogues with a register machine: multi-turn data whose every answer can be checked.

The machine has the registers A to D with values 0 to 9 and a LIST of at most four values. The user
gives one instruction a turn, the assistant answers with the whole state, so that each turn is one
update of the state in the turn before. ``answer`` computes the right answer from the words alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from varlen_sft.data.formats import Conversation, Message

REGISTERS = "ABCD"
LIST_LIMIT = 4
SYSTEM_PROMPT = (
    "You are a register machine. The registers A, B, C and D hold values from 0 to 9, the LIST "
    "holds at most four values. Incrementing 9 gives 0. Pushing adds a value at the end of the "
    "LIST, popping takes the last one off it. Answer every instruction with the whole state."
)
_ZERO = "Start with all registers at 0 and an empty list."
_STARTS = ("Start with {state}.", "The machine begins at {state}. What is the state?")
_PHRASES = {
    "set": ("Set {x} to {n}.", "Put the value {n} into {x}.", "Let {x} be {n}."),
    "copy": ("Copy {x} to {y}.", "Make {y} the same as {x}."),
    "swap": ("Swap {x} and {y}.", "Exchange the values of {x} and {y}."),
    "increment": ("Increment {x}.", "Add one to {x}.", "Count {x} up by one."),
    "push": ("Push {x}.", "Append {x} to the list."),
    "pop": ("Pop into {x}.", "Take the last value off the list and store it in {x}."),
}
_STATE = re.compile(r"A=(\d) B=(\d) C=(\d) D=(\d) LIST=\[((?:\d(?:,\d)*)?)\]")


class _State:
    def __init__(self, registers: Sequence[int], stack: Sequence[int]) -> None:
        self.registers = dict(zip(REGISTERS, registers, strict=True))
        self.stack = list(stack)

    def __str__(self) -> str:
        registers = " ".join(f"{name}={value}" for name, value in self.registers.items())
        return f"{registers} LIST=[{','.join(map(str, self.stack))}]"

    def allows(self, operation: str) -> bool:
        if operation == "push":
            return len(self.stack) < LIST_LIMIT
        return operation != "pop" or bool(self.stack)

    def apply(self, operation: str, x: str, y: str, n: int) -> None:
        """One instruction; ValueError for a push on a full list or a pop from an empty one."""
        if not self.allows(operation):
            raise ValueError(f"{operation} is illegal on LIST={self.stack}")
        registers = self.registers
        if operation == "set":
            registers[x] = n
        elif operation == "copy":
            registers[y] = registers[x]
        elif operation == "swap":
            registers[x], registers[y] = registers[y], registers[x]
        elif operation == "increment":
            registers[x] = (registers[x] + 1) % 10
        elif operation == "push":
            self.stack.append(registers[x])
        else:
            registers[x] = self.stack.pop()


def register_machine_conversations(
    n: int, seed: int, min_turns: int, max_turns: int
) -> list[Conversation]:
    """``n`` dialogues of min_turns to max_turns user turns; the first turn sets the state.

    Every second one begins with SYSTEM_PROMPT. Equal arguments give equal dialogues.

    Raises:
        ValueError: not 1 <= min_turns <= max_turns, or n is negative.
    """
    if n < 0 or not 1 <= min_turns <= max_turns:
        raise ValueError(
            "expected n >= 0 and 1 <= min_turns <= max_turns, got "
            f"n={n}, min_turns={min_turns}, max_turns={max_turns}"
        )
    random = Random(seed)
    return [
        _dialogue(random, random.randint(min_turns, max_turns), with_system=number % 2 == 0)
        for number in range(n)
    ]


def answer(messages: Sequence[Message]) -> str:
    """The right answer to the last user message, from the user's words only.

    Raises:
        ValueError: there is no user message, or one is not understood or illegal.
    """
    said = [message.content for message in messages if message.role == "user"]
    if not said:
        raise ValueError("no user message")
    state = _parse_start(said[0])
    for words in said[1:]:
        state.apply(*_parse_instruction(words))
    return str(state)


def _dialogue(random: Random, turns: int, *, with_system: bool) -> Conversation:
    messages = [Message("system", SYSTEM_PROMPT)] if with_system else []
    state, words = _start(random)
    messages += [Message("user", words), Message("assistant", str(state))]
    for _ in range(turns - 1):
        words = _instruct(random, state)
        messages += [Message("user", words), Message("assistant", str(state))]
    return Conversation(tuple(messages))


def _start(random: Random) -> tuple[_State, str]:
    if random.random() < 0.1:
        return _State([0] * len(REGISTERS), []), _ZERO
    registers = [random.randrange(10) for _ in REGISTERS]
    stack = [random.randrange(10) for _ in range(random.randint(0, LIST_LIMIT))]
    state = _State(registers, stack)
    return state, random.choice(_STARTS).format(state=state)


def _instruct(random: Random, state: _State) -> str:
    """Draw a legal instruction, apply it to the state, and say it."""
    operation = random.choice([name for name in _PHRASES if state.allows(name)])
    x, y = random.sample(REGISTERS, 2)
    n = random.randrange(10)
    state.apply(operation, x, y, n)
    return random.choice(_PHRASES[operation]).format(x=x, y=y, n=n)


def _pattern(phrase: str) -> re.Pattern:
    pattern = re.escape(phrase)
    for name, values in (("x", "[A-D]"), ("y", "[A-D]"), ("n", "[0-9]")):
        pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{values})")
    return re.compile(pattern)


_PATTERNS = [(name, _pattern(words)) for name, all_ in _PHRASES.items() for words in all_]


def _parse_start(words: str) -> _State:
    if words == _ZERO:
        return _State([0] * len(REGISTERS), [])
    found = _STATE.search(words)
    if not found:
        raise ValueError(f"no initial state in {words!r}")
    *registers, stack = found.groups()
    return _State([int(value) for value in registers], [int(v) for v in stack.split(",") if v])


def _parse_instruction(words: str) -> tuple[str, str, str, int]:
    """(operation, x, y, n); y and n are empty and 0 where the operation has none."""
    for operation, pattern in _PATTERNS:
        if found := pattern.fullmatch(words):
            groups = found.groupdict()
            return operation, groups["x"], groups.get("y", ""), int(groups.get("n", 0))
    raise ValueError(f"not an instruction: {words!r}")
