"""The family ``decode``: one new token of each sequence attends to all that a cache holds of it, and is put into it.

A step writes the new keys and values into the cache and attends, as a layer does at each step of generation. All
variants hold the same tokens, in one block of memory for each sequence, or in pages that lie in random order.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.families.peers import cannot_compile, compiled
from benchmarks.variants import Family, Step, Variant, Work
from fastattn import attention_with_kvcache
from fastattn.reference import attention

Attend = Callable[["Tokens"], Tensor]


@dataclasses.dataclass(frozen=True)
class DecodeCase(Case):
    """One step of generation.

    Attributes:
        batch: sequences.
        heads: of the queries.
        kv_heads: of keys and values.
        held: tokens of each sequence that the cache holds after the step.
        head_dim: size of a head.
        page_size: slots of a page, in the variants that have pages.
    """

    batch: int
    heads: int
    kv_heads: int
    held: int
    head_dim: int
    page_size: int = 256

    @property
    def name(self) -> str:
        """As in ``decode-b8-h16-k4-s4096-d64-p256-float32``."""
        parts = [self.family, f"b{self.batch}", f"h{self.heads}", f"k{self.kv_heads}", f"s{self.held}"]
        return "-".join([*parts, f"d{self.head_dim}", f"p{self.page_size}", self.dtype_name])

    def tiny(self) -> DecodeCase:
        return dataclasses.replace(self, batch=1, heads=1, kv_heads=1, held=8, head_dim=4, page_size=4)


@dataclasses.dataclass
class Tokens:
    """What a step is given.

    Attributes:
        query: ``[B, H, 1, D]``.
        new: key and value of the new tokens, ``[B, Hk, 1, D]``.
        caches: of keys and of values, ``[B, Hk, S, D]``, or ``[pages, Hk, page_size, D]``.
        block_table: int32 ``[B, pages of a sequence]``, or None.
        before: int32 ``[B]``: how many tokens are held before the step.
    """

    query: Tensor
    new: tuple[Tensor, Tensor]
    caches: tuple[Tensor, Tensor]
    block_table: Tensor | None
    before: Tensor

    def append(self) -> None:
        """Put the new tokens behind the others of a contiguous cache."""
        for cache, new in zip(self.caches, self.new):
            cache[:, :, -1:] = new


def _tokens(case: DecodeCase, dtype: torch.dtype, paged: bool) -> Tokens:
    generator, rest = case.generator(), (case.kv_heads, case.head_dim)

    def draw(*shape: int) -> Tensor:
        return case.draw(*shape, dtype=dtype, generator=generator)

    query = draw(case.batch, case.heads, 1, case.head_dim)
    keys, values = (draw(case.batch, rest[0], case.held, rest[1]) for _ in range(2))
    new, table = (keys[:, :, -1:].clone(), values[:, :, -1:].clone()), None
    caches = keys, values
    for cache in caches:
        cache[:, :, -1] = torch.nan  # until a step writes the new token
    if paged:
        each = case.held // case.page_size
        order = torch.randperm(case.batch * each, generator=torch.Generator().manual_seed(case.seed)).to(case.device)
        table = order.argsort().view(case.batch, each).to(torch.int32)
        pages = (t.unflatten(2, (each, -1)).transpose(1, 2).flatten(0, 1)[order] for t in caches)
        caches = next(pages), next(pages)
    before = torch.full((case.batch,), case.held - 1, dtype=torch.int32, device=case.device)
    return Tokens(query, new, caches, table, before)


def _step(attend: Attend, *, paged: bool = False) -> Callable[[DecodeCase, torch.dtype], Step]:
    def build(case: DecodeCase, dtype: torch.dtype) -> Step:
        tokens = _tokens(case, dtype, paged)

        def step() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(tokens),)

        return step

    return build


def _definition(tokens: Tokens) -> Tensor:
    tokens.append()
    return attention(tokens.query, *tokens.caches).output


def _ours(tokens: Tokens) -> Tensor:
    words = {"cache_seqlens": tokens.before, "block_table": tokens.block_table}
    output = attention_with_kvcache(tokens.query, *tokens.caches, *tokens.new, **words)
    assert isinstance(output, Tensor)
    return output


def _sdpa(tokens: Tokens) -> Tensor:
    tokens.append()
    return F.scaled_dot_product_attention(tokens.query, *tokens.caches, enable_gqa=True)


def _sdpa_gathered(tokens: Tokens) -> Tensor:
    """What plain torch has to do about pages: copy them in order."""
    assert tokens.block_table is not None
    for cache, new in zip(tokens.caches, tokens.new):
        cache[tokens.block_table[:, -1], :, -1] = new[:, :, 0]
    keys, values = (cache[tokens.block_table].transpose(1, 2).flatten(2, 3) for cache in tokens.caches)
    return F.scaled_dot_product_attention(tokens.query, keys, values, enable_gqa=True)


def _flash_attn(tokens: Tokens) -> Tensor:
    from flash_attn import flash_attn_with_kvcache  # ty: ignore[unresolved-import]  # pyrefly: ignore[missing-import]

    query, key, value, *caches = (t.transpose(1, 2) for t in (tokens.query, *tokens.new, *tokens.caches))
    words = {"cache_seqlens": tokens.before, "block_table": tokens.block_table, "causal": True}
    return flash_attn_with_kvcache(query, *caches, key, value, **words).transpose(1, 2)


def _flash_attn_applies(case: DecodeCase) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return None if case.dtype.itemsize == 2 else "flash-attn takes 16 bits alone"


def _flash_attn_takes_pages(case: DecodeCase) -> str | None:
    if case.page_size % 256:
        return f"flash-attn takes pages of multiples of 256, and these have {case.page_size}"
    return _flash_attn_applies(case)


def _flex(case: DecodeCase, dtype: torch.dtype) -> Step:
    from torch.nn.attention.flex_attention import flex_attention

    attend = compiled(lambda query, keys, values: (flex_attention(query, keys, values, enable_gqa=True),))
    tokens = _tokens(case, dtype, paged=False)

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            tokens.append()
            return attend(tokens.query, *tokens.caches)

    return step


def work(case: DecodeCase, variant: str) -> Work:
    """Two products of each query with all tokens; every token of each sequence is read once."""
    held = case.batch * case.held * case.head_dim
    return Work(
        flops=4.0 * held * case.heads,
        moved_bytes=2 * held * case.kv_heads * case.dtype.itemsize,
        formula="operations 4 B H S D; bytes 2 B Hk S D",
    )


FAMILY = Family(
    "decode",
    (
        Variant("fastattn", _step(_ours)),
        Variant("fastattn-paged", _step(_ours, paged=True)),
        Variant("sdpa", _step(_sdpa)),
        Variant("sdpa-gathered", _step(_sdpa_gathered, paged=True)),
        Variant("flash-attn", _step(_flash_attn), _flash_attn_applies),
        Variant("flash-attn-paged", _step(_flash_attn, paged=True), _flash_attn_takes_pages),
        Variant("flex", _flex, cannot_compile, slow=True),
    ),
    peer="sdpa",
    reference=_step(_definition),
    work=work,
)


def quick_cases() -> list[DecodeCase]:
    """Few sequences that hold much, with a key head for each query head, and for every four."""
    return [DecodeCase("decode", 2, 8, kv_heads, 4096, 64) for kv_heads in (8, 2)]


def more_cases() -> list[DecodeCase]:
    """One sequence and many, pages from large to small."""
    cases = [DecodeCase("decode", 8, 8, kv_heads, 4096, 64, page) for kv_heads in (8, 2) for page in (256, 64, 16)]
    return [DecodeCase("decode", 1, 8, 8, 4096, 64), *cases]
