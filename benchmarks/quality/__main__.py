"""``python -m benchmarks.quality [--quick] [--seed N] [--device cuda] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.environment import environment, load
from benchmarks.quality.report import print_rows, run


def _say(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{progress[:110]}", end="", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; its exit status is 2 where the device is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few steps: some 50 s of one core, instead of 5 minutes")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sequences (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows to FILE")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cpu":
        torch.set_num_threads(1)  # more threads would add up in another order, and only fight over so little work
    elif not torch.cuda.is_available():
        print(f"--device {options.device}: torch sees no CUDA device", file=sys.stderr)
        return 2
    facts, began = environment(), time.monotonic()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = run(options.quick, options.seed, _say, options.device)
    _say("")
    print_rows(rows)
    print(f"\nseed {options.seed}, {len(rows)} rows in {time.monotonic() - began:.0f} s, load {load():.1f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": facts, "seed": options.seed, "quick": options.quick, "results": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
