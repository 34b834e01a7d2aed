"""Modules of MLIR: printed as ttsem parses them, parsed, and where in the source their operations come from."""

from __future__ import annotations

import ctypes
import functools
import gc
import re
from pathlib import Path
from typing import NamedTuple

import triton
from ttsem import mlir
from ttsem.ir_types import Op, Type

_FLAGS = (b"fastattn", b"--mlir-print-op-generic")
_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)\n", re.MULTILINE)
_PLACE = re.compile(r'"([^"]+)":(\d+):\d+')


@functools.cache
def print_generically() -> None:
    """From here on every module of this process prints in MLIR's generic form: triton's wheel exports the two functions
    that read a command line's options for printing. Layouts and places stay names, which takes a third of the text."""
    library = ctypes.CDLL(str(next((Path(triton.__file__).parent / "_C").glob("libtriton*.so"))), ctypes.RTLD_GLOBAL)
    try:
        register, parse_options = library._ZN4mlir27registerAsmPrinterCLOptionsEv, library.LLVMParseCommandLineOptions
    except AttributeError as error:
        raise ImportError(f"triton {triton.__version__} hides how its modules are printed: {error}") from error
    register.restype = parse_options.restype = None
    register()
    parse_options.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), ctypes.c_char_p]
    parse_options(len(_FLAGS), (ctypes.c_char_p * len(_FLAGS))(*_FLAGS), _FLAGS[0])


class _Parser(mlir.Parser):
    """ttsem's, which makes each type once."""

    def __init__(self, text: str) -> None:
        super().__init__(mlir.tokenize(text), text)
        self.types: dict[tuple[str, str], Type] = {}

    def _make_shaped_type(self, kind: str, inner: str, full_raw: str) -> Type:
        if (kind, inner) not in self.types:
            self.types[kind, inner] = super()._make_shaped_type(kind, inner, full_raw)
        return self.types[kind, inner]


class Module(NamedTuple):
    """A module as ttsem runs it, with what its locations stand for."""

    funcs: dict[str, Op]
    locations: dict[str, str]

    def place(self, op: Op) -> str:
        """Where in the source an operation comes from: ``file.py:12``, and from where that was called."""
        return self._place(op.loc or "")

    def _place(self, location: str) -> str:
        if found := _PLACE.search(location):
            return f"{Path(found[1]).name}:{found[2]}"
        names = re.findall(r"#loc\d*", location)
        return ", called from ".join(filter(None, (self._place(self.locations.get(name, "")) for name in names)))


def parse(text: str) -> Module:
    """A module printed generically."""
    locations = dict(_LOCATION.findall(text))
    text = _LOCATION.sub("", text)
    gc.disable()  # beside all that a process of tests holds, collecting takes as long as parsing
    try:
        parser = _Parser(text)
        parser.parse_leading_aliases()
        module = parser.parse_op()
    finally:
        gc.enable()
    functions = [op for op in module.regions[0].blocks[0].ops if op.name == "tt.func"]
    return Module({str(op.attrs["sym_name"]): op for op in functions}, locations)
