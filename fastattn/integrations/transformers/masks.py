"""The mask function: numbers and padding in place of ``[B, 1, L, S]`` booleans, where a model's mask is made of such.

transformers describes a mask by a function of indices, ``mask_function(batch, head, query, key)``, composed of a few
known ones. Those are recognised here, and what they stand for goes to the kernels as it is. Any other function, one
that a model or a user wrote, gives the exact mask that the "sdpa" implementation gets.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import masking_utils

from fastattn.ops.common.tracing import is_functorch_active

Integer = int | Tensor
MaskFunction = Callable[..., Any]  # of the indices of batch, head, query and key


class LazyMask(Tensor):
    """A boolean mask ``[B, 1, L, S]`` (True = may attend) that keeps what it is made of and has no elements.

    Attention of this package reads :attr:`words`. Whatever else is done to it, by a model that cuts, joins or compares
    masks, makes the exact mask first: transformers' own. Adding it raises: only code that expects numbers would.

    Attributes:
        words: the keyword arguments of :func:`fastattn.attention` that say the same.
        keys: so many keys are seen at all, the first ones. ``words`` are about those alone.
        kept: the exact mask, once somebody took a view of it or wrote to it: from then on it counts, and not ``words``.
    """

    words: dict[str, Any]
    keys: int
    kept: Tensor | None
    _arguments: dict[str, Any]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[bad-override]

    @staticmethod
    def __new__(cls, words: dict[str, Any], keys: int, arguments: dict[str, Any]) -> LazyMask:
        """A mask of which transformers would make the exact one by these arguments."""
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=arguments["device"])
        self.words, self.keys, self.kept, self._arguments = words, keys, None, arguments
        return self

    def exact(self) -> Tensor:
        """The mask as transformers makes it, ``[B, 1, L, S]``."""
        return exact_mask(**self._arguments) if self.kept is None else self.kept

    @classmethod
    def __torch_dispatch__(  # type: ignore[bad-override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func is torch.ops.aten.alias.default:  # torch refuses a view that is the tensor itself
            mask = args[0]
            same = LazyMask(mask.words, mask.keys, mask._arguments)
            same.kept = mask.kept
            return same
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            raise ValueError(
                "a boolean mask (True = may attend) is added to scores: this layer attends by itself and does not ask "
                'for attention by its name; load the model with attn_implementation="eager"'
            )
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            for mask in args:
                if isinstance(mask, LazyMask):
                    mask.kept = mask.exact()
        return func(*tree_map(_made, args), **tree_map(_made, kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyMask:
        return self

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.exact().__reduce_ex__(proto)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyMask({tuple(self.shape)}, {self.words}, keys={self.keys})"


def _made(value: Any) -> Any:
    return value.exact() if isinstance(value, LazyMask) else value


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Integer = 0,
    kv_offset: Integer = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask of all layers of one kind of a model, as transformers asks its registered mask functions for it.

    Args:
        batch_size: ``B``.
        q_length: ``L``.
        kv_length: ``S``, the keys that attention will get.
        q_offset: the position of the first query; a tensor with static caches.
        kv_offset: the position of the first key.
        mask_function: may query ``q`` see key ``k``, both by their positions?
        attention_mask: boolean ``[B, at most kv_offset + S]``, True = no padding. Positions behind its end are padding.
        local_size: the size of windows and chunks, which ``mask_function`` has too.
        allow_is_causal_skip: may a causal mask be None?
        allow_is_bidirectional_skip: may a mask without causality be None?
        use_vmap: can ``mask_function`` be called on one index at a time alone?
        device: of the mask.

    Returns:
        None for one query that sees all keys, and in a graph that is being traced where all keys are seen, or all up to
        the query's own: elsewhere layers would ask None for their own causality and window. Padding ``[B, 1, 1, S]``
        expanded to ``[B, 1, L, S]`` in the same two cases. Else a :class:`LazyMask`, or the exact ``[B, 1, L, S]``.
    """
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": torch.device(device),
    }
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    static = isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor)
    if static and (traced or q_length == 1):
        return exact_mask(**arguments)
    if static:  # a static cache goes on counting in the same tensors, while the exact mask may be made later
        arguments |= {"q_offset": int(q_offset), "kv_offset": int(kv_offset)}
    offset = int(q_offset) - int(kv_offset)
    pattern = _known(mask_function) if traced else _recognised(mask_function)
    if pattern is None:
        return exact_mask(**arguments)
    pattern = pattern.without_what_hides_nothing(offset, q_length, kv_length)
    looks = not traced and not is_functorch_active() and torch.device(device).type != "meta"
    visible = _visible_keys(attention_mask, int(kv_offset), kv_length, looks=looks)
    causal, local = pattern.right == 0, pattern.left is not None or pattern.right not in (None, 0)
    if not causal and not local and pattern.documents is None and (traced or q_length == 1):
        if visible is None:
            may_skip = allow_is_bidirectional_skip or (allow_is_causal_skip and q_length == 1)
            visible = None if may_skip else torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        return None if visible is None else visible[:, None, None, :].expand(batch_size, 1, q_length, kv_length)
    if traced:
        skips = causal and not local and visible is None and offset == 0 and q_length == kv_length
        return None if skips and allow_is_causal_skip else exact_mask(**arguments)
    seen = kv_length if pattern.right is None else min(kv_length, offset + q_length + pattern.right)
    start = int(kv_offset)
    keys = torch.arange(start, start + seen, device=device)
    words = pattern.words(torch.arange(start + offset, start + offset + q_length, device=device), keys, offset)
    if words is None:
        return exact_mask(**arguments)
    if visible is not None:
        words["key_padding_mask"] = ~visible[:, :seen].expand(batch_size, seen)
    return LazyMask(words, seen, arguments)


def exact_mask(**arguments: Any) -> Tensor:
    """transformers' own mask, element by element."""
    mask = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    assert isinstance(mask, Tensor)
    return mask


def _visible_keys(padding: Tensor | None, offset: int, length: int, *, looks: bool) -> Tensor | None:
    """``[B, S]``, True = no padding, of the keys alone; None where there is no padding, for which the numbers are read
    (as the "sdpa" implementation does) if it ``looks``."""
    if padding is None:
        return None
    missing = offset + length - padding.shape[-1]
    if missing > 0:
        padding = torch.nn.functional.pad(padding, (0, missing))
    visible = padding[:, offset : offset + length]
    return None if looks and bool(visible.all()) else visible


# ---------------------------------------------------------------------------------------------- recognising a function


class Pattern(NamedTuple):
    """The query at position ``p`` sees keys at ``p - left`` to ``p + right`` (None: no limit) of its own document."""

    left: int | None = None
    right: int | None = None
    documents: Callable[[Tensor], Tensor] | None = None  # ids [B, n] of n positions

    def and_(self, other: Pattern) -> Pattern | None:
        """What both allow; None where two kinds of documents meet."""
        if self.documents is not None and other.documents is not None:
            return None
        sides = (self.left, other.left), (self.right, other.right)
        left, right = (min((limit for limit in side if limit is not None), default=None) for side in sides)
        return Pattern(left, right, other.documents if self.documents is None else self.documents)

    def without_what_hides_nothing(self, offset: int, queries: int, keys: int) -> Pattern:
        """The same for ``queries`` that stand at keys ``offset``, ``offset + 1``, ... of ``keys``."""
        reaches_first = self.left is not None and self.left >= offset + queries - 1
        reaches_last = self.right is not None and offset + self.right >= keys - 1
        return self._replace(left=None if reaches_first else self.left, right=None if reaches_last else self.right)

    def words(self, queries: Tensor, keys: Tensor, offset: int) -> dict[str, Any] | None:
        """The arguments of :func:`fastattn.attention` for these positions of queries and keys, the first query
        ``offset`` behind the first key; None where they have no words for it."""
        words: dict[str, Any] = {}
        if self.left is not None or self.right is not None:
            if offset not in (0, len(keys) - len(queries)):
                return None
            words["causal_alignment"] = "top_left" if offset == 0 else "bottom_right"
            words |= {"is_causal": True} if self.right == 0 else {"window": (self.left, self.right)}
            if self.right == 0 and self.left is not None:
                words["window"] = (self.left, None)
        if self.documents is not None:
            words["document_ids"] = self.documents(queries), self.documents(keys)
        return words


def _known(mask_function: MaskFunction) -> Pattern | None:
    """The pattern of a function that has no arguments of its own."""
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(right=0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern()
    return None


def _recognised(mask_function: MaskFunction) -> Pattern | None:
    """The pattern that ``mask_function`` describes, or None where it is not made of what transformers has.

    What a function was made with is read from its closure: transformers has no other description of it.
    """
    pattern = _known(mask_function)
    if pattern is not None:
        return pattern
    made_by, values = _maker(mask_function)
    if made_by == "and_masks":
        return _conjunction(values["mask_functions"])
    if made_by == "sliding_window_overlay":
        return Pattern(left=int(values["sliding_window"]) - 1)
    if made_by == "sliding_window_bidirectional_overlay":
        return Pattern(left=int(values["sliding_window"]), right=int(values["sliding_window"]))
    if made_by == "chunked_overlay":
        size, padding = values["chunk_size"], values["left_padding"]
        return Pattern(documents=lambda positions: (positions - padding[:, None]) // size)
    return None


def _conjunction(functions: tuple[MaskFunction, ...]) -> Pattern | None:
    """The pattern that is allowed by all of the functions.

    Packed sequences come as a pair: one function compares the sequences of query and key, the other has the positions
    inside a sequence in place of those in the row. Between two tokens of one sequence both have the same distance.
    """
    makers = [_maker(function)[0] for function in functions]
    packed = "packed_sequence_mask_function" in makers
    pattern: Pattern | None = Pattern()
    for function, made_by in zip(functions, makers):
        found = None
        values = _maker(function)[1]
        if made_by == "packed_sequence_mask_function":
            found = Pattern(documents=lambda positions, ids=values["packed_sequence_mask"]: ids[:, positions])
        elif made_by == "remap_positions_for_packed_sequence" and packed:
            found = _recognised(values["mask_function"])
            found = None if found is None or found.documents is not None else found
        elif made_by != "remap_positions_for_packed_sequence":
            found = _recognised(function)
        pattern = None if pattern is None or found is None else pattern.and_(found)
    return pattern


def _maker(function: MaskFunction) -> tuple[str, dict[str, Any]]:
    """Which function of transformers made this one, and with which values; an empty name where none that is known."""
    code = getattr(function, "__code__", None)
    made_by = _MAKERS.get(code) if code is not None else None
    if code is None or made_by is None:
        return "", {}
    return made_by, dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


def _code_of_what_it_makes(made_by: str) -> CodeType:
    """The code that all functions made by this one share: among its constants, that with the four indices."""
    constants = getattr(masking_utils, made_by).__code__.co_consts
    return next(code for code in constants if isinstance(code, CodeType) and code.co_argcount == 4)


_MAKERS = {
    _code_of_what_it_makes(name): name
    for name in (
        "and_masks",
        "chunked_overlay",
        "packed_sequence_mask_function",
        "remap_positions_for_packed_sequence",
        "sliding_window_bidirectional_overlay",
        "sliding_window_overlay",
    )
    if hasattr(masking_utils, name)
}
