"""Machine code as nvdisasm prints it, beside the Triton IR that it was made of: counts of both."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Code", "disassembly"]

BULK = 0.9
"""Share of a kernel's bytes that decides how wide its accesses are: ids and labels do not."""

LOADS, STORES = ("LDG", "LDGSTS", "LD"), ("STG", "ST")
FUSED = ("FFMA", "FFMA2", "HFMA2", "DFMA")
Line = tuple[str, int]
"""File and line of the source."""


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: tuple[str, ...]
    """("LDG", "E", "128")"""
    operands: str
    line: Line

    @property
    def width(self) -> int:
        """Bits that one thread moves: 32 unless the opcode says otherwise."""
        named = (re.fullmatch(r"[US]?(8|16|64|128|256)", word) for word in self.opcode[1:])
        return next((int(word[1]) for word in named if word), 32)

    @property
    def is_fused(self) -> bool:
        """A product and a sum with one rounding; not a product, sum or move written as one."""
        words = [word.strip().lstrip("-").split(".")[0] for word in self.operands.split(",")]
        return self.opcode[0] in FUSED and "RZ" not in words[1:] and "1" not in words[1:3]


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, without what ptxas puts behind the last that can be reached."""

    instructions: list[Instruction]
    loops: list[range]
    """Addresses from the target of each backward jump to the jump."""

    def count(self, *opcodes: str) -> int:
        return sum(i.opcode[0] in opcodes for i in self.instructions)

    def widths(self, *opcodes: str) -> dict[int, int]:
        """Number of such instructions by the bits that each moves."""
        found = Counter(i.width for i in self.instructions if i.opcode[0] in opcodes)
        return dict(sorted(found.items()))

    def hot_width(self, ttir: str) -> int:
        """Bits of access such that nine tenths of the hot path's bytes move in it or in wider ones.

        The hot path is the loop over the row where there is one, else the whole kernel. A source
        line moves as many bytes as the tensors that it loads and stores; where it became accesses
        of several widths, they share them by their widths. So a load of one id, label or weight
        weighs next to nothing. 0 when nothing is moved.

        Args:
            ttir: the kernel in Triton's IR, with locations.

        Raises:
            ValueError: an access at a line that loads and stores nothing in the IR.
        """
        line_bytes = bytes_of_lines(ttir)
        accesses = [i for i in self.instructions if i.opcode[0] in (*LOADS, *STORES)]
        for access in accesses:
            if access.line not in line_bytes:
                raise ValueError(f"{'.'.join(access.opcode)} at {access.line}, which moves nothing")
        hot = [i for i in accesses if any(i.address in loop for loop in self.loops)] or accesses
        line_width: Counter[Line] = Counter()
        for access in hot:
            line_width[access.line] += access.width
        moved: dict[int, float] = {}
        for access in hot:
            share = line_bytes[access.line] * access.width / line_width[access.line]
            moved[access.width] = moved.get(access.width, 0.0) + share
        return _carries_the_bulk(moved)


def _carries_the_bulk(moved: Mapping[int, float]) -> int:
    carried, total = 0.0, sum(moved.values())
    for width in sorted(moved, reverse=True):
        carried += moved[width]
        if carried >= BULK * total:
            return width
    return 0


def disassembly(text: str) -> Code:
    """Read what ``nvdisasm --print-code --print-line-info`` printed of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line: Line = ("", 0)
    waiting: list[str] = []
    for row in text.splitlines():
        if found := re.match(r'\s*//## File "(.*?)", line (\d+)', row):
            line = (found[1], int(found[2]))
        elif found := re.match(r"(\.L\w+):", row):
            waiting.append(found[1])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?\s*([\w.]+)(.*?);", row):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            instructions.append(Instruction(address, tuple(found[2].split(".")), found[3], line))
    jumps = [
        (i.address, labels.get(target[1], i.address))
        for i in instructions
        if i.opcode[0] == "BRA" and (target := re.search(r"\((\.L\w+)\)", i.operands))
    ]
    # Every kernel ends with a jump to itself and NOPs, behind its last EXIT.
    end = min((at for at, to in jumps if at == to), default=math.inf)
    loops = [range(to, at) for at, to in jumps if to < at]
    return Code([i for i in instructions if i.address < end], loops)


# ------------------------------------------------------------------- Triton IR


def bytes_of_lines(ttir: str) -> dict[Line, int]:
    """Bytes of the tensors that each source line loads and stores, each once."""
    named = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))
    moved: Counter[Line] = Counter()
    for row in ttir.splitlines():
        if not re.search(r"\btt\.(load|store)\b", row):
            continue
        pointer = re.search(r" : (?:tensor<([\dx]+)x)?!tt\.ptr<[a-z]+(\d+)", row)
        where = re.search(r" loc\((.*)\)$", row)
        if pointer is None or where is None:
            raise ValueError(f"a load or store of an unknown form in Triton's IR: {row.strip()}")
        elements = math.prod(int(extent) for extent in (pointer[1] or "1").split("x"))
        moved[_source_line(where[1], named)] += elements * max(8, int(pointer[2])) // 8
    return dict(moved)


def _source_line(where: str, named: Mapping[str, str]) -> Line:
    """Follow a location to the file and line of the text, which may be an inlined function's."""
    while not (found := re.match(r'"(.*)":(\d+):\d+', where)):
        inner = re.search(r"#loc\d*", where)
        if inner is None:
            return ("", 0)
        where = named[inner[0]]
    return found[1], int(found[2])
