"""``fastattn.flex_attention`` beside torch's own, which computes all scores in plain torch where it is not compiled."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as of_torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, and_masks, create_block_mask, or_masks

import fastattn
from fastattn.ops.attention.functions import flex
from fastattn.reference import attention as reference
from fastattn.testing import attention_inputs, random_tensor

B, H, L = 2, 2, 70
ours: Any = fastattn.flex_attention


def torchs(*arguments: Any, **words: Any) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # that it makes all scores where it is not compiled
        return of_torch.flex_attention(*arguments, **words)


def inputs(keys=L, kv_heads=H, dtype=torch.float64, batch=B):
    return attention_inputs(batch, H, L, keys, 16, kv_heads=kv_heads, dtype=dtype, seed=1)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------- what FlexAttention's users write


def causal(b, h, q, k):
    return q >= k


def relative_position(score, b, h, q, k):
    return score + (q - k)


SLOPES = torch.exp2(-8.0 * (torch.arange(H) + 1) / H)


def alibi(score, b, h, q, k):
    return score + SLOPES[h] * (k - q)


def soft_capping(score, b, h, q, k):
    return 2.0 * torch.tanh(score / 2.0)


def sliding_window(b, h, q, k):
    return (q - k <= 11) & (q >= k)


PREFIXES = torch.tensor([9, 31])


def in_prefix(b, h, q, k):
    return k < PREFIXES[b]


DOCUMENTS = torch.stack([torch.arange(L) // 27, (torch.arange(L) + 9) // 30])


def of_one_document(b, h, q, k):
    return DOCUMENTS[b, q] == DOCUMENTS[b, k]


def neighbourhood(b, h, q, k):
    """On a grid of 10 columns: 5 rows and 5 columns, those at the border as wide."""
    row, column = (q // 10).clamp(2, L // 10 - 3), (q % 10).clamp(2, 7)
    return ((k // 10 - row).abs() <= 2) & ((k % 10 - column).abs() <= 2)


OFFSETS = torch.tensor([0, 20, 21, 57, L])
SEQUENCES = torch.repeat_interleave(torch.arange(4), OFFSETS.diff())


def jagged(score, b, h, q, k):
    """A bias by positions within sequences that lie behind one another."""
    distance = (q - OFFSETS[SEQUENCES[q]]) - (k - OFFSETS[SEQUENCES[k]])
    return torch.where(SEQUENCES[q] == SEQUENCES[k], score - 0.1 * distance.abs(), float("-inf"))


def jagged_causal(b, h, q, k):
    within = q - OFFSETS[SEQUENCES[q]] >= k - OFFSETS[SEQUENCES[k]]
    return (SEQUENCES[q] == SEQUENCES[k]) & within


def of_the_head(b, h, q, k):
    return (q - k).abs() % (h + 2) == 0


def rows_without_keys(b, h, q, k):
    return (q < 30) & (k < 50)


EXAMPLES: dict[str, tuple[Any, Any]] = {
    "causal": (None, causal),
    "relative_position": (relative_position, None),
    "alibi": (alibi, causal),
    "soft_capping": (soft_capping, None),
    "sliding_window": (None, sliding_window),
    "prefix_lm": (None, or_masks(in_prefix, causal)),
    "documents": (None, of_one_document),
    "documents_and_causal": (soft_capping, and_masks(causal, of_one_document)),
    "all_and_any": (None, and_masks(or_masks(in_prefix, sliding_window), causal, of_the_head)),
    "neighbourhood": (alibi, neighbourhood),
    "jagged": (jagged, None),
    "jagged_causal": (relative_position, jagged_causal),
    "heads_apart": (None, of_the_head),
    "rows_without_keys": (None, rows_without_keys),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_torchs(name):
    score_mod, mask_mod = EXAMPLES[name]
    words: dict[str, Any] = {"score_mod": score_mod}
    if mask_mod is not None:
        words["block_mask"] = create_block_mask(mask_mod, B, H, L, L, device="cpu", BLOCK_SIZE=16)
    with fastattn.use_backend("torch"):
        assert_same(ours(*inputs(), **words), torchs(*inputs(), **words))


@pytest.mark.parametrize("name", ["alibi", "neighbourhood", "jagged"])
def test_example_on_a_backend(name, backend):
    """In float32, and the gradients, which torch's has not got on a CPU."""
    score_mod, mask_mod = EXAMPLES[name]
    leaves = [t.requires_grad_() for t in inputs(dtype=torch.float32)]
    block_mask = None if mask_mod is None else create_block_mask(mask_mod, B, H, L, L, device="cpu")
    with fastattn.use_backend(backend):
        output = ours(*leaves, score_mod, block_mask)
    truth = reference(*(t.double() for t in leaves), score_mod=score_mod, mask_mod=mask_mod).output
    torch.testing.assert_close(output.double(), truth, rtol=1e-4, atol=1e-5)
    found, expected = (torch.autograd.grad(each.square().sum(), leaves) for each in (output, truth))
    for d, d_expected in zip(found, expected):
        torch.testing.assert_close(d, d_expected, rtol=1e-3, atol=1e-4)


def test_captured_gradient_flows_through_the_drop_in(backend):
    table = random_tensor(2 * L, seed=3).requires_grad_()
    with fastattn.use_backend(backend):
        output = ours(*inputs(dtype=torch.float32), lambda s, b, h, q, k: s + table[q - k + L])
    truth = reference(*inputs(), score_mod=lambda s, b, h, q, k: s + table[q - k + L]).output
    found, expected = (torch.autograd.grad(each.square().sum(), table)[0] for each in (output, truth))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- block masks


@pytest.mark.parametrize("sizes", [(None, None), (B, H), (1, 1)], ids=str)
@pytest.mark.parametrize(("keys", "block"), [(L, 128), (201, 16), (130, (16, 64))], ids=str)
def test_block_mask_is_torchs(keys, block, sizes: Any):
    """For one sequence and head, and for each; of lengths that are no multiple of a block."""
    mask = and_masks(of_the_head, in_prefix) if sizes == (B, H) else sliding_window
    block_mask = create_block_mask(mask, sizes[0], sizes[1], L, keys, device="cpu", BLOCK_SIZE=block)
    with fastattn.use_backend("torch"):
        assert_same(ours(*inputs(keys), block_mask=block_mask), torchs(*inputs(keys), block_mask=block_mask))


def of_blocks(listed, full=None, mask_mod: Any = None):
    """``[1, 1]`` of lists of key blocks, one for each block of 16 rows, and the same as a dense mask ``[L, L]``."""
    blocks = math.ceil(L / 16)
    tensors, dense = [], torch.zeros(L, L, dtype=torch.bool)
    rows, keys = torch.arange(L)[:, None], torch.arange(L)
    for lists in (listed, full):
        if lists is None:
            tensors += [None, None]
            continue
        counts = torch.tensor([len(each) for each in lists], dtype=torch.int32)[None, None]
        indices = torch.full((1, 1, blocks, blocks), blocks - 1, dtype=torch.int32)  # behind the count anything stands
        for row, each in enumerate(lists):
            indices[0, 0, row, : len(each)] = torch.tensor(each, dtype=torch.int32)
            seen = (rows // 16 == row) & torch.isin(keys // 16, torch.tensor(each))
            if lists is listed and mask_mod is not None:
                seen = seen & mask_mod(0, 0, rows, keys)
            dense |= seen
        tensors += [counts, indices]
    words: dict[str, Any] = {"BLOCK_SIZE": 16, "seq_lengths": (L, L)}
    if mask_mod is not None:
        words["mask_mod"] = mask_mod
    return BlockMask.from_kv_blocks(*tensors, **words), dense


LISTED = [[0], [1, 0], [2], [0, 3], []]
FULL = [[2], [], [0, 1], [], [4, 0, 1, 2, 3]]


@pytest.mark.parametrize("full", [None, FULL], ids=["", "full_blocks"])
@pytest.mark.parametrize("mask_mod", [None, causal], ids=["whole_blocks", "causal"])
def test_blocks_by_hand(mask_mod, full, backend):
    """Full blocks are seen whatever ``mask_mod`` says, and blocks that are not listed are not."""
    block_mask, dense = of_blocks(LISTED, full, mask_mod)
    query, key, value = inputs(dtype=torch.float32)
    with fastattn.use_backend(backend):
        found = ours(query, key, value, block_mask=block_mask)
    truth = reference(query.double(), key.double(), value.double(), mask=dense).output
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def test_block_mask_that_is_changed_is_read_again():
    block_mask, _ = of_blocks(LISTED)
    query, key, value = inputs()
    with fastattn.use_backend("torch"):
        before = ours(query, key, value, block_mask=block_mask)
        block_mask.kv_indices[0, 0, 0, 0] = 4
        after = ours(query, key, value, block_mask=block_mask)
    assert not torch.equal(before, after)
    assert_same(after, reference(query, key, value, mask=of_blocks([[4], *LISTED[1:]])[1]).output)


def test_lists_that_are_shorter_than_there_are_blocks(backend):
    """torch takes them where the blocks of queries need not be computed."""
    counts, indices = torch.ones(1, 1, 5, dtype=torch.int32), torch.tensor([4, 3, 2, 1, 0], dtype=torch.int32)
    words: dict[str, Any] = {"BLOCK_SIZE": 16, "seq_lengths": (L, L), "compute_q_blocks": False}
    block_mask = BlockMask.from_kv_blocks(counts, indices[None, None, :, None], **words)
    query, key, value = inputs(dtype=torch.float32)
    with fastattn.use_backend(backend):
        found = ours(query, key, value, block_mask=block_mask)
    dense = of_blocks([[4], [3], [2], [1], [0]])[1]
    torch.testing.assert_close(found, reference(query, key, value, mask=dense).output, rtol=1e-4, atol=1e-5)


def test_mask_without_blocks_hides_nothing():
    """torch's own for no mask: one block of everything."""
    block_mask = of_torch._create_empty_block_mask(*inputs()[:2])
    with fastattn.use_backend("torch"):
        assert_same(ours(*inputs(), block_mask=block_mask), fastattn.attention(*inputs()))


# ------------------------------------------------------------------------------------------------------ the other words


def test_grouped_heads_scale_and_lse_are_torchs():
    words: dict[str, Any] = {"enable_gqa": True, "scale": 0.3, "return_lse": True, "kernel_options": {"BLOCK_M": 64}}
    words["block_mask"] = create_block_mask(rows_without_keys, None, None, L, 45, device="cpu")
    arguments = (*inputs(45, kv_heads=1), soft_capping)
    with fastattn.use_backend("torch"):
        for found, expected in zip(ours(*arguments, **words), torchs(*arguments, **words)):
            assert_same(found, expected)


@pytest.mark.parametrize("asked", [(True, True), (False, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("elements", [1 << 22, B * H * L * 11], ids=["at_once", "some_rows_at_a_time"])
def test_auxiliary_results_are_those_of_all_scores(asked, elements, monkeypatch):
    """torch's own has no largest scores on a CPU."""
    monkeypatch.setattr(flex, "_ELEMENTS", elements)
    words: dict[str, Any] = {"return_aux": AuxRequest(*asked)}
    words["block_mask"] = create_block_mask(rows_without_keys, None, None, L, L, device="cpu")
    query, key, value = inputs()
    with fastattn.use_backend("torch"):
        output, found = ours(query, key, value, alibi, **words)
    rows, keys = torch.arange(L)[:, None], torch.arange(L)
    scores = alibi(query @ key.mT / 4, 0, torch.arange(H)[:, None, None], rows, keys)
    scores = scores.masked_fill(~rows_without_keys(0, 0, rows, keys), -torch.inf)
    assert_same(output, (scores.softmax(-1) @ value).nan_to_num(nan=0.0))
    for name, wanted, truth in zip(("lse", "max_scores"), asked, (scores.logsumexp(-1), scores.amax(-1))):
        if wanted:
            assert_same(getattr(found, name), truth)
        else:
            assert getattr(found, name) is None


def test_keys_of_a_batch_of_1_are_shared():
    query, _, _ = inputs()
    _, key, value = inputs(batch=1)
    block_mask = create_block_mask(of_one_document, B, None, L, L, device="cpu")
    with fastattn.use_backend("torch"):
        found = ours(query, key, value, block_mask=block_mask)
    assert_same(found, torchs(query, key, value, block_mask=block_mask))


x = torch.randn(1, 2, 8, 16)
REFUSED: dict[str, tuple[Any, ...]] = {
    "fewer key heads": (ValueError, "as many key heads as query heads", (x, x[:, :1], x[:, :1]), {}),
    "both forms of the LSE": (
        ValueError, "expected one of them", (x, x, x), {"return_lse": True, "return_aux": AuxRequest()}
    ),
    "options": (TypeError, "kernel_options: expected a dict", (x, x, x), {"kernel_options": 3}),
    "another mask": (TypeError, "expected a BlockMask, got Tensor", (x, x, x), {"block_mask": torch.ones(8, 8)}),
    "a mask of other lengths": (
        ValueError, "block_mask is for 8 queries and 9 keys: .* the 8 queries and 8 keys", (x, x, x),
        {"block_mask": create_block_mask(causal, None, None, 8, 9, device="cpu")},
    ),
    "a score_mod": (NotImplementedError, "`if`", (x, x, x, lambda s, b, h, q, k: s if q > k else -s), {}),
    "three dimensions": (ValueError, "query", (x[0], x[0], x[0]), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_calls_are_named(name):
    error, message, arguments, words = REFUSED[name]
    with pytest.raises(error, match=message):
        ours(*arguments, **words)
