"""The cache of compiled kernels that travels to a GPU as one file: what is in it, and that triton finds it there."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton

from benchmarks.gpu import cache

ROOT = Path(__file__).parents[2]
KERNEL = "fastattn-triton: kernels-b2-h2-l512-d64-forward-bfloat16"


@pytest.fixture
def filled(tmp_path):
    """A cache with a kernel and a launcher, as triton writes them."""
    folder = tmp_path / "cache"
    for name, files in {"K": ("k.cubin", "k.json", "k.ttir", "k.source"), "L": ("l.cpython-312.so",)}.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            (folder / name / file).write_text(f"{name} {file}")
    return folder


def test_archive_has_what_triton_asks_for_and_no_more(filled, tmp_path):
    archive = tmp_path / "there" / "cache.tar.xz"
    manifest = cache.pack(filled, archive)
    assert (manifest["kernels"], manifest["launchers"]) == (1, 1)
    assert manifest == {**cache.describe(), "kernels": 1, "launchers": 1}
    other = tmp_path / "other"
    assert cache.unpack(archive, other) == manifest
    assert {str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()} == {
        "K/k.cubin", "K/k.json", "L/l.cpython-312.so",
    }  # fmt: skip
    assert (other / "K" / "k.cubin").read_text() == "K k.cubin"
    assert list(archive.parent.iterdir()) == [archive]


def test_archive_of_some_entries_is_added_to_what_is_there(filled, tmp_path):
    cache.pack(filled, tmp_path / "some.tar.xz", ["L"])
    other = tmp_path / "other"
    (other / "M").mkdir(parents=True)
    assert cache.unpack(tmp_path / "some.tar.xz", other)["kernels"] == 0
    assert cache.entries(other) == {"L", "M"}
    assert cache.count(other) == {"kernels": 0, "launchers": 1}
    assert cache.count(filled, {"K"}) == {"kernels": 1, "launchers": 0}
    assert cache.entries(tmp_path / "nowhere") == set()


@pytest.mark.parametrize("kind", ["no archive", "cut short", "of something else"])
def test_what_is_no_archive_is_refused_by_name(filled, tmp_path, kind):
    archive = tmp_path / "cache.tar.xz"
    cache.pack(filled, archive)
    if kind == "no archive":
        archive.write_text("no archive")
    elif kind == "cut short":
        archive.write_bytes(archive.read_bytes()[:200])
    else:
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(__file__, "K/it.py")
    with pytest.raises(ValueError, match=r"cache.tar.xz: expected an archive that `make gpu-cache` has written"):
        cache.unpack(archive, tmp_path / "other")


def test_what_may_make_triton_miss_is_told(monkeypatch):
    here = cache.describe()
    assert cache.differences(here, here) == []
    monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    changed = cache.describe()
    (said,) = cache.differences(changed, here)
    assert said.startswith("variables: {} in the archive, {'DISABLE_LLVM_OPT': ")
    assert cache.differences(here, {**here, "triton": "3.0.0"}) == [
        f"triton: '3.0.0' in the archive, {here['triton']!r} here"
    ]


def prefill(archive, folder, root=ROOT):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.prefill",
        "--out",
        str(archive),
        "--cache",
        str(folder),
        "--only",
        KERNEL,
    ]
    found = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=250)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, which triton builds launchers with")
def test_prefilled_cache_has_kernels_and_launchers_and_is_found_wherever_the_sources_lie(tmp_path):
    """A second filling, from a copy of the sources and the unpacked archive, compiles nothing and builds nothing."""
    archive, moved = tmp_path / "cache.tar.xz", tmp_path / "moved"
    said = prefill(archive, tmp_path / "first")
    assert f"{KERNEL}: ok, 1 new kernels" in said
    manifest = cache.unpack(archive, tmp_path / "second")
    assert manifest["kernels"] >= 1
    # the module that loads binaries, and in older versions of triton one for each signature
    assert manifest["launchers"] >= 1 + (triton.__version__ < "3.7")
    before = cache.entries(tmp_path / "second")
    for name in ("benchmarks", "fastattn", "kernels"):
        shutil.copytree(ROOT / name, moved / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    assert f"{KERNEL}: ok, 1 new kernels" in prefill(tmp_path / "again.tar.xz", tmp_path / "second", moved)
    assert cache.entries(tmp_path / "second") == before
    with tarfile.open(archive) as tar:
        assert json.loads(tar.extractfile("manifest.json").read())["kernels"] == manifest["kernels"]  # pyrefly: ignore[missing-attribute]
