"""Tile maps: which tiles of an arbitrary mask are seen whole, in part or not at all, worked out on the device.

One kernel reads the masks, or asks a user's function, once and writes, for every granule of 64 x 64 pairs, whether
none, some or all of them are visible. A second one turns that map into what a loop needs: for each tile of rows (or of
keys) of a kernel's own size, the list of tiles to visit; where a backward needs lists for rows and for keys, it writes
both in one launch. Both are small beside attention itself, and nothing is copied to the host. So every mask, whatever
its shape, costs only the tiles that it leaves visible. The granules, one byte for 4096 pairs, may be kept from the
forward for the backward.
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
# A tile map costs two launches in the forward, and one to three in the backward: one for all lists in plain Triton or
# two in Gluon, and one for the map itself unless the forward's is at hand. With fewer granules it is quicker to visit
# them all.
FEWEST_GRANULES = 6
# A function that hides keys may need many registers for a pair: with 4 warps, 32 pairs a thread, it would spill.
_OPTIONS_WITH_FUNCTION = {"num_warps": 8}
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


@triton.jit
def _write_list(
    pid, lists_ptr, map_ptr, own_granules, other_granules, tiles_own, tiles_other, heads_per_list,
    OWN: tl.constexpr, OTHER: tl.constexpr, GRANULE: tl.constexpr, OWN_IS_ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The list of one tile of OWN rows (or keys): counts of the tiles of OTHER keys (or rows) that are seen whole and
    in part, by any head that shares the list; the first from the front, the second from the back."""
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


@triton.jit(
    do_not_specialize=[
        "granules_m", "granules_n", "row_lists", "rows_own", "rows_other", "keys_own", "keys_other", "heads_per_list"
    ]
)  # fmt: skip
def _tile_lists_kernel(
    map_ptr, granules_m, granules_n, rows_ptr, row_lists, rows_own, rows_other, keys_ptr, keys_own, keys_other,
    heads_per_list, ROWS_M: tl.constexpr, ROWS_N: tl.constexpr, KEYS_M: tl.constexpr, KEYS_N: tl.constexpr,
    GRANULE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One of ``row_lists`` lists for tiles of rows, or one of those for tiles of keys, which come behind."""
    pid = tl.program_id(0).to(tl.int64)
    if rows_ptr is not None:
        if pid < row_lists:
            _write_list(
                pid, rows_ptr, map_ptr, granules_m, granules_n, rows_own, rows_other, 1, ROWS_M, ROWS_N, GRANULE, True,
                CHUNK,
            )  # fmt: skip
    if keys_ptr is not None:
        if pid >= row_lists:
            _write_list(
                pid - row_lists, keys_ptr, map_ptr, granules_n, granules_m, keys_own, keys_other, heads_per_list,
                KEYS_N, KEYS_M, GRANULE, False, CHUNK,
            )  # fmt: skip


class TileMap:
    """The tile map of a problem's masks, and the lists that kernels loop over.

    Attributes:
        granules: uint8 ``[B | 1, H | 1, granules of rows, granules of keys]``: 0 none, 1 some, 2 all.
    """

    def __init__(self, problem: Problem, granules: Tensor | None = None) -> None:
        self._problem = problem
        if granules is not None:
            self.granules = granules
            return
        batch, heads, seqlen_q = problem.query.shape[:3]
        seqlen_k = problem.key.shape[2]
        prefix = [] if problem.prefix is None else [problem.prefix]
        mask_mod = problem.mask_mod
        of_batches = any(tensor.shape[0] > 1 for tensor in (*problem.masks, *prefix))
        of_heads = problem.mask is not None and problem.mask.shape[1] > 1
        map_batch = batch if of_batches or (mask_mod is not None and mask_mod.batches) else 1
        map_heads = heads if of_heads or (mask_mod is not None and mask_mod.heads) else 1
        shape = (map_batch, map_heads, int(triton.cdiv(seqlen_q, GRANULE)), int(triton.cdiv(seqlen_k, GRANULE)))
        self.granules = torch.empty(shape, dtype=torch.uint8, device=problem.query.device)
        launch(
            _tile_map_kernel, (self.granules.numel(),), problem.query,
            self.granules, problem.rules()._replace(score_mod=None), *problem.sizes(), map_heads, GRANULE=GRANULE,
            **({} if mask_mod is None else _OPTIONS_WITH_FUNCTION),
        )  # fmt: skip

    def of_rows(self, config: Config) -> Tensor:
        """int32 ``[B | 1, H | 1, tiles of rows, 2 + tiles of keys]``: for every tile of rows the tiles of keys."""
        lists = self._empty(config, by_rows=True)
        self._write(lists, config, None, None)
        return lists

    def of_keys(self, config: Config) -> Tensor:
        """int32 ``[B | 1, Hk | 1, tiles of keys, 2 + tiles of rows]``: for every tile of keys the tiles of rows that
        see it, in any head of the group."""
        lists = self._empty(config, by_rows=False)
        self._write(None, None, lists, config)
        return lists

    def of_rows_and_keys(self, of_rows: Config, of_keys: Config) -> tuple[Tensor, Tensor]:
        """:meth:`of_rows` and :meth:`of_keys`, in one launch."""
        rows, keys = self._empty(of_rows, by_rows=True), self._empty(of_keys, by_rows=False)
        self._write(rows, of_rows, keys, of_keys)
        return rows, keys

    def _empty(self, config: Config, *, by_rows: bool) -> Tensor:
        batch, heads = self.granules.shape[:2]
        tiles_m = int(triton.cdiv(self._problem.query.shape[2], config.block_m))
        tiles_n = int(triton.cdiv(self._problem.key.shape[2], config.block_n))
        if by_rows:
            shape = (batch, heads, tiles_m, 2 + tiles_n)
        else:
            shape = (batch, heads // self._heads_per_list(), tiles_n, 2 + tiles_m)
        return torch.empty(shape, dtype=torch.int32, device=self.granules.device)

    def _heads_per_list(self) -> int:
        """How many heads of the map share a list for a tile of keys."""
        return self._problem.query.shape[1] // self._problem.key.shape[1] if self.granules.shape[1] > 1 else 1

    def _write(self, rows: Tensor | None, of_rows: Config | None, keys: Tensor | None, of_keys: Config | None) -> None:
        counts = [0 if lists is None else lists.numel() // lists.shape[3] for lists in (rows, keys)]
        tiles = [(0, 0) if lists is None else (lists.shape[2], lists.shape[3] - 2) for lists in (rows, keys)]
        blocks = [(GRANULE, GRANULE) if c is None else (c.block_m, c.block_n) for c in (of_rows, of_keys)]
        launch(
            _tile_lists_kernel, (sum(counts),), self.granules,
            self.granules, *self.granules.shape[2:], rows, counts[0], *tiles[0], keys, *tiles[1],
            self._heads_per_list(), ROWS_M=blocks[0][0], ROWS_N=blocks[0][1], KEYS_M=blocks[1][0],
            KEYS_N=blocks[1][1], GRANULE=GRANULE, CHUNK=_CHUNK,
        )  # fmt: skip


def tile_map_for(problem: Problem, granules: Tensor | None = None) -> TileMap | None:
    """The tile map of a problem, or None where arithmetic alone says which tiles to visit, or where there are few.

    Packed sequences have none: only the device knows where their tiles lie.

    Args:
        problem: a call's inputs.
        granules: of a map that was made of the same masks, by the forward; None: it is made now.
    """
    seqlen_q, seqlen_k = problem.query.shape[2], problem.key.shape[2]
    count = triton.cdiv(seqlen_q, GRANULE) * triton.cdiv(seqlen_k, GRANULE)
    worthwhile = problem.query.numel() > 0 and count >= FEWEST_GRANULES
    if problem.packed is not None or not problem.hides_at_will or not worthwhile:
        return None
    return TileMap(problem, granules)


def list_arguments(lists: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The kernel arguments ``tile_lists, lists_per_batch, lists_per_head``."""
    if lists is None:
        return None, 0, 0
    batch, heads = lists.shape[:2]
    return lists, heads if batch > 1 else 0, 1 if heads > 1 else 0
