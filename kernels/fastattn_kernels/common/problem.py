"""What every attention kernel is told: the tensors and numbers of one call, as pointers with strides."""

import dataclasses

import torch
from torch import Tensor

from fastattn_kernels.attention.config import Load

# The kernel arguments that Triton must not look at: a new length is no reason to compile again.
RUN_TIME = ("heads", "group", "seqlen_q", "seqlen_k", "lower", "upper", "shift", "lists_per_batch", "lists_per_head")
# A pointer and its strides, or None: a tuple of kernel arguments.
Argument = tuple[object, ...] | None


def strided(tensor: Tensor | None) -> Argument:
    """The tensor and its strides, 0 on the axes of size 1: those broadcast, and nothing is expanded."""
    if tensor is None:
        return None
    strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, *strides)


def _as_tile(tensor: Tensor | None) -> Argument:
    """:func:`strided` of ``[B | 1, H | 1, L | 1, S | 1]``, the strides as a tuple of their own."""
    argument = strided(tensor)
    return None if argument is None else (argument[0], argument[1:])


def nested(*arguments: object) -> tuple[object, ...]:
    """A tuple of kernel arguments some of which are tuples: with None at its end.

    Triton 3.6 builds such a tuple anew inside every loop and branch, by a type that it derived when it last put in a
    value of the tuple's own: first those of run time, then the constants, each from left to right. A stride of 1 in a
    tuple is a constant, and is None in the loop if that was later. A constant at the end of the outer tuple is last.
    """
    return *arguments, None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call's inputs, already validated.

    Attributes:
        query: ``[B, H, L, D]``, float16, bfloat16 or float32, any strides; so are the next two.
        key: ``[B, Hk, S, D]``.
        value: ``[B, Hk, S, Dv]``.
        scale: multiplies the products of queries and keys.
        bias: ``[B | 1, H | 1, L | 1, S | 1]``, floating, added to the scores.
        slopes: ``[B | 1, H]``, floating: ``-slope * |i + shift - j|`` is added to the scores (ALiBi).
        sinks: ``[B | 1, H]``, floating: the logit of a key without a value that every row sees.
        mask: ``[B | 1, H | 1, L | 1, S | 1]``, boolean, True = may see.
        key_padding_mask: ``[B | 1, S]``, boolean, True = padding.
        query_documents: ``[B | 1, L]``, integer; a query sees only keys of its own document.
        key_documents: ``[B | 1, S]``.
        prefix: ``[B | 1]``, integer: so many first keys are seen whatever ``lower`` and ``upper`` say.
        lower: query ``i`` sees keys ``j >= i + lower``; None: no such bound.
        upper: query ``i`` sees keys ``j <= i + upper``; None: no such bound.
        shift: query ``i`` stands at key position ``i + shift``.
        softcap: scores become ``softcap * tanh(score / softcap)`` before anything is added; None: they stay.
        seed: int64 ``[2]`` on the device, seed and offset of the dropout; None: no dropout.
        dropout_p: the probability of dropping a weight.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    prefix: Tensor | None = None
    lower: int | None = None
    upper: int | None = None
    shift: int = 0
    softcap: float | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0

    @property
    def masks(self) -> list[Tensor]:
        """The tensors that hide keys, and that only looking tells of."""
        candidates = (self.mask, self.key_padding_mask, self.query_documents, self.key_documents)
        return [tensor for tensor in candidates if tensor is not None]

    def masks_pairs(self) -> bool:
        """Whether some query may see a key that another one, or nobody, may not.

        Then NaN or inf in what is masked out could leak as 0 * NaN, and a launch is followed by a careful one that does
        again, with 0 * NaN = 0, the tiles that are not finite. It exits at once where all are: a few microseconds,
        against a second, register-hungry loop in every kernel.
        """
        rows, last_key = self.query.shape[2], self.key.shape[2] - 1
        # a single row that sees every key, as in decoding, hides none
        below = self.lower is not None and (rows > 1 or self.lower > 0)
        above = self.upper is not None and (rows > 1 or self.upper < last_key)
        return bool(self.masks) or self.bias is not None or below or above

    def load(self, d_weights: "WeightsGradient | None" = None) -> Load:
        """What a tile of scores carries beside itself."""
        if self.seed is not None or d_weights is not None or self.softcap is not None:
            return "heavy"
        if self.bias is not None or self.slopes is not None:
            return "biased"
        hides = self.masks or self.prefix is not None or self.lower is not None
        return "masked" if hides else "plain"

    def rules(self) -> tuple[object, ...]:
        """The kernel argument ``rules``; ``masking`` tells what is in it."""
        padding = self.key_padding_mask
        documents = None
        if self.query_documents is not None:
            documents = (*(strided(self.query_documents) or ()), *(strided(self.key_documents) or ()))
        return nested(
            _as_tile(self.mask), _as_tile(self.bias), strided(padding), documents, strided(self.prefix),
            strided(self.slopes), self.softcap,
        )  # fmt: skip

    def sizes(self) -> tuple[int | None, ...]:
        """The kernel arguments ``heads, group, seqlen_q, seqlen_k, lower, upper, shift``."""
        heads, kv_heads = self.query.shape[1], self.key.shape[1]
        lengths = self.query.shape[2], self.key.shape[2]
        return heads, heads // max(kv_heads, 1), *lengths, self.lower, self.upper, self.shift

    def dropout(self) -> Argument:
        """The kernel argument ``dropout``."""
        return None if self.seed is None else (self.seed, self.dropout_p)


@dataclasses.dataclass(frozen=True)
class WeightsGradient:
    """The gradient of the returned weights.

    Attributes:
        tensor: ``[B, L, S]`` of averaged weights, or ``[B, H, L, S]``; floating, any strides.
        heads: ``H``.
        used: boolean ``[]`` on the device, False where ``tensor`` is all zeros, as a compiled graph gets it if no loss
            uses the weights; None: it is used. The host does not read it, which would wait for the device.
    """

    tensor: Tensor
    heads: int
    used: Tensor | None = None

    def only_if_used(self, expected: bool = True) -> Argument:
        """The kernel argument ``only_if``: a byte on the device, and what it has to be for the kernel to do anything;
        None: it runs in any case."""
        return None if self.used is None else (self.used.view(torch.uint8), int(expected))

    def argument(self) -> Argument:
        """The kernel argument ``d_weights``: pointer, four strides, and the share of a head. Averaged weights have head
        stride 0 and give each head 1 / H."""
        strides = self.tensor.stride()
        if self.tensor.dim() == 3:
            return self.tensor, strides[0], 0, *strides[1:], 1.0 / max(self.heads, 1)
        return self.tensor, *strides, 1.0
