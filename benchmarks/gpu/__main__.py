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

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu import children

ROOT = Path(__file__).parents[2]
ARCHIVE = ROOT / "build" / "gpu-cache.tar.xz"
SECONDS = {"1": 270.0, "2": 400.0, "sweep": 540.0}  # of a call in all, its end included


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        call: which.
        out: where the files go.
        after: what call 1 left, for call 2; None: nothing is known of it.
        archive: compiled kernels to begin with; None: there are none.
        only: a family, or a part of the names of the timed cases.
        dry_run: tiny cases on a CPU, which the kernels refuse, and parity tests that are all skipped.
    """

    call: str
    out: Path
    after: Path | None = None
    archive: Path | None = None
    only: str = ""
    dry_run: bool = False


def parse(arguments: list[str]) -> tuple[Options, bool]:
    """The options, and whether this process is the one inside the guard."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Parity and speed on a GPU, in calls."
    )
    parser.add_argument("--call", required=True, choices=SECONDS, help="which; 1 comes first")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--after", type=Path, metavar="DIR", help="what call 1 left, for call 2")
    parser.add_argument(
        "--cache", type=Path, metavar="FILE", help=f"compiled kernels (default: {ARCHIVE.relative_to(ROOT)})"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="time a family, or cases whose name contains TEXT")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases on a CPU, to try the way through")
    parser.add_argument("--unguarded", action="store_true", help="in this process, which nobody ends")
    given = parser.parse_args(arguments)
    if given.after is not None and given.call != "2":
        parser.error(f"--after {given.after}: call 2 comes after call 1, and this is call {given.call}")
    if given.only and given.call == "1":
        parser.error(f"--only {given.only}: call 1 asks one question; expected with call 2 or sweep")
    if given.after is not None and not (given.after / "call.json").is_file():
        parser.error(f"--after {given.after}: expected the folder that call 1 wrote, with its call.json")
    if given.cache is not None and not given.cache.is_file():
        parser.error(f"--cache {given.cache}: expected the file that `make gpu-cache` writes")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out {given.out}: expected a folder, or a place for one")
    archive = given.cache or (ARCHIVE if ARCHIVE.is_file() else None)
    after = None if given.after is None else given.after.resolve()
    found = Options(given.call, given.out.resolve(), after, archive and archive.resolve(), given.only, given.dry_run)
    return found, given.unguarded


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unguarded = parse(arguments)
    if unguarded:
        from benchmarks.gpu import calls

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
