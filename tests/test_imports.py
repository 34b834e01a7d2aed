"""Importing fastattn: without triton, without a GPU, off Linux, and without paying for any of them."""

import importlib.util
import inspect
import os
import subprocess
import sys
import types

import pytest
import torch

import fastattn
from fastattn import __main__ as report
from fastattn import distributed, reference, testing

# As on a machine where it is not installed: nobody finds it.
HIDE_TRITON = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
def find_all_but_triton(name, path=None, target=None):
    return None if name.partition(".")[0] == "triton" else find_spec(name, path, target)
PathFinder.find_spec = find_all_but_triton
import sys
"""
# As a package whose library is missing, or made for another Python.
BREAK_TRITON = """
import sys, types
from importlib.machinery import ModuleSpec
sys.modules["triton"] = types.ModuleType("triton")
sys.modules["triton"].__spec__ = ModuleSpec("triton", None)
"""
ATTEND = """
import torch, fastattn
leaves = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
output, weights, lse = fastattn.attention(*leaves, need_weights=True, return_lse=True)
output.sum().backward()
print(fastattn.explain(*leaves))
"""


def run(code, **environment):
    """What ``code`` prints in a process of its own; a failure shows its traceback."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", **environment}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_fastattn_works_without_triton():
    said = run(HIDE_TRITON + ATTEND + "print('triton' in sys.modules)")
    assert said.startswith("torch: ")
    assert "not triton: triton is not installed" in said
    assert said.endswith("False\n")


def test_fastattn_without_triton_ignores_the_interpreter():
    assert run(HIDE_TRITON + ATTEND, TRITON_INTERPRET="1").startswith("torch: ")


def test_triton_by_name_without_triton_says_that_it_is_missing():
    code = HIDE_TRITON + ATTEND.replace("return_lse=True", "return_lse=True, backend='triton'")
    with pytest.raises(AssertionError, match=r"NotImplementedError.*triton is not installed"):
        run(code)


def test_fastattn_works_without_a_gpu():
    said = run(ATTEND)
    assert said.startswith("torch: ")
    assert "not triton: " in said


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_fastattn_works_off_linux(platform):
    """Where no triton exists. torch itself is imported first: it loads libraries by the platform's name."""
    assert run(f"import sys, torch\nsys.platform = {platform!r}\n" + HIDE_TRITON + ATTEND).startswith("torch: ")


def test_importing_fastattn_imports_neither_triton_nor_the_kernels():
    code = "import torch, sys\nbefore = set(sys.modules)\nimport fastattn\nprint(sorted(set(sys.modules) - before))"
    imported = run(code)
    assert "'fastattn.ops.attention.api'" in imported
    assert "'triton" not in imported
    assert "fastattn_kernels" not in imported


def test_importing_fastattn_does_not_initialise_cuda():
    """A forked worker could not use the GPU any more if it did."""
    code = """
import torch
def refuse(*args, **kwargs):
    raise AssertionError("CUDA was touched at import")
for name in ("init", "_lazy_init", "current_device", "get_device_capability", "get_device_properties", "device_count"):
    setattr(torch.cuda, name, refuse)
import fastattn
print(torch.cuda._initialized)
"""
    assert run(code) == "False\n"


def test_the_operators_are_registered_once_fastattn_is_imported():
    code = "import torch, fastattn\nprint(torch.ops.fastattn.attention_forward, torch.ops.fastattn.attention_backward)"
    assert "fastattn.attention_forward" in run(code)


# -------------------------------------------------------------------------------------------------- python -m fastattn

REPORT = "import runpy; runpy.run_module('fastattn', run_name='__main__')"


def test_report_says_what_a_bug_report_needs():
    """Whoever reads a report must not have to ask for the versions, the device, the choice or the settings."""
    said = run(REPORT, FASTATTN_BACKEND="auto", FASTATTN_KERNELS="triton", TRITON_CACHE_DIR="/nowhere/at all")
    assert f"fastattn {fastattn.__version__} in " in said
    assert f"torch {torch.__version__}" in said
    assert f"python {sys.version.split()[0]} " in said
    assert "no GPU" in said
    assert "\n  torch: " in said
    assert "\n  not triton: " in said
    assert "FASTATTN_BACKEND='auto' FASTATTN_KERNELS='triton'" in said
    if importlib.util.find_spec("triton") is not None:
        assert "its cache is /nowhere/at all (which does not exist yet)" in said
    assert len(said.splitlines()) < 15


def test_report_says_that_a_backend_asked_for_by_name_refuses():
    said = run(REPORT, FASTATTN_BACKEND="triton")
    assert "no backend would run\n  not triton: " in said


def test_report_works_without_triton():
    said = run(HIDE_TRITON + REPORT)
    assert "triton is not installed\n" in said
    assert "not triton: triton is not installed" in said


def test_report_works_where_triton_cannot_be_imported():
    """Then attention itself can only raise: the report has to be made nevertheless, and to name the cause."""
    said = run(BREAK_TRITON + REPORT)
    assert "triton cannot be imported: ImportError(" in said
    assert "environment: " in said


def test_report_lists_every_gpu(monkeypatch):
    one = types.SimpleNamespace(name="Some GPU", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: one)
    monkeypatch.setattr(torch.version, "hip", None)
    lines = [f"cuda:{index}: Some GPU, capability 9.0, 80 GiB, 132 multiprocessors" for index in (0, 1)]
    assert [line for line in report.devices() if line.startswith("cuda")] == lines


# ------------------------------------------------------------------------------------------------------- public names

PUBLIC = [(module.__name__, name) for module in (fastattn, distributed, reference, testing) for name in module.__all__]


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_name_exists_and_has_a_docstring(module, name):
    value = getattr(sys.modules[module], name)
    if callable(value) and (inspect.isfunction(value) or inspect.isclass(value)):
        documented = inspect.getdoc(value)
        assert documented, f"{module}.{name} has no docstring"
        assert not documented.startswith(f"{name}("), f"{module}.{name} has only the generated docstring"
    else:
        assert name.isupper() or "Literal" in str(value)


def test_package_is_typed_and_versioned():
    from importlib import resources

    assert resources.files("fastattn").joinpath("py.typed").is_file()
    assert fastattn.__version__.count(".") == 2
