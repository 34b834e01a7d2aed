"""Tile maps say what every pair of a tile says, and the kernels visit exactly the tiles that they list."""

from typing import Any

import pytest
import torch

import fastattn
from fastattn.ops.attention import launch
from fastattn.ops.attention.call import make_call
from fastattn.reference import visibility
from fastattn.testing import attention_inputs, attention_mask, key_padding_mask
from tests.conftest import INTERPRETING
from tests.machines.marks import quick

pytest.importorskip("triton", reason="triton is not installed")

from fastattn_kernels.attention.tile_tables import INTERPRETED
from fastattn_kernels.common import tile_map
from fastattn_kernels.common.config import Config
from fastattn_kernels.common.problem import Problem

B, H, HK, L, S, D = 2, 2, 1, 150, 270, 8


def documents(length, batch=B):
    """Documents of unequal lengths, other ones in each sequence."""
    return torch.stack([torch.arange(length).add(25 * b).div(70, rounding_mode="floor") for b in range(batch)])


def blocks(seed=0, batch=1, heads=1):
    """A boolean mask of hidden and visible blocks of 64 x 64, and one row that sees a single key."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(batch, heads, -(-L // 64), -(-S // 64), generator=generator) < 0.4
    seen = seen.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :L, :S].clone()
    seen[:, :, 5] = False
    seen[:, :, 5, 7] = True
    return seen


CASES: dict[str, Any] = {
    "blocks": lambda: {"attn_mask": blocks()},
    "blocks_of_every_head": lambda: {"attn_mask": blocks(heads=H)},
    "blocks_of_every_sequence": lambda: {"attn_mask": blocks(batch=B), "is_causal": True},
    "nothing": lambda: {"attn_mask": torch.zeros(1, 1, L, S, dtype=torch.bool)},
    "everything": lambda: {"attn_mask": torch.ones(1, 1, L, S, dtype=torch.bool)},
    "random": lambda: {"attn_mask": attention_mask(B, H, L, S, seed=1)},
    "padding": lambda: {"key_padding_mask": key_padding_mask(B, S, seed=2)},
    "documents": lambda: {"document_ids": (documents(L), documents(S)), "is_causal": True},
    "window": lambda: {"window": (40, 10), "attn_mask": blocks(3)},
    "prefix": lambda: {"window": (40, 0), "prefix": torch.tensor([3, 100]), "key_padding_mask": key_padding_mask(B, S)},
}


def problem_of(arguments, device) -> Any:
    query, key, value = attention_inputs(B, H, L, S, D, kv_heads=HK, device=device)
    arguments: dict[str, Any] = {name: _on(device, value) for name, value in arguments.items()}
    call: dict[str, Any] = make_call(query, key, value, **arguments)._asdict()
    left_out = ("dropout_p", "weights", "return_lse", "first_batch", "first_row", "first_key")
    problem = Problem(**{name: value for name, value in call.items() if name not in left_out})
    rules = ("lower", "upper", "prefix", "mask", "key_padding_mask", "query_documents", "key_documents")
    seen = visibility(L, S, **{name: call[name] for name in rules}, device=device)
    return problem, arguments, seen.expand(B, H, L, S)


def _on(device, value) -> Any:
    if isinstance(value, tuple):
        return tuple(_on(device, v) for v in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def states(seen, rows, cols):
    """Of each tile: 0 where nobody sees anything, 2 where every row sees every key, else 1. Keys past the last one are
    seen by nobody, rows past the last one do not count."""
    tiles = [[seen[..., i : i + rows, j : j + cols] for j in range(0, S, cols)] for i in range(0, L, rows)]
    return torch.stack(
        [
            torch.stack([t.any((-1, -2)).int() + (t.all(-1).all(-1) & (t.shape[-1] == cols)).int() for t in row], -1)
            for row in tiles
        ],
        -2,
    )


@pytest.mark.parametrize("case", CASES)
def test_tile_map_holds_none_some_and_all(case, device):
    problem, _, seen = problem_of(CASES[case](), device)
    found = tile_map.TileMap(problem).granules
    expected = states(seen, tile_map.GRANULE, tile_map.GRANULE)
    assert torch.equal(found.int().expand_as(expected), expected.to(device))


@pytest.mark.parametrize("blocks_of", quick([(128, 64), (64, 128), (32, 32)], (64, 128)), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_tile_lists_hold_every_tile_that_is_seen(case, blocks_of, device):
    """Of a tile smaller than a granule the list may know less: that some of it is seen."""
    problem, _, seen = problem_of(CASES[case](), device)
    block_m, block_n = blocks_of
    config = Config(block_m, block_n, 4, 1)
    lists = tile_map.TileMap(problem)
    exact = block_m >= tile_map.GRANULE and block_n >= tile_map.GRANULE
    of_rows = states(seen, block_m, block_n)
    grouped = of_rows.unflatten(1, (HK, -1))
    of_keys = torch.where(grouped.amin(2) == 2, 2, grouped.amax(2).clamp(max=1)).mT
    for found, expected in ((lists.of_rows(config), of_rows), (lists.of_keys(config), of_keys)):
        found = found.expand(*expected.shape[:3], -1).flatten(0, 2).cpu()
        for row, wanted in zip(found.tolist(), expected.flatten(0, 2)):
            full, partial, *tiles = row
            whole, in_part = set(tiles[:full]), set(tiles[len(tiles) - partial :])
            assert len(whole) == full and len(in_part) == partial and not whole & in_part
            visible, complete = set(wanted.nonzero()[:, 0].tolist()), set((wanted == 2).nonzero()[:, 0].tolist())
            if exact:
                assert (whole, in_part) == (complete, visible - complete)
            else:
                assert whole <= complete and visible <= whole | in_part


@pytest.fixture
def products(monkeypatch):
    """How many products of tiles the kernels computed, by the shape of their result."""
    from triton.runtime import interpreter

    counts = {}
    create_dot = interpreter.InterpreterBuilder.create_dot

    def counting(self, a, b, *rest):
        shape = (a.data.shape[0], a.data.shape[1], b.data.shape[1])
        counts[shape] = counts.get(shape, 0) + 1
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counting)
    return counts


# What arithmetic alone finds, without a map.
BANDS: dict[str, Any] = {
    "causal": {"is_causal": True},
    "narrow_window": {"window": (20, 5)},
    "wide_window": {"window": (150, 70), "causal_alignment": "bottom_right"},
    "window_and_prefix": {"window": (40, 0), "prefix": torch.tensor([3, 100])},
    "prefix_past_the_end": {"is_causal": True, "prefix": S + 9},
    "window_before_every_key": {"window": (0, 0), "causal_alignment": "bottom_right"},
}


@pytest.mark.skipif(not INTERPRETING, reason="products are counted in Triton's interpreter")
@pytest.mark.parametrize(
    "case", ["blocks", "blocks_of_every_head", "padding", "documents", "prefix", "nothing", *BANDS]
)
def test_attention_visits_only_tiles_that_are_seen(case, products, device):
    """Forward and backward together compute exactly the products of the tiles that somebody sees: two of each in the
    forward, three for dQ and four for dK and dV. Nothing else is visited."""
    problem, arguments, seen = problem_of(CASES[case]() if case in CASES else BANDS[case], device)
    tiles = {kernel: INTERPRETED[kernel] for kernel in ("forward", "dq", "dkdv")}
    leaves = [t.requires_grad_() for t in (problem.query, problem.key, problem.value)]
    output: Any = fastattn.attention(*leaves, **arguments, backend="triton")
    torch.autograd.grad(output, leaves, torch.ones_like(output))

    granule = tile_map.GRANULE

    def visible_tiles(config, by_keys):
        """The granules decide for smaller tiles where there is a map."""
        block_m, block_n = config.block_m, config.block_n
        listed = seen
        if problem.masks:
            coarse = states(seen, granule, granule) > 0
            listed = coarse.repeat_interleave(granule, 2).repeat_interleave(granule, 3)[:, :, :L, :S]
        if by_keys and problem.masks:  # a list is shared by the heads of a group
            listed = listed.unflatten(1, (HK, -1)).any(2, keepdim=True).expand(-1, -1, H // HK, -1, -1).flatten(1, 2)
        return int((states(listed, block_m, block_n) > 0).sum())

    expected = (
        2 * visible_tiles(tiles["forward"], False)
        + 3 * visible_tiles(tiles["dq"], False)
        + 4 * visible_tiles(tiles["dkdv"], True)
    )
    assert sum(products.values()) == expected
    if case in ("blocks", "documents", "narrow_window"):
        dense = sum(
            n * B * H * -(-L // tiles[kernel].block_m) * -(-S // tiles[kernel].block_n)
            for n, kernel in ((2, "forward"), (3, "dq"), (4, "dkdv"))
        )
        assert expected < 0.6 * dense


def test_small_problems_have_no_map(device):
    """Two more launches are dearer than the tiles they would save."""
    query, key, value = attention_inputs(1, 1, 64, 64, D, device=device)
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool, device=device)
    assert tile_map.tile_map_for(Problem(query, key, value, 1.0, mask=mask)) is None
    assert launch.tile_map_for is tile_map.tile_map_for
