"""Tile maps: which tiles of an arbitrary mask are seen whole, in part or not at all, worked out on the device.

One kernel reads the masks once and writes, for every granule of 64 x 64 pairs, whether none, some or all of them are
visible. A second one turns that map into what a loop needs: for each tile of rows (or of keys) of a kernel's own size,
the list of tiles to visit. Both are small beside attention itself, and nothing is copied to the host. So every mask,
whatever its shape, costs only the tiles that it leaves visible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn_kernels.common.arguments import RUN_TIME, At, Sizes
from fastattn_kernels.common.config import Config
from fastattn_kernels.common.launch import launch
from fastattn_kernels.common.masking import visible
from fastattn_kernels.common.problem import Problem

GRANULE = 64
# A tile map costs two launches in each direction: with fewer granules than this it is quicker to visit them all.
FEWEST_GRANULES = 6
# Entries of the map that the list kernel reads at once.
_CHUNK = 64


@triton.jit(do_not_specialize=[*RUN_TIME, "map_heads"])
def _tile_map_kernel(
    map_ptr, rules, heads, group, seqlen_q, seqlen_k, lower, upper, shift, map_heads, GRANULE: tl.constexpr
):  # fmt: skip
    """One granule: 0 where nobody sees anything, 2 where every row sees every key, else 1."""
    granules_m = tl.cdiv(seqlen_q, GRANULE)
    granules_n = tl.cdiv(seqlen_k, GRANULE)
    pid = tl.program_id(0).to(tl.int64)
    batch_head = pid // granules_n // granules_m
    rows = (pid // granules_n % granules_m * GRANULE).to(tl.int32) + tl.arange(0, GRANULE)[:, None]
    cols = (pid % granules_n * GRANULE).to(tl.int32) + tl.arange(0, GRANULE)[None, :]
    at = At(batch_head // map_heads, batch_head % map_heads)
    seen = visible(rows, cols, at, Sizes(seqlen_q, seqlen_k, lower, upper, shift), rules).to(tl.int32)
    some = tl.max(tl.max(seen, axis=1), axis=0)
    every = tl.min(tl.min(seen, axis=1), axis=0)
    tl.store(map_ptr + pid, (some + every).to(tl.uint8))


@triton.jit(do_not_specialize=["own_granules", "other_granules", "tiles_own", "tiles_other", "heads_per_list"])
def _tile_lists_kernel(
    lists_ptr, map_ptr, own_granules, other_granules, tiles_own, tiles_other, heads_per_list,
    OWN: tl.constexpr, OTHER: tl.constexpr, GRANULE: tl.constexpr, OWN_IS_ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The list of one tile of OWN rows (or keys): counts of the tiles of OTHER keys (or rows) that are seen whole and
    in part, by any head that shares the list; the first from the front, the second from the back."""
    pid = tl.program_id(0).to(tl.int64)
    own = pid % tiles_own
    first_head = pid // tiles_own * heads_per_list  # of all batch entries'
    list_ptr = lists_ptr + pid * (2 + tiles_other)
    own_granule = own * OWN // GRANULE
    full, partial = 0, 0
    for start in tl.range(0, tiles_other, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        other_granule = tile.to(tl.int64) * OTHER // GRANULE
        most = tl.zeros([CHUNK], tl.int32)
        least = tl.full([CHUNK], 2, tl.int32)
        for head in tl.range(first_head, first_head + heads_per_list):
            head_ptr = map_ptr + head * own_granules * other_granules
            for i in tl.static_range((OWN + GRANULE - 1) // GRANULE):
                for j in tl.static_range((OTHER + GRANULE - 1) // GRANULE):
                    if OWN_IS_ROWS:
                        ptrs = head_ptr + (own_granule + i) * other_granules + other_granule + j
                    else:
                        ptrs = head_ptr + (other_granule + j) * own_granules + own_granule + i
                    inside = (own_granule + i < own_granules) & (other_granule + j < other_granules)
                    state = tl.load(ptrs, mask=inside, other=0).to(tl.int32)
                    most = tl.maximum(most, state)
                    # granules past the last key are seen by nobody; those past the last row hide nothing from anybody
                    if OWN_IS_ROWS:
                        least = tl.where(own_granule + i < own_granules, tl.minimum(least, state), least)
                    else:
                        least = tl.where(other_granule + j < other_granules, tl.minimum(least, state), least)
        exists = tile < tiles_other
        whole = ((least == 2) & exists).to(tl.int32)
        in_part = ((most > 0) & (least < 2) & exists).to(tl.int32)
        tl.store(list_ptr + 2 + full + tl.cumsum(whole, 0) - 1, tile, mask=whole != 0)
        tl.store(list_ptr + 2 + tiles_other - partial - tl.cumsum(in_part, 0), tile, mask=in_part != 0)
        full += tl.sum(whole, 0)
        partial += tl.sum(in_part, 0)
    tl.store(list_ptr, full)
    tl.store(list_ptr + 1, partial)


class TileMap:
    """The tile map of a problem's masks, and the lists that kernels loop over.

    Attributes:
        granules: uint8 ``[B | 1, H | 1, granules of rows, granules of keys]``: 0 none, 1 some, 2 all.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        batch, heads, seqlen_q = problem.query.shape[:3]
        seqlen_k = problem.key.shape[2]
        prefix = [] if problem.prefix is None else [problem.prefix]
        map_batch = batch if any(tensor.shape[0] > 1 for tensor in (*problem.masks, *prefix)) else 1
        map_heads = heads if problem.mask is not None and problem.mask.shape[1] > 1 else 1
        shape = (map_batch, map_heads, int(triton.cdiv(seqlen_q, GRANULE)), int(triton.cdiv(seqlen_k, GRANULE)))
        self.granules = torch.empty(shape, dtype=torch.uint8, device=problem.query.device)
        launch(
            _tile_map_kernel,
            (self.granules.numel(),),
            problem.query,
            self.granules,
            problem.rules(),
            *problem.sizes(),
            map_heads,
            GRANULE=GRANULE,
        )

    def of_rows(self, config: Config) -> Tensor:
        """int32 ``[B | 1, H | 1, tiles of rows, 2 + tiles of keys]``: for every tile of rows the tiles of keys."""
        lengths = self._problem.query.shape[2], self._problem.key.shape[2]
        return self._lists(lengths, (config.block_m, config.block_n), own_is_rows=True, heads_per_list=1)

    def of_keys(self, config: Config) -> Tensor:
        """int32 ``[B | 1, Hk | 1, tiles of keys, 2 + tiles of rows]``: for every tile of keys the tiles of rows that
        see it, in any head of the group."""
        lengths = self._problem.key.shape[2], self._problem.query.shape[2]
        group = self._problem.query.shape[1] // self._problem.key.shape[1] if self.granules.shape[1] > 1 else 1
        return self._lists(lengths, (config.block_n, config.block_m), own_is_rows=False, heads_per_list=group)

    def _lists(
        self, lengths: tuple[int, int], blocks: tuple[int, int], *, own_is_rows: bool, heads_per_list: int
    ) -> Tensor:
        batch, heads, granules_m, granules_n = self.granules.shape
        tiles_own, tiles_other = (int(triton.cdiv(length, block)) for length, block in zip(lengths, blocks))
        shape = (batch, heads // heads_per_list, tiles_own, 2 + tiles_other)
        lists = torch.empty(shape, dtype=torch.int32, device=self.granules.device)
        granules = (granules_m, granules_n) if own_is_rows else (granules_n, granules_m)
        launch(
            _tile_lists_kernel, (lists.numel() // lists.shape[3],), self.granules,
            lists, self.granules, *granules, tiles_own, tiles_other, heads_per_list,
            OWN=blocks[0], OTHER=blocks[1], GRANULE=GRANULE, OWN_IS_ROWS=own_is_rows, CHUNK=_CHUNK,
        )  # fmt: skip
        return lists


def tile_map_for(problem: Problem) -> TileMap | None:
    """The tile map of a problem, or None where arithmetic alone says which tiles to visit, or where there are few."""
    seqlen_q, seqlen_k = problem.query.shape[2], problem.key.shape[2]
    granules = triton.cdiv(seqlen_q, GRANULE) * triton.cdiv(seqlen_k, GRANULE)
    worthwhile = problem.query.numel() > 0 and granules >= FEWEST_GRANULES
    return TileMap(problem) if problem.masks and worthwhile else None


def list_arguments(lists: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The kernel arguments ``tile_lists, lists_per_batch, lists_per_head``."""
    if lists is None:
        return None, 0, 0
    batch, heads = lists.shape[:2]
    return lists, heads if batch > 1 else 0, 1 if heads > 1 else 0
