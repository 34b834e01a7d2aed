"""NVIDIA machine code as ``cuobjdump --dump-sass`` prints it: instructions, the loops around matrix products, and what
is issued while an asynchronous product (wgmma) is in flight."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable

# Tensor cores: of Hopper (a warpgroup's, asynchronous), of every one since Volta, of Blackwell.
PRODUCTS = frozenset({"HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA", "DMMA", "UTCHMMA", "UTCQMMA"})
SPILLS = frozenset({"LDL", "STL"})

_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;(?:\s*/\* 0x([0-9a-f]{16}) \*/)?"
)
_SECOND_WORD = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
_STALL_BIT = 41  # of an instruction's second word: how long the scheduler waits before the next one, four bits


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One of them.

    Attributes:
        address: in bytes from the function's start.
        opcode: with its modifiers, ``HGMMA.64x128x16.F32.BF16``.
        operands: as printed.
        predicate: ``@P0``, ``@!UP1``, or empty.
        stall: cycles before its warp may issue the next one.
    """

    address: int
    opcode: str
    operands: str = ""
    predicate: str = ""
    stall: int = 1

    @functools.cached_property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def commits(self) -> bool:
        """Does it end a group of asynchronous products, for which one may wait?"""
        return self.name in PRODUCTS and "gsb0" in self.operands

    @property
    def groups_left(self) -> int | None:
        """How many groups of asynchronous products are in flight at most after it; None: it waits for none."""
        if self.name != "WARPGROUP" or "DEPBAR" not in self.opcode:
            return None
        match = re.search(r"gsb0, 0x([0-9a-f]+)", self.operands)
        return int(match[1], 16) if match else 0


@dataclasses.dataclass(frozen=True)
class Loop:
    """One turn of a loop, in the order of addresses, without what is moved out of line, as are the retries of waits."""

    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def counts(self) -> collections.Counter[str]:
        """How often each opcode occurs."""
        return count(self.instructions)

    @property
    def products(self) -> int:
        return sum(self.counts[name] for name in PRODUCTS)

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(self.counts[name] for name in SPILLS)


def count(instructions: Iterable[Instruction]) -> collections.Counter[str]:
    """How often each opcode occurs, without modifiers."""
    return collections.Counter(instruction.name for instruction in instructions)


def parse(text: str) -> list[Instruction]:
    """The instructions of the first function in a dump."""
    found: list[Instruction] = []
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            address = int(match[1], 16)
            if found and address <= found[-1].address:
                break  # another function
            found.append(Instruction(address, match[3], match[4], match[2] or ""))
        elif found and (match := _SECOND_WORD.match(line)):
            stall = int(match[1], 16) >> _STALL_BIT & 0xF
            found[-1] = dataclasses.replace(found[-1], stall=stall)
    return found


# -------------------------------------------------------------------------------------------------------------- loops

Block = list[Instruction]
_LEAVES = frozenset({"BRX", "JMP", "JMX", "EXIT", "RET", "BSYNC"})


def hot_loops(instructions: list[Instruction]) -> list[Loop]:
    """The innermost loops that hold matrix products, in the order of their addresses.

    They are the natural loops of the flow graph and not the stretches that backward branches span: the retry of a wait
    stands behind the last instruction, and its branch back into a loop spans half the kernel.
    """
    blocks = _blocks(instructions)
    successors = _successors(blocks)
    natural = _natural_loops(successors)
    multiplying = [head for head, body in natural.items() if any(_multiplies(blocks[i]) for i in body)]
    loops = []
    for head in sorted(multiplying):
        body = natural[head]
        if not any(natural[other] < body for other in multiplying):
            end = max(i for i in body if head in successors[i])
            loops.append(Loop(tuple(step for i in sorted(body) if head <= i <= end for step in blocks[i])))
    return loops


def _multiplies(block: Block) -> bool:
    return any(step.name in PRODUCTS for step in block)


def _blocks(instructions: list[Instruction]) -> list[Block]:
    """Stretches that are entered at their first instruction alone and left at their last."""
    starts = {_address_in(step) for step in instructions}
    blocks: list[Block] = []
    for step in instructions:
        if not blocks or step.address in starts or blocks[-1][-1].name in _LEAVES | {"BRA"}:
            blocks.append([])
        blocks[-1].append(step)
    return blocks


def _address_in(step: Instruction) -> int | None:
    """Where it may jump to; a BSSY names the place where its BSYNC goes on."""
    match = _ADDRESS.search(step.operands) if step.name in ("BRA", "BSSY") else None
    return int(match[1], 16) if match else None


def _successors(blocks: list[Block]) -> list[set[int]]:
    """The blocks that may run next. Jumps through a table (BRX) lead nowhere: nothing says where."""
    at = {block[0].address: index for index, block in enumerate(blocks)}
    meets_at: dict[str, int | None] = {}  # barrier -> address after its BSYNC
    successors: list[set[int]] = []
    for index, block in enumerate(blocks):
        meets_at |= {step.operands.split(",")[0]: _address_in(step) for step in block if step.name == "BSSY"}
        last = block[-1]
        target = meets_at.get(last.operands) if last.name == "BSYNC" else _address_in(last)
        # a condition is a predicate, or an operand before the address
        conditional = bool(last.predicate) or (last.name == "BRA" and "," in last.operands)
        goes_on = conditional or last.name not in _LEAVES | {"BRA"}
        following = {index + 1} if goes_on and index + 1 < len(blocks) else set()
        successors.append(following | ({at[target]} if last.name in ("BRA", "BSYNC") and target in at else set()))
    return successors


def _natural_loops(successors: list[set[int]]) -> dict[int, set[int]]:
    """For each head, the blocks from which it is reached again without leaving what it dominates."""
    dominators = _dominators(successors)
    predecessors = _turned(successors)
    loops: dict[int, set[int]] = {}
    for tail, heads in enumerate(successors):
        for head in heads:
            if not dominators[tail] >> head & 1:
                continue
            body, ahead = loops.setdefault(head, {head}), [tail]
            while ahead:
                block = ahead.pop()
                if block not in body:
                    body.add(block)
                    ahead.extend(predecessors[block])
    return loops


def _dominators(successors: list[set[int]]) -> list[int]:
    """For each block the set (as bits) of those on every way to it, itself among them."""
    predecessors, entries = _turned(successors), _entries(successors)
    everything = (1 << len(successors)) - 1
    dominators = [1 << index if index in entries else everything for index in range(len(successors))]
    changed = True
    while changed:
        changed = False
        for index in set(range(len(successors))) - entries:
            common = functools.reduce(lambda bits, block: bits & dominators[block], predecessors[index], everything)
            changed |= common | 1 << index != dominators[index]
            dominators[index] = common | 1 << index
    return dominators


def _entries(successors: list[set[int]]) -> set[int]:
    """The first block and, of what no jump with a known target reaches, the first: warps that specialise come there
    through a table."""
    entries: set[int] = set()
    reached: set[int] = set()
    for index in range(len(successors)):
        if index not in reached:
            entries.add(index)
            ahead = [index]
            while ahead:
                block = ahead.pop()
                if block not in reached:
                    reached.add(block)
                    ahead.extend(successors[block])
    return entries


def _turned(successors: list[set[int]]) -> list[set[int]]:
    """The predecessors."""
    predecessors: list[set[int]] = [set() for _ in successors]
    for index, following in enumerate(successors):
        for other in following:
            predecessors[other].add(index)
    return predecessors
