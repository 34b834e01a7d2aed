"""Making this package known to transformers by a name."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

_held: dict[str, list[Registration]] = {}  # the registrations of each name that are not undone
_before: dict[str, list[tuple[dict[str, Any], Callable[..., Any] | None]]] = {}  # what had each name before the first


class Registration:
    """What :func:`register` returns. As a context manager it undoes that on leaving.

    Attributes:
        name: for ``attn_implementation``.
    """

    def __init__(self, name: str) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        from fastattn.integrations.transformers import support
        from fastattn.integrations.transformers.attention import attention_forward
        from fastattn.integrations.transformers.masks import attention_mask

        self.name = name
        interfaces = (AttentionInterface, attention_forward), (AttentionMaskInterface, attention_mask)
        if name not in _held:
            mappings = [interface._global_mapping for interface, _ in interfaces]
            _before[name] = [(functions, functions.get(name)) for functions in mappings]
        _held.setdefault(name, []).append(self)
        support.ask_about(name)
        for interface, function in interfaces:
            interface.register(name, function)

    def undo(self) -> None:
        """Forget the name, or give it back to what had it before, unless another registration holds it still.

        A second call does nothing. Models that are set to a name which is gone raise at their next call.
        """
        if self not in _held.get(self.name, []):
            return
        _held[self.name].remove(self)
        if _held[self.name]:
            return
        from fastattn.integrations.transformers import support

        del _held[self.name]
        support.forget(self.name)
        for functions, function in _before.pop(self.name):
            if function is None:
                functions.pop(self.name, None)
            else:
                functions[self.name] = function

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def register(name: str = "fastattn") -> Registration:
    """Let models of transformers (5.4 or newer) run on this package, by ``attn_implementation="fastattn"``.

    ::

        fastattn.integrations.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastattn")
        model.set_attn_implementation("fastattn")  # or later

    Which backend runs is said by :func:`fastattn.use_backend`, as everywhere. Of models that compute attention in their
    own layers, BLOOM, MPT, Falcon, MPNet and WavLM get forwards of this package for these; one that has none, and would
    misread masks that are made for this package, raises a ValueError where it is given the name.

    Args:
        name: another one than ``"fastattn"``. ``"sdpa"`` replaces what transformers has under this name, so that
            every model that was loaded with it runs on this package, continuous batching (``generate_batch``) too,
            which takes no other name. No name may contain ``"flash"``, by which transformers knows another protocol.

    Returns:
        A :class:`Registration`. Call its ``undo()``, or use it as a context manager; or forget it.

    Raises:
        ImportError: transformers is not installed, or older than 5.4.
        TypeError, ValueError: ``name`` is no such name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    if not name or "flash" in name or "|" in name or name == "eager":
        raise ValueError(f"name={name!r}: expected a name without 'flash' and '|' in it, and not 'eager'")
    try:
        from transformers import __version__ as version
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install 'fastattn[hf]'") from error
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < (5, 4):
        raise ImportError(f"transformers {version} is installed: fastattn works with 5.4 or newer")
    return Registration(name)
