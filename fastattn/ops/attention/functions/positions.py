"""Programs of a part of a call, which are told where in the whole its heads, rows and keys stand.

A part may have every second token of a sequence, or some of its heads. So a program reads the numbers that it is told
from tensors, and one program serves all parts: their numbers are data, and no kernel is compiled for them.
"""

from __future__ import annotations

import functools

from fastattn.ops.attention.functions.program import Program, printed

# The indices of which a part has some, in the order of the tensors that say which.
PLACES = ("head", "query_index", "key_index")


@functools.lru_cache(maxsize=1024)
def with_positions(text: str) -> str:
    """A program whose last three captured tensors, int32 ``[indices]``, say what the indices of a part are in the
    whole."""
    program = Program.of(text)
    of = {node: node.target for node in program.graph.nodes if node.op == "placeholder" and node.target in PLACES}
    annotated = [f'{name}: "{kind}"' for name, kind in zip(program.captured, program.kinds)]
    own = program.arguments[: len(program.arguments) - len(annotated)]
    lines = []
    for name in PLACES:
        captured = f"captured_{len(annotated)}"
        annotated.append(f'{captured}: "int32 1"')
        if program.depends_on(name):
            lines.append(f"whole_{name} = read({captured}, [{name}])")
    whole = {node: f"whole_{name}" for node, name in of.items()}
    first, _, rest = printed(program, program.name, [*own, *annotated], program.results, whole).partition("\n    ")
    return "\n    ".join([first, *lines, rest])
