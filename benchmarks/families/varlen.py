"""The family ``varlen``: a batch of sequences of unequal length, packed behind one another, or padded to the longest.

Lengths are drawn uniformly from 1 to the longest. The padded variants are given the batch padded already, and mask the
padding: what packing and padding take is nobody's here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.families.peers import cannot_compile, compiled
from benchmarks.variants import Family, Step, Variant, Work, differentiated
from fastattn import attention_varlen
from fastattn.reference import attention_varlen as reference

Attend = Callable[..., tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class VarlenCase(Case):
    """Self-attention within each sequence. ``backward`` is a training step: forward and backward.

    Attributes:
        batch: sequences.
        heads: of queries, keys and values.
        longest: the most rows that a sequence may have.
        head_dim: size of a head.
        causal: whether a row sees only the keys up to its own.
    """

    batch: int
    heads: int
    longest: int
    head_dim: int
    causal: bool = False

    @property
    def name(self) -> str:
        """As in ``varlen-b16-h8-l512-d64-train-causal-float32``."""
        step = "train" if self.backward else "eval"
        parts = [self.family, f"b{self.batch}", f"h{self.heads}", f"l{self.longest}", f"d{self.head_dim}", step]
        return "-".join([*parts, *["causal"] * self.causal, self.dtype_name])

    def tiny(self) -> VarlenCase:
        return dataclasses.replace(self, batch=2, heads=1, longest=4, head_dim=4)

    def lengths(self) -> Tensor:
        """int64 ``[N]``, on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(1, self.longest + 1, (self.batch,), generator=generator)

    def offsets(self) -> Tensor:
        """int32 ``[N + 1]``."""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths().cumsum(0)]).to(self.device, torch.int32)

    def kept(self) -> Tensor:
        """Boolean ``[N, longest]``: what is no padding."""
        return (torch.arange(self.longest) < self.lengths()[:, None]).to(self.device)

    def padded(self, packed: Tensor) -> Tensor:
        """``[T, H, D]`` as ``[N, H, longest, D]``, zero where there is padding."""
        whole = packed.new_zeros(self.batch, self.longest, *packed.shape[1:])
        whole[self.kept()] = packed
        return whole.transpose(1, 2).contiguous()

    def packed(self, padded: Tensor) -> Tensor:
        """The opposite of :meth:`padded`."""
        return padded.transpose(1, 2)[self.kept()]


def _inputs(case: VarlenCase, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value, packed."""
    generator, shape = case.generator(), (int(case.lengths().sum()), case.heads, case.head_dim)
    return tuple(case.draw(*shape, dtype=dtype, generator=generator) for _ in range(3))


def _packed(make: Callable[[VarlenCase], Attend]) -> Callable[[VarlenCase, torch.dtype], Step]:
    def build(case: VarlenCase, dtype: torch.dtype) -> Step:
        return differentiated(make(case), _inputs(case, dtype), case)

    return build


def _padded(make: Callable[[VarlenCase], Attend]) -> Callable[[VarlenCase, torch.dtype], Step]:
    """A step on the padded batch; the gradient of the output is that of the packed one, zero where there is padding."""

    def build(case: VarlenCase, dtype: torch.dtype) -> Step:
        inputs = _inputs(case, dtype)
        d_output = case.padded(case.draw(*inputs[0].shape, dtype=dtype, generator=case.generator(1)))
        return differentiated(make(case), tuple(case.padded(t).detach() for t in inputs), case, d_output)

    return build


def _ours(case: VarlenCase) -> Attend:
    offsets = case.offsets()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        output = attention_varlen(query, key, value, offsets, is_causal=case.causal)
        assert isinstance(output, Tensor)
        return (output,)

    return attend


def _definition(case: VarlenCase) -> Attend:
    offsets, upper = case.offsets(), 0 if case.causal else None
    return lambda query, key, value: (reference(query, key, value, offsets, offsets, upper=upper).output,)


def _torch_varlen(case: VarlenCase) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    offsets, window = case.offsets(), (-1, 0) if case.causal else (-1, -1)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        longest = case.longest
        output = varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=window)
        assert isinstance(output, Tensor)
        return (output,)

    return attend


def _torch_varlen_applies(case: VarlenCase) -> str | None:
    if torch.device(case.device).type != "cuda":
        return "torch's varlen_attn runs on a GPU alone"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn"
    return None if case.dtype.itemsize == 2 else "torch's varlen_attn takes 16 bits alone"


def _flash_attn(case: VarlenCase) -> Attend:
    from flash_attn import flash_attn_varlen_func  # ty: ignore[unresolved-import]  # pyrefly: ignore[missing-import]

    offsets, longest = case.offsets(), case.longest
    return lambda *qkv: (flash_attn_varlen_func(*qkv, offsets, offsets, longest, longest, causal=case.causal),)


def _flash_attn_applies(case: VarlenCase) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return _torch_varlen_applies(case)


def _sdpa(case: VarlenCase) -> Attend:
    mask = case.kept()[:, None, None]
    if case.causal:
        mask = mask & torch.ones(case.longest, case.longest, dtype=torch.bool, device=mask.device).tril()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (F.scaled_dot_product_attention(query, key, value, mask),)

    return attend


def _sdpa_one_by_one(case: VarlenCase) -> Attend:
    lengths = case.lengths().tolist()

    def attend(*qkv: Tensor) -> tuple[Tensor, ...]:
        sequences = zip(*(t.transpose(0, 1)[None].split(lengths, 2) for t in qkv))
        outputs = [F.scaled_dot_product_attention(*each, is_causal=case.causal) for each in sequences]
        return (torch.cat([output[0].transpose(0, 1) for output in outputs]),)

    return attend


def _flex(case: VarlenCase) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    offsets = case.offsets()
    rows = int(offsets[-1])
    documents = torch.repeat_interleave(torch.arange(case.batch), case.lengths()).to(case.device)

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        same = documents[row] == documents[key]
        return same & (key <= row) if case.causal else same

    mask = create_block_mask(visible, 1, None, rows, rows, device=case.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        query, key, value = (t.transpose(0, 1).contiguous()[None] for t in (query, key, value))
        output: Any = flex_attention(query, key, value, block_mask=mask)
        return (output[0].transpose(0, 1),)

    return compiled(attend)


def _flex_applies(case: VarlenCase) -> str | None:
    if torch.device(case.device).type == "cpu":
        return "on a CPU Inductor fails to lower FlexAttention over packed documents, and it has no backward"
    return cannot_compile(case)


def _comparable(case: VarlenCase, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Packed, whichever way they were computed."""
    return tuple(case.packed(t) if t.dim() == 4 else t for t in results)


def work(case: VarlenCase, variant: str) -> Work:
    """What the sequences themselves take, whatever padding a variant computes: two products of all pairs forward, five
    more backward, and every tensor that comes in or goes out once."""
    lengths = case.lengths()
    pairs = int((lengths * (lengths + 1) // 2 if case.causal else lengths * lengths).sum()) * case.heads
    products, tensors = (7, 8) if case.backward else (2, 4)
    return Work(
        flops=float(2 * products * pairs * case.head_dim),
        moved_bytes=tensors * int(lengths.sum()) * case.heads * case.head_dim * case.dtype.itemsize,
        formula=f"operations {2 * products} H D sum(l^2{' / 2' if case.causal else ''}); bytes {tensors} T H D",
    )


FAMILY = Family(
    "varlen",
    (
        Variant("fastattn", _packed(_ours)),
        Variant("sdpa-padded", _padded(_sdpa)),
        Variant("sdpa-each", _packed(_sdpa_one_by_one)),
        Variant("varlen_attn", _packed(_torch_varlen), _torch_varlen_applies),
        Variant("flash-attn", _packed(_flash_attn), _flash_attn_applies),
        Variant("flex-documents", _packed(_flex), _flex_applies, slow=True),
    ),
    peer="sdpa-padded",
    reference=_packed(_definition),
    comparable=_comparable,
    work=work,
)


def quick_cases() -> list[VarlenCase]:
    """Two small ones: an evaluation and a training step."""
    return [VarlenCase("varlen", 8, 4, 128, 32, backward=backward) for backward in (False, True)]


def more_cases() -> list[VarlenCase]:
    """Short and long sentences, causal too."""
    return [
        VarlenCase("varlen", 16, 8, longest, 64, causal, backward=backward)
        for longest in (128, 512)
        for causal in (False, True)
        for backward in (False, True)
    ]
