"""ttsem's interpreter of modules, with the repaired operations, and faults told as findings."""

from __future__ import annotations

import random
from typing import Any

from ttsem.interp import Interp
from ttsem.ir_types import Op
from ttsem.memory import Memory, MemoryFault
from ttsem.values import Poison, Unsupported

from tests.machines.findings import Finding, Kind
from tests.machines.ttgir.modules import Module
from tests.machines.ttgir.repairs import OPERATIONS, Handler


class Interpreter(Interp):
    """Runs the programs of a grid, one after the other, in an order that is drawn."""

    operations: dict[str, Handler] = OPERATIONS

    def __init__(self, module: Module, memory: Memory, grid: tuple[int, int, int], rng: random.Random) -> None:
        super().__init__(module, memory, grid)  # pyrefly: ignore[bad-argument-type]  # it asks for the functions only
        self.source, self.rng = module, rng

    def run_grid(self, fn: str, args: list[Any]) -> None:
        programs = [(x, y, z) for z in range(self.num_programs[2]) for y in range(self.num_programs[1])
                    for x in range(self.num_programs[0])]  # fmt: skip
        self.rng.shuffle(programs)
        for program in programs:
            self.run(fn, args, program)

    def find(self, kind: Kind, what: str, op: Op) -> Finding:
        """What is wrong with an operation of the program that runs."""
        return Finding(kind, f"{what} (program {self.program_id})", f"{self.source.place(op)}: {op.name}")

    def eval_op(self, op: Op) -> None:
        handler = self.operations.get(op.name)
        if handler is None:
            raise Unsupported(op.name, op.text or "")
        if self.memory.access_log is not None:
            self.memory.current_op = op  # pyrefly: ignore[bad-assignment]  # it is only handed back with a race
        arguments: list[Any] = [self.value(name) for name in op.operands]
        try:
            results = handler(self, op, arguments)
        except MemoryFault as fault:
            what = f"a {fault.kind} of {len(fault.addrs)} elements outside every tensor of the launch"
            raise self.find("out of bounds", what, op) from fault
        except Poison as poison:
            raise self.find("undefined", str(poison), op) from poison
        self.bind_results(op, results)
