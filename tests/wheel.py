"""The wheel and the sdist: ``make wheel`` looks into both and tries the wheel in an environment of its own.

The environment, build/wheel, has fastattn from the wheel, and everything else from the environment that runs this:
torch need not be installed twice. pip checks that it is what the wheel asks for and constraints.txt says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import fastattn

ROOT = Path(__file__).parents[1]
DIST, ENVIRONMENT = ROOT / "dist", ROOT / "build" / "wheel"
# Where each package of the wheel lies in the checkout.
PACKAGES = {"fastattn": ROOT / "fastattn", "fastattn_kernels": ROOT / "kernels" / "fastattn_kernels"}
# What the sdist has to have: the sources, what the tests read, and what both are installed by.
FOLDERS = ("fastattn", "kernels", "tests", "benchmarks", "docs", "examples", ".github")
FILES = ("*.md", "*.toml", "*.txt", "*.in", "*.cff", "*.yml", ".*.yaml", "setup.py", "Makefile", "LICENSE")
LOCAL = {"__pycache__", ".ipynb_checkpoints", "local"}  # folders that stay at home
LIMIT = 120  # seconds of one program


def main() -> int:
    """Check both, install the wheel, run what tests/smoke.py has; raise where something is not as it should be."""
    wheel, sdist = (DIST / f"fastattn-{fastattn.__version__}{end}" for end in ("-py3-none-any.whl", ".tar.gz"))
    complaints = [*missing_in_wheel(wheel), *missing_in_sdist(sdist)]
    if complaints:
        print("\n".join(complaints), file=sys.stderr)
        return 1
    python = set_up(wheel)
    installed_from(python)
    run(python, "-m", "fastattn")
    run(python, ROOT / "tests" / "smoke.py", "torch", ROOT / "README.md")
    if sys.platform == "linux":  # elsewhere there is no triton
        run(python, ROOT / "tests" / "smoke.py", "triton", TRITON_INTERPRET="1")
    return 0


# ----------------------------------------------------------------------------------------------------- what is inside


def missing_in_wheel(wheel: Path) -> Iterator[str]:
    """What the wheel lacks, and what it should not have: beside the packages' files only what describes it."""
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    described = f"fastattn-{fastattn.__version__}.dist-info/"
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}" for name, folder in PACKAGES.items() for path in files(folder)
    }
    expected.add(f"{described}licenses/LICENSE")
    yield from (f"{wheel.name} has no {name}" for name in sorted(expected - found))
    rest = sorted(name for name in found - expected if not name.startswith(described))
    yield from (f"{wheel.name} has {name}, which is not in the sources" for name in rest)


def missing_in_sdist(sdist: Path) -> Iterator[str]:
    """What of the checkout the sdist lacks: the tests run in it as they do here."""
    with tarfile.open(sdist) as archive:
        found = {PurePosixPath(name).relative_to(f"fastattn-{fastattn.__version__}") for name in archive.getnames()}
    expected = [path for folder in FOLDERS for path in files(ROOT / folder)]
    expected += [path for pattern in FILES for path in ROOT.glob(pattern)]
    names = sorted(PurePosixPath(path.relative_to(ROOT).as_posix()) for path in expected)
    yield from (f"{sdist.name} has no {name}: MANIFEST.in has to name it" for name in names if name not in found)


def files(folder: Path) -> Iterable[Path]:
    """The files below a folder, which may be missing, without compiled ones and those of one machine."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not LOCAL & set(path.parts))
    return (path for path in paths if path.suffix not in (".pyc", ".png"))


# ----------------------------------------------------------------------------------------------------- the environment


def set_up(wheel: Path) -> Path:
    """The Python of a new environment that has the wheel, and reads everything else from the one that is running."""
    venv.create(ENVIRONMENT, clear=True, with_pip=False)
    python = ENVIRONMENT / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # pip and the smoke test find what the wheel needs there. The .pth files of that folder, by which a checkout is
    # installed there, are not read: only those of an environment's own folder are.
    (Path(site) / "rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--quiet", "--disable-pip-version-check", "--only-binary", ":all:", "-c", ROOT / "constraints.txt")
    # The checkout's own installation is found too, and would count as this version.
    run(python, "-m", "pip", "install", "--force-reinstall", "--no-deps", *options, wheel)
    run(python, "-m", "pip", "install", *options, wheel)
    return python


def installed_from(python: Path) -> None:
    """Both packages are the wheel's, and so is the version that pip knows.

    Raises:
        RuntimeError: one is not; the message says where it was found.
    """
    code = """
from importlib import metadata, util
print(*(util.find_spec(name).origin for name in ("fastattn", "fastattn_kernels")), metadata.version("fastattn"))
"""
    *origins, version = run(python, "-c", code).split()
    outside = [origin for origin in origins if not Path(origin).is_relative_to(ENVIRONMENT)]
    if outside or version != fastattn.__version__:
        raise RuntimeError(f"expected fastattn {fastattn.__version__} in {ENVIRONMENT}, found {version}, {origins}")


def run(python: Path, *arguments: str | Path, **environment: str) -> str:
    """What a program prints, which is shown too; run where no source lies, and without what PYTHONPATH says.

    Raises:
        CalledProcessError: it failed.
    """
    said = subprocess.run(
        [python, "-I", *arguments],
        cwd=ENVIRONMENT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        check=True,
    ).stdout
    print(said, end="", flush=True)
    return said


if __name__ == "__main__":
    sys.exit(main())
