"""A kernel's PTX as a list of statements, with its parameters, labels and the lines of Python it was compiled from."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_BYTES = {"u8": 1, "u16": 2, "u32": 4, "s32": 4, "b32": 4, "f32": 4, "u64": 8, "s64": 8, "b64": 8, "f64": 8}
_TOGETHER = re.compile(r"(@\S+ )?(bar|barrier|mbarrier|wgmma|mma|shfl|vote|redux|elect|setmaxnreg|ldmatrix|stmatrix)\.")
_SHARED_ACCESS = re.compile(r"\b(?:ld|st)\.shared\S*?(?:\.v(\d))?\.[busf](8|16|32|64) ")
_LABEL = re.compile(r"([\w$%]+):(?!:)")
_TARGETS = re.compile(r"\s*\.branchtargets\s+([^;]*);")
_COMMENT = re.compile(r"^(\s*\.loc\b[^\n]*)$|//[^\n]*", re.MULTILINE)  # behind .loc stands the chain of inlined calls
_CALL = re.compile(r"([\w.]+\.py):(\d+)")


class Statement(NamedTuple):
    """One instruction: where it stands, its text on one line, and the scopes of labels that it lies in."""

    line: int
    text: str
    scopes: tuple[int, ...]
    source: str  # the line of Python, and where that is inlined


class Program:
    """A kernel, parsed. ``steps`` is what :func:`tests.machines.soft_gpu.instructions.load` makes of the statements."""

    def __init__(self, ptx: str, name: str) -> None:
        self.name = name
        ptx = _COMMENT.sub(lambda found: found[1] or "", ptx)
        head = re.search(rf"\.visible \.entry {re.escape(name)}\((.*?)\)\s*\n(.*?)\n\{{", ptx, re.DOTALL)
        if head is None:
            raise ValueError(f"name={name!r}: no such entry in the module")
        self.parameters = [_parameter(line) for line in head[1].split("\n") if line.strip()]
        self.parameter_index = {name: i for i, (name, _) in enumerate(self.parameters)}
        self.threads = _directive("reqntid", head[2])
        self.registers = _directive("maxnreg", head[2])  # 0 where the kernel does not say
        self._slots: dict[str, int] = {}
        self._labels: dict[tuple[str, int], int] = {}
        self.branch_targets: dict[str, list[str]] = {}
        self.statements: list[Statement] = []
        self._parse(ptx, head.end() - 1)
        # What the lanes of a warp execute together or not at all.
        self.together = [_TOGETHER.match(statement.text) is not None for statement in self.statements]
        # The bytes that races in shared memory are told apart by: neighbours in a word may be written by two warps.
        narrow = [_SHARED_ACCESS.search(statement.text) for statement in self.statements]
        self.shared_unit = min([4, *(int(found[1] or 1) * int(found[2]) // 8 for found in narrow if found)])
        self.steps: list[Any] = []

    @property
    def warps(self) -> int:
        return self.threads // 32

    def slot(self, register: str) -> int:
        """The number of a register."""
        return self._slots.setdefault(register, len(self._slots))

    def label(self, name: str, scopes: tuple[int, ...]) -> int:
        """The statement behind a label, looked for from the innermost scope outwards."""
        for scope in reversed(scopes):
            if (name, scope) in self._labels:
                return self._labels[name, scope]
        raise ValueError(f"label={name!r}: {self.name} has none of that name in scope")

    def where(self, index: int) -> str:
        """A statement for a reader: the line of Python it comes from, its line in the PTX, its text."""
        statement = self.statements[index]
        python = f", from {statement.source}" if statement.source else ""
        return f"line {statement.line} of the PTX of {self.name}, {statement.text[:120]!r}{python}"

    def _parse(self, body: str, position: int) -> None:
        line = body.count("\n", 0, position) + 1
        scopes: list[int] = []
        opened, source = 0, ""
        while position < len(body):
            character = body[position]
            if character.isspace():
                line += character == "\n"
                position += 1
            elif character == "{":
                opened += 1
                scopes.append(opened)
                position += 1
            elif character == "}":
                scopes.pop()
                position += 1
                if not scopes:
                    break
            elif label := _LABEL.match(body, position):
                position = label.end()
                if targets := _TARGETS.match(body, position):
                    self.branch_targets[label[1]] = [target.strip() for target in targets[1].split(",")]
                    line += body.count("\n", position, targets.end())
                    position = targets.end()
                else:
                    self._labels[label[1], scopes[-1]] = len(self.statements)
            elif body.startswith((".loc", ".file"), position):
                end = body.index("\n", position)
                source = " in ".join(dict.fromkeys(f"{file}:{n}" for file, n in _CALL.findall(body[position:end])))
                position = end
            else:
                end = body.index(";", position)
                text = body[position:end]
                if not text.startswith((".reg", ".pragma")):
                    self.statements.append(Statement(line, " ".join(text.split()), tuple(scopes), source))
                line += text.count("\n")
                position = end + 1


def _parameter(line: str) -> tuple[str, int]:
    """Name and size of a parameter."""
    found = re.match(
        r"\.param\s+(?:\.align \d+ )?\.(\w+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?(\w+)(?:\[(\d+)\])?$",
        line.strip().rstrip(","),
    )
    if found is None:
        raise NotImplementedError(f"the parameter {line.strip()!r}")
    return found[2], int(found[3]) if found[3] else _BYTES[found[1]]


def _directive(name: str, text: str) -> int:
    found = re.search(rf"\.{name} (\d+)", text)
    return int(found[1]) if found else 0


def split_operands(text: str) -> list[str]:
    """Operands between commas; brackets and braces keep theirs together."""
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    return [*operands, current.strip()] if current.strip() else operands
