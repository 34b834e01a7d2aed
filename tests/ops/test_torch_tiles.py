"""Evaluation on a CPU by tiles of rows: right wherever it serves, and only there."""

from typing import Any

import pytest
import torch

import fastattn
from benchmarks.families.masks import in_words_of_reference
from fastattn.ops.attention import tiles as torch_tiles
from fastattn.ops.attention.call import make_call
from fastattn.reference import attention as reference
from fastattn.testing import assert_within_budget, attention_inputs

LENGTH, KEYS = 461, 290


@pytest.fixture
def tiles(monkeypatch):
    """The tiles that were attended to, as (rows, keys, whether a mask was needed)."""
    seen = []
    attend = torch_tiles.attend_tile

    def counting(tile):
        seen.append((tile.query.shape[2], tile.key.shape[2], tile.mask is not None))
        return attend(tile)

    monkeypatch.setattr(torch_tiles, "attend_tile", counting)
    return seen


def rules(name: str, batch: int, rows: int, keys: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    row, key = torch.arange(rows)[:, None], torch.arange(keys)[None]
    blocks = torch.rand(9, 9, generator=generator).repeat_interleave(64, 0).repeat_interleave(64, 1)[:rows, :keys]
    return {
        "padding": {"key_padding_mask": torch.arange(keys) >= torch.tensor([[40], [keys - 7], [0]])[:batch]},
        "sparse": {"attn_mask": blocks < 0.15},
        "of_each_entry": {"attn_mask": torch.stack([blocks < 0.3, blocks > 0.7, blocks > 2])[:batch, None]},
        "documents": {"document_ids": (torch.arange(rows)[None] // 50, torch.arange(keys)[None] // 50)},
        "prefix": {"is_causal": True, "prefix": torch.tensor([3, 90, 0])[:batch]},
        "scattered_keys": {"attn_mask": (key % 3 == 0) & (row > 5)},
        "one_row_sees": {"attn_mask": (row == 200) & (key > 100)},
    }[name]


RULES = [
    "padding", "sparse", "of_each_entry", "documents", "prefix", "scattered_keys", "one_row_sees",
]  # fmt: skip


def attend(tensors, **arguments) -> Any:
    with torch.no_grad():
        return fastattn.attention(*tensors, **arguments, backend="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_tiles_match_reference(name, dtype, tiles):
    tensors = attention_inputs(3, 4, LENGTH, KEYS, 24, kv_heads=2, dtype=dtype, seed=7)
    arguments = rules(name, 3, LENGTH, KEYS)
    output = attend(tensors, **arguments)
    words = in_words_of_reference(make_call(*tensors, **arguments))
    truth = reference(*(t.double() for t in tensors), **words).output
    peer = reference(*tensors, **words).output
    assert_within_budget(output, truth=truth, peer=peer, name=name)
    assert tiles
    visited = sum(rows * keys for rows, keys, _ in tiles)
    assert visited < 3 * LENGTH * KEYS * 0.95


def test_whole_tiles_have_no_mask(tiles):
    blocks = torch.eye(4, dtype=torch.bool).repeat_interleave(128, 0).repeat_interleave(128, 1)
    attend(attention_inputs(1, 2, 512, 512, 16, seed=1), attn_mask=blocks)
    assert tiles == [(128, 128, False)] * 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": torch.rand(400, 400, generator=torch.Generator().manual_seed(0)) < 0.9},
        {"attn_mask": torch.rand(1, 2, 400, 400, generator=torch.Generator().manual_seed(0)) < 0.1},
        {"is_causal": True},
        {"window": (3, 3), "softcap": 2.0},
        {"window": (3, 3)},
        {"window": (3, 3), "return_lse": True},
        {"window": (3, 3), "dropout_p": 0.5},
        {},
    ],
    ids=["dense", "mask_of_heads", "causal", "softcap", "window", "lse", "dropout", "plain"],
)
def test_other_calls_run_whole(arguments, tiles):
    attend(attention_inputs(1, 2, 400, 400, 16, seed=1), **arguments)
    assert not tiles


def test_training_runs_whole(tiles):
    tensors = [t.requires_grad_() for t in attention_inputs(1, 2, 400, 400, 16, seed=1)]
    output = fastattn.attention(*tensors, window=(3, 3), backend="torch")
    assert isinstance(output, torch.Tensor)
    output.sum().backward()
    assert not tiles and tensors[0].grad is not None


def test_rows_that_see_nothing_are_zero_and_what_a_tile_may_not_see_never_leaks(tiles):
    """NaN and inf behind the mask send the call to the blocks, whose roundings are others."""
    query, key, value = attention_inputs(1, 2, 384, 384, 16, seed=1)
    mask = torch.zeros(384, 384, dtype=torch.bool)
    mask[:100, :100] = True
    clean = attend((query, key, value), attn_mask=mask)
    assert tiles == [(128, 100, True)]
    key[:, :, 100:], value[:, :, 100:] = float("nan"), float("inf")
    output = attend((query, key, value), attn_mask=mask)
    torch.testing.assert_close(output, clean)
    for each in (clean, output):
        assert bool((each[:, :, 100:] == 0).all())


def test_output_lies_as_the_query_does(tiles):
    packed = torch.randn(2, 400, 4, 16).transpose(1, 2)
    output = attend((packed, packed, packed), document_ids=torch.arange(400)[None] // 50)
    assert tiles and output.transpose(1, 2).is_contiguous()


def test_an_empty_batch_is_no_tile(tiles):
    tensors = [t[:0] for t in attention_inputs(1, 2, 400, 400, 16, seed=1)]
    output = attend(tensors, key_padding_mask=torch.zeros(0, 400, dtype=torch.bool))
    assert output.shape == (0, 2, 400, 16) and not tiles
