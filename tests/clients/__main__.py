"""``make clients``: other packages' models on ours, compared and counted; writes the tables of docs/clients.md.

``python -m tests.clients [WORD ...]`` looks at the models whose package or name holds one of the words, and writes
nothing then. ``--times`` times them instead. The exit status is 1 where a model failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

if __name__ == "__main__" and "--times" not in sys.argv:
    from tests import machines  # its interpreter runs the kernels, which has to be known when fastattn is imported

    machines.install()

# isort: split
from tests.clients import CLIENTS, page, parity, timing
from tests.clients.cases import Client, resolve

INSTALLED = ("torch", "triton", *dict.fromkeys(client.package for client in CLIENTS))


def compare(client: Client) -> page.Row:
    """The client's row, of both backends."""
    by_registry = (parity.REGISTERED,) * client.registry
    on_torch = parity.examine(client, "torch", (parity.PATCHED, parity.FUSED, parity.BOTH, *by_registry))
    return page.parity_row(client, on_torch, parity.examine(client, "triton", (parity.BOTH, *by_registry)))


def main(arguments: list[str]) -> int:
    """Look at the clients that are asked for, or time them; 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the packages or names of models; default: all")
    parser.add_argument("--times", action="store_true", help="time them, and compare nothing")
    parser.add_argument("--seconds", type=float, default=0.8, help="of each time of a model")
    asked = parser.parse_args(arguments)
    prepare()
    part: str = page.PARITY
    row: Callable[[Client], page.Row] = compare
    if asked.times:
        part, row = page.TIMES, lambda client: page.times_row(client, timing.measure(client, asked.seconds))

    chosen = [c for c in CLIENTS if not asked.words or any(word in f"{c.package} {c.name}" for word in asked.words)]
    rows, failed = [], 0
    for client in chosen:
        start = time.perf_counter()
        try:
            rows.append(row(client))
            said = " | ".join(rows[-1])
        except Exception:
            failed += 1
            said = f"{client.package} | {client.name} | FAILED\n{traceback.format_exc()}"
        print(f"{time.perf_counter() - start:5.1f} s  {said}", flush=True)
    if not failed and not asked.words:
        page.write(part, page.table(part, rows))
        page.write(page.VERSIONS, ", ".join(f"{name} {metadata.version(name)}" for name in INSTALLED) + ".\n")
    print(f"{len(rows)} passed, {failed} failed")
    return int(failed > 0 or not chosen)


def prepare() -> None:
    """One thread; no warnings of the packages, of which none is about us; torchvision such that it can be imported."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    define_missing_operators()
    resolve("diffusers.utils.logging:set_verbosity_error")()


def define_missing_operators() -> None:
    """Let torchvision be imported where its library of operators, built for CUDA, does not load.

    Beside a torch for CPUs it does not, and torchvision then fails at describing two of them. No model here uses any.
    """
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None, "torchvision is not installed: `make clients` installs it"
    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
