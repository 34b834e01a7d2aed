"""Measure calls in a process of its own, as :mod:`benchmarks.host.run_cases` starts it.

It runs without TRITON_INTERPRET, which triton reads once, and on a CPU for a driver that has to be there before the
first launch. It prints JSON:
``python -m benchmarks.host.process '{"cases": ["eval plain L64"], "device": "cpu", "seconds": 1, "profile": false}'``.
"""

from __future__ import annotations

import json
import sys
import traceback

import torch

from benchmarks.host.cases import all_cases
from benchmarks.host.driver import install
from benchmarks.host.measure import Row, measure
from benchmarks.host.profile import profile
from benchmarks.measure.timing import keep_freed_memory


def main() -> None:
    """Measure, or profile, the cases asked for; the last line is JSON: their rows."""
    asked = json.loads(sys.argv[1])
    device = asked["device"]
    counter = install() if device == "cpu" else None
    torch.set_num_threads(1)
    keep_freed_memory()
    named = {case.name: case for case in all_cases()}
    rows: list[Row] = []
    for name in asked["cases"]:
        try:
            if asked["profile"]:
                print(profile(named[name], device, counter), end="\n\n")
            else:
                rows.append(measure(named[name], device, asked["seconds"], counter))
        except Exception as error:  # a case that fails takes no other along, and fails the command
            traceback.print_exc()
            rows.append({"case": name, "against": named[name].against, "error": f"{type(error).__name__}: {error}"})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
