"""How the modules of the kernels depend on one another: families over ``common``. Circles: test_import_graph.py."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "kernels" / "fastattn_kernels"
FAMILIES = ("attention", "residual_norm", "additive_attention")
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[tuple[str, str]]:
    """``(module, name)`` of everything that a module imports from this package."""
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [
        (node.module, alias.name)
        for node in found
        if node.module and node.module.split(".")[0] == PACKAGE.name
        for alias in node.names
    ]


def family_of(module: str) -> str:
    return (module.split(".") + [""])[1]


def test_families_import_none_but_themselves_and_common():
    assert {family_of(name_of(path)) for path in MODULES} == {"", "common", *FAMILIES}
    for path in MODULES:
        own = family_of(name_of(path))
        allowed = {"common"} if own in ("", "common") else {"common", own}
        for module, name in imports_of(path):
            imported = family_of(f"{module}.{name}")
            assert imported in allowed, f"{name_of(path)} imports {module}.{name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_private_names_stay_in_their_module(path):
    assert not [name for _, name in imports_of(path) if name.startswith("_")]
