"""``python -m benchmarks``: check, then time, this package beside its peers.

python -m benchmarks --quick --out DIR           what `make bench` runs: a CPU, under three minutes
python -m benchmarks --list
python -m benchmarks --only module-b8 --json results.json
python -m benchmarks --budget 600 --out DIR      a bit of everything within ten minutes
python -m benchmarks --budget 900 --out DIR --resume    what that one, or Ctrl-C, left out
python -m benchmarks lecture --out DIR           the lecture's systems: each learns, and is drawn
python -m benchmarks compare A.json B.json       did anything become slower? (the exit status says so, too)
python -m benchmarks report RUN.json             a run as Markdown, CSV and pictures
python -m benchmarks cookbook                    docs/cookbook.md anew, from the functions that it shows
python -m benchmarks host                        what a call costs before its kernel runs, beside torch's
python -m benchmarks ranks                       what attention over several processes waits for, over gloo
python -m benchmarks take DIR                    what came back of `make gpu` into benchmarks/results
python -m benchmarks laboratory --target cuda:90 what the kernels take, compiled for GPUs that need not be here
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """The command line, and its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Only a measurement needs torch, which takes seconds to import
    if arguments[:1] == ["compare"]:
        from benchmarks.reporting import compare

        return compare.main(arguments[1:])
    if arguments[:1] == ["report"]:
        from benchmarks.reporting import report

        return report.main(arguments[1:])
    if arguments[:1] == ["lecture"]:
        from benchmarks.lecture import command_line as lecture

        return lecture.main(arguments[1:])
    if arguments == ["cookbook"]:
        from benchmarks.cookbook import page

        return page.main()
    if arguments[:1] == ["host"]:
        from benchmarks.host import command_line as host

        return host.main(arguments[1:])
    if arguments[:1] == ["ranks"]:
        from benchmarks.ranks import command_line as ranks

        return ranks.main(arguments[1:])
    if arguments[:1] == ["take"]:
        from benchmarks import take

        return take.main(arguments[1:])
    if arguments[:1] == ["laboratory"]:
        from benchmarks.laboratory import command_line as laboratory

        return laboratory.main(arguments[1:])
    from benchmarks import command_line

    return command_line.main(arguments)


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has what it wanted, as `head` does; no verdict is known of the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
