"""What the site reads out of the package's docstrings (an extension of griffe, which mkdocstrings runs).

Sphinx's roles, as ``:func:`fastattn.explain```, become links. A public function whose name is that of a folder, too, is
found: ``fastattn.attention`` is the function, but in ``fastattn.ops`` griffe takes the folder ``attention`` for it.
"""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")


def _link(role: re.Match[str]) -> str:
    """To the name's place on a page, where one shows it; else the name alone."""
    name = role[1]
    identifier = name if name.startswith("fastattn.") else f"fastattn.{name}"
    return f'<autoref identifier="{identifier}" optional><code>{name}</code></autoref>'


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed, and sets the public names right."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Called once the package is loaded."""
        for name, path in pkg.imports.items():
            module, _, member = path.rpartition(".")
            imports = loader.modules_collection[module].imports if module.startswith(pkg.path) else {}
            pkg.set_member(name, griffe.Alias(name, imports.get(member, path), parent=pkg))
