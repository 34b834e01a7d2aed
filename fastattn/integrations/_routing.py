"""Calls of somebody else's attention that run on this package where it takes them, and what is counted of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from fastattn.ops import scaled_dot_product_attention
from fastattn.ops.common.short_way import is_plain


class Routing:
    """What has become of calls that were to run on this package.

    Attributes:
        routed: calls that did.
        traced: calls that ``torch.compile`` traced into a graph, which calls ours from then on, uncounted.
        refused: calls that ran where they would have run without us, by the reason why.
    """

    def __init__(self) -> None:
        self.routed = 0
        self.traced = 0
        self.refused: Counter[str] = Counter()

    def __str__(self) -> str:
        lines = [f"{self.routed} calls on fastattn, {self.traced} traced, {self.refused.total()} to torch"]
        return "\n".join([*lines, *(f"  {count} to torch: {reason}" for reason, count in self.refused.most_common())])

    def attend(self, *arguments: Any, **words: Any) -> Tensor | None:
        """:func:`fastattn.scaled_dot_product_attention` of these, or None where it refuses them; either is counted."""
        reason = "a tensor of another class than torch.Tensor"
        if are_plain(*arguments[:3]):
            try:
                output = scaled_dot_product_attention(*arguments, **words)
            except (TypeError, ValueError, NotImplementedError) as refusal:  # before anything was computed
                reason = str(refusal)
            else:
                self.routed += 1
                return output
        self.refused[reason] += 1
        return None


def are_plain(*tensors: object) -> bool:
    """Other classes have an attention of their own, or are traced: torch's function hands them on."""
    return all(is_plain(tensor) for tensor in tensors)


def constant_in_graphs(function: Any) -> Any:
    """All that ``torch.compiler.assume_constant_result`` does, but for importing Dynamo, and triton with it."""
    function._dynamo_marked_constant = True
    return function
