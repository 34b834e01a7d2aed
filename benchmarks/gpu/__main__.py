"""``python -m benchmarks.gpu --call 1|2 --out DIR``: what is right and how fast, on a GPU that is there for minutes.

Installs nothing. A machine may be lent for 15 minutes in all, for two commands, each with a limit; so there are two
calls, each of which ends by itself, whatever hangs, and leaves at most six files in DIR, the first of them the answer:

- call 1, at most 270 s: every kernel of ours once, under a watchdog; then at L = 8192 and head size 128 ours beside
  cuDNN's and flash attention; then the parity tests in the time left.
- call 2, at most 400 s: the other lengths and head sizes, masks, biases, norms and the rest of the matrix; a line of
  ncu for each kind of kernels. ``--after DIR`` names what call 1 left: what was wrong there is not timed, but looked
  into by compute-sanitizer first of all, and kernels that call 1 had to compile are taken from there.
- call sweep, at most 540 s: every configuration of the attention kernels instead.

build/gpu-cache.tar.xz, as ``make gpu-cache`` writes it on a machine without a GPU, has the kernels compiled beforehand.

Exit status: 2 without a GPU (nothing is written) or where an option is wrong, 1 where this package was wrong or a test
failed, 124 where the time was up before the end, else 0.
"""

from __future__ import annotations

import os
import sys
import time

from benchmarks.gpu import children
from benchmarks.gpu.options import ROOT, SECONDS, parse


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unguarded = parse(arguments)
    if unguarded:
        from benchmarks.gpu import calls  # imports torch, which the guard does without

        status = calls.carry_out(options, time.monotonic())
        sys.stdout.flush()
        os._exit(status)  # Python would wait for each process of a pool, also for one that a driver holds
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--unguarded"]
    seconds = SECONDS[options.call] - children.KILL_SECONDS
    status = children.run(command, seconds, environ={**os.environ, "PYTHONPATH": path})
    if status is None:
        said = options.out / "answer.txt"
        print(said.read_text() if said.is_file() else "", flush=True)
        print(f"call {options.call} was ended after {seconds:.0f} s: {options.out} has what there was", file=sys.stderr)
        return children.TIMED_OUT
    return status


if __name__ == "__main__":
    sys.exit(main())
