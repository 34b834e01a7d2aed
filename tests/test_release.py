"""What a release is made of says one thing: versions, metadata, extras, the hooks, the form for reports."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fastattn
from tests import compat, wheel

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no tomllib, and tomli is not installed")

yaml: Any = pytest.importorskip("yaml", reason="PyYAML, which pre-commit brings, is not installed")

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def test_version_is_read_from_the_package_without_importing_it():
    """Setuptools falls back to importing a module of which it cannot read the assignment, and then needs torch."""
    code = """
import runpy, sys
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py")
print("torch" in sys.modules)
"""
    said = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert said.split() == [fastattn.__version__, "False"]


def test_version_has_one_home_and_the_citation_repeats_it():
    assert "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fastattn.__version__
    assert citation["license"] == PROJECT["license"]
    # What version 1.2.0 of the format asks for.
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_changelog_has_the_version_or_leads_to_it():
    """The newest heading is of what is not released yet, or of this version with its day."""
    newest = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", CHANGELOG, re.MULTILINE)[0]
    assert newest == ("Unreleased", "") or (newest[0] == fastattn.__version__ and newest[1])


def test_classifiers_name_the_pythons_that_are_tried():
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in PROJECT["classifiers"]]
    pythons = [match[1] for match in named if match]
    assert pythons == [pair.python for pair in compat.PAIRS]
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert all(allowed.contains(f"{python}.0") for python in pythons)
    assert not allowed.contains("3.9.0")


def test_floors_are_the_oldest_releases_that_are_tried():
    floors = {requirement.name: requirement.specifier for requirement in map(Requirement, PROJECT["dependencies"])}
    oldest = compat.PAIRS[0]
    for name, version in (("torch", oldest.torch), ("triton", oldest.triton)):
        assert version is not None
        assert floors[name].contains(version)
        assert version.startswith(str(floors[name]).removeprefix(">="))


def test_every_extra_that_a_message_or_page_names_exists():
    extras = PROJECT["optional-dependencies"]
    sources = [*(ROOT / "fastattn").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *ROOT.glob("*.md")]
    sources += (ROOT / "docs").rglob("*.md")
    named = {
        extra.strip()
        for path in sources
        for found in re.findall(r"fastattn\[([\w, ]+)\]", path.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    assert "hf" in named
    assert named <= extras.keys()


def test_the_extra_of_transformers_has_the_floor_that_register_has():
    (requirement,) = map(Requirement, PROJECT["optional-dependencies"]["hf"])
    source = (ROOT / "fastattn" / "integrations" / "transformers" / "registration.py").read_text()
    (floor,) = set(re.findall(r"fastattn works with ([\d.]+) or newer", source))
    assert str(requirement) == f"transformers>={floor}"


def test_hooks_are_the_commands_of_make_lint():
    """The tools of .venv have the versions of constraints.txt; a hook with its own would disagree with it one day."""
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^lint: .*\n((?:\t.+\n)+)", makefile, re.MULTILINE)[0].replace("$(BIN)", ".venv/bin")
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = repos[0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [line.strip() for line in commands.splitlines()]
    assert {hook["language"] for hook in hooks} == {"system"}


def test_form_for_bugs_asks_for_the_report():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text())
    asked = [field for field in form["body"] if "python -m fastattn" in field["attributes"].get("label", "")]
    assert len(asked) == 1
    assert asked[0]["validations"]["required"]


def test_what_the_wheel_lacks_or_has_too_much_is_named(tmp_path):
    """`make wheel` looks into the wheel; what it would say is tried here on an archive with one file."""
    made = tmp_path / "made.whl"
    with wheel.zipfile.ZipFile(made, "w") as archive:
        archive.writestr("fastattn/py.typed", "")
        archive.writestr("tests/compat.py", "")
    complaints = list(wheel.missing_in_wheel(made))
    assert "made.whl has no fastattn/__init__.py" in complaints
    assert "made.whl has no fastattn_kernels/py.typed" in complaints
    assert "made.whl has tests/compat.py, which is not in the sources" in complaints
    assert not any("fastattn/py.typed" in line or ".pyc" in line for line in complaints)
