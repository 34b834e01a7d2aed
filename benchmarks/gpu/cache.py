"""A cache of compiled kernels as one file, so that a GPU at hand for minutes need not spend them on compiling.

Triton finds a kernel by a hash of its source, of what it was specialised to, of the target and the options, of all of
triton's own files, libtriton.so among them, of what ``ptxas --version`` says, and of the environment variables that
libtriton names as invalidating. Where the files lie is not in it. So a miss means: other sources than those the cache
was filled from, another build of triton under the same version, another ptxas (``TRITON_PTXAS_PATH``), or one of those
variables; :func:`differences` tells all but the first. A launcher, the small C module that triton builds for each
signature, is found by its C source and the machine's architecture; its file's name has Python's version.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import json
import sysconfig
import tarfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_KEPT = (".cubin", ".json", ".so")  # triton asks for no more once a kernel is compiled


def describe() -> dict[str, Any]:
    """What the keys of this process's cache depend on, sources and options aside."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    return {
        "triton": triton.__version__,
        "files of triton": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
        "ptxas": " ".join(get_ptxas_version(90).split()),
        "python": sysconfig.get_config_var("EXT_SUFFIX"),
        "variables": dict(sorted(get_cache_invalidating_env_vars().items())),
    }


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """A sentence for each thing in which what :func:`describe` said of an archive differs from what it says here."""
    return [
        f"{name}: {there.get(name)!r} in the archive, {value!r} here"
        for name, value in here.items()
        if there.get(name) != value
    ]


@contextlib.contextmanager
def counting() -> Generator[collections.Counter[str]]:
    """A context that counts the kernels triton is asked for: those ``compiled``, and those ``from_cache``."""
    counts: collections.Counter[str] = collections.Counter()
    try:
        from triton import knobs
    except ImportError:  # then there is nothing to count
        yield counts
        return

    def listen(*, cache_hit: bool, **facts: Any) -> None:
        counts["from_cache" if cache_hit else "compiled"] += 1

    with knobs.compilation.scope():
        knobs.compilation.listener = listen
        yield counts


def entries(cache: Path) -> set[str]:
    """The names of the cache's folders, one for each kernel and each launcher."""
    return {path.name for path in cache.iterdir() if path.is_dir()} if cache.is_dir() else set()


def count(cache: Path, names: Iterable[str] | None = None) -> dict[str, int]:
    """How many of the entries, or of all, are kernels and how many launchers."""
    kinds = {"kernels": ".cubin", "launchers": ".so"}
    found = entries(cache) if names is None else names
    files = [{file.suffix for file in (cache / name).iterdir()} for name in found]
    return {kind: sum(suffix in suffixes for suffixes in files) for kind, suffix in kinds.items()}


def pack(cache: Path, archive: Path, names: Iterable[str] | None = None, *, preset: int = 6) -> dict[str, Any]:
    """Write the cache's entries, or those named, into an archive; its manifest.

    The archive appears whole or not at all.
    """
    names = sorted(entries(cache) if names is None else names)
    manifest: dict[str, Any] = {**describe(), **count(cache, names)}
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".part")
    with tarfile.open(partial, "w:xz", preset=preset) as tar:
        said = json.dumps(manifest, indent=1).encode()
        header = tarfile.TarInfo(MANIFEST)
        header.size = len(said)
        tar.addfile(header, io.BytesIO(said))
        for name in names:
            for file in sorted((cache / name).iterdir()):
                if file.suffix in _KEPT:
                    tar.add(file, f"{name}/{file.name}")
    partial.replace(archive)
    return manifest


def unpack(archive: Path, cache: Path) -> dict[str, Any]:
    """Add the archive's entries to the cache; the archive's manifest.

    Raises:
        ValueError: it is no such archive; the message names it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive, "r:xz") as tar:
            tar.extractall(cache, filter="data")
        return json.loads((cache / MANIFEST).read_text())
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise ValueError(f"{archive}: expected an archive that `make gpu-cache` has written; {error}") from error
    finally:
        (cache / MANIFEST).unlink(missing_ok=True)
