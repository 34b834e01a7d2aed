"""Who imports whom, read from the sources: no circles, floors downward, and no family of operators imports another."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("attention", "residual_norm", "additive_attention")
# Of the floors, each may import those in front of it.
FLOORS = ("reference", "ops", "modules", "models", "distributed", "integrations")


def modules_under(folder: Path, name: str) -> dict[str, Path]:
    """The modules of a package, by their names."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = {
    **modules_under(ROOT / "fastattn", "fastattn"),
    **modules_under(ROOT / "kernels" / "fastattn_kernels", "fastattn_kernels"),
    **modules_under(ROOT / "benchmarks", "benchmarks"),
}


def imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """``(module, name)`` of every import in a source, those inside functions too; the name is empty of ``import x``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


@functools.cache
def graph() -> dict[str, set[str]]:
    """For each module, the modules of these packages that it imports."""
    found = {}
    for module, path in MODULES.items():
        targets = (
            f"{source}.{name}" if f"{source}.{name}" in MODULES else source for source, name in imported_names(path)
        )
        found[module] = {target for target in targets if target in MODULES}
    return found


def circle_in(imports: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or nothing where there is none."""
    finished: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in finished:
            for target in sorted(imports[module]):
                if circle := search(target, [*path, module]):
                    return circle
            finished.add(module)
        return []

    return next((circle for module in sorted(imports) if (circle := search(module, []))), [])


@pytest.mark.parametrize("package", ["fastattn", "fastattn_kernels", "benchmarks"])
def test_package_has_no_import_circle(package):
    """A circle makes what a module sees depend on who was imported first. An import inside a function counts."""
    imports = {module: targets for module, targets in graph().items() if module.partition(".")[0] == package}
    inside = {module: {target for target in targets if target in imports} for module, targets in imports.items()}
    assert circle_in(inside) == []


def test_a_circle_is_noticed():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("family", [*FAMILIES, "common"])
def test_family_of_operators_imports_no_other(family):
    """What two families share lies in ``fastattn.ops.common``, which imports none of them."""
    own, common = f"fastattn.ops.{family}.", "fastattn.ops.common."
    modules = [module for module in MODULES if module.startswith(own)]
    assert modules, f"there is no family {family}"
    others = {
        f"{module} imports {target}"
        for module in modules
        for target in graph()[module]
        if target.startswith("fastattn.ops.") and not target.startswith((own, common))
    }
    assert others == set()


def test_every_family_of_operators_is_known():
    """A new family is to be listed above."""
    folders = {path.parent.name for path in (ROOT / "fastattn" / "ops").glob("*/*.py")}
    assert folders == {*FAMILIES, "common"}


@pytest.mark.parametrize("package", ["fastattn", "kernels/fastattn_kernels"])
def test_every_folder_of_modules_is_a_package(package):
    """Without an ``__init__.py`` a folder can be imported here, but setuptools leaves it out of a wheel."""
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("floor", FLOORS)
def test_floor_imports_downward_only(floor):
    above = tuple(f"fastattn.{name}" for name in FLOORS[FLOORS.index(floor) + 1 :])
    upward = {
        f"{module} imports {target}"
        for module, targets in graph().items()
        if module.startswith(f"fastattn.{floor}")
        for target in targets
        if above and target.startswith(above)
    }
    assert upward == set()


def test_nobody_outside_imports_a_private_name_of_the_operators():
    """An underscore says that a name may change without a look at others."""
    folders = ("fastattn", "kernels", "benchmarks", "tests")
    private = {
        f"{path.relative_to(ROOT)} imports {name} of {module}"
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "fastattn" / "ops")
        for module, name in imported_names(path)
        if module.startswith("fastattn.ops") and any(part.startswith("_") for part in f"{module}.{name}".split("."))
    }
    assert private == set()


def test_no_module_of_the_operators_is_private():
    assert [m for m in MODULES if m.startswith("fastattn.ops.") and "._" in m] == []
