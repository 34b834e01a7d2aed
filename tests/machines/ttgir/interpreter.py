"""ttsem's interpreter of modules, with our operations."""

from __future__ import annotations

import random
from typing import Any

from ttsem.interp import Interp
from ttsem.ir_types import Module, Op
from ttsem.memory import Memory
from ttsem.values import Unsupported

from tests.machines.ttgir.repairs import OPERATIONS


class Interpreter(Interp):
    """Runs the programs of a grid, one after the other."""

    def __init__(self, module: Module, memory: Memory, grid: tuple[int, int, int], rng: random.Random) -> None:
        super().__init__(module, memory, grid)
        self.rng, self.operations = rng, OPERATIONS
        self.current: Op | None = None

    @property
    def where(self) -> str:
        """The operation that runs, and where in the source it comes from."""
        return "" if self.current is None else (self.current.text or self.current.name)

    def eval_op(self, op: Op) -> None:
        self.current = op
        if self.memory.access_log is not None:
            self.memory.current_op = op.text or op.name
        handler = self.operations.get(op.name)
        if handler is None:
            raise Unsupported(op.name, op.text or "")
        arguments: list[Any] = [self.value(name) for name in op.operands]
        self.bind_results(op, handler(self, op, arguments))
