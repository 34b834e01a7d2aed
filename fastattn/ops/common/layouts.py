"""The sentence for tensors whose elements do not lie side by side in one block of memory."""

from __future__ import annotations

import torch
from torch import Tensor


def check_dense(name: str, tensor: Tensor, accepted: str = "a dense tensor") -> None:
    """Raise TypeError for a nested tensor of sequences one behind the other, or a sparse one.

    Nested tensors of the layout ``torch.jagged`` pass: they are a dense tensor inside, and overload what is done to it.
    """
    if tensor.is_nested and tensor.layout is not torch.jagged:
        raise TypeError(
            f"{name} is a nested tensor: expected {accepted}; {name}.to_padded_tensor(0.0), with the padding in a "
            "mask, is one"
        )
    if tensor.layout not in (torch.strided, torch.jagged):
        raise TypeError(f"{name} has the layout {tensor.layout}: expected {accepted}; {name}.to_dense() is one")
