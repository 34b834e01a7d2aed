"""What a call on a GPU is asked for."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

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
