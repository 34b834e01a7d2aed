"""The definition of attention over a cache, against attention over the whole sequence, and of rotary embedding."""

import pytest
import torch

from fastattn.reference import attention, attention_with_kvcache, rotate
from fastattn.testing import random_tensor

LENGTHS = [0, 3, 6]  # held by three sequences before the call


def draw(*shape, seed):
    return random_tensor(*shape, seed=seed, dtype=torch.float64)


def whole_sequences(length=2, room=8):
    """Queries ``[3, 4, L, 8]``, and keys and values ``[3, 2, S, 8]`` of which the last ``L`` in use are new."""
    query = draw(3, 4, length, 8, seed=1)
    return query, draw(3, 2, room, 8, seed=2), draw(3, 2, room, 8, seed=3)


def split(whole, length=2):
    """A cache that holds what comes before the new tokens and NaN behind it, and the new tokens."""
    cache = torch.full_like(whole, float("nan"))
    for sequence, held in enumerate(LENGTHS):
        cache[sequence, :, :held] = whole[sequence, :, :held]
    return cache, torch.stack([whole[i, :, held : held + length] for i, held in enumerate(LENGTHS)])


def paged(cache, page_size=2):
    """The cache in pages that lie in another order, and the table that says where."""
    batch, heads, room, size = cache.shape
    pages = cache.unflatten(2, (room // page_size, page_size)).transpose(1, 2).reshape(-1, heads, page_size, size)
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0))
    return pages[order], order.argsort().view(batch, -1).to(torch.int32)


@pytest.mark.parametrize("in_pages", [False, True], ids=["contiguous", "paged"])
def test_reference_of_a_cache_is_the_end_of_the_whole_sequence(in_pages):
    query, keys, values = whole_sequences()
    (key_cache, key), (value_cache, value) = split(keys), split(values)
    words: dict = {"cache_seqlens": torch.tensor(LENGTHS, dtype=torch.int32)}
    if in_pages:
        key_cache, words["block_table"] = paged(key_cache)
        value_cache, _ = paged(value_cache)
    result = attention_with_kvcache(query, key_cache, value_cache, key, value, **words)
    for sequence, held in enumerate(LENGTHS):
        total = held + 2
        whole = attention(
            query[sequence : sequence + 1],
            keys[sequence : sequence + 1, :, :total],
            values[sequence : sequence + 1, :, :total],
            upper=held,
        )
        torch.testing.assert_close(result.output[sequence : sequence + 1], whole.output, rtol=0, atol=1e-14)
        torch.testing.assert_close(result.lse[sequence : sequence + 1], whole.lse, rtol=0, atol=1e-14)


def test_reference_of_a_cache_leaves_out_the_padding_in_front():
    query, keys, values = whole_sequences()
    padding = torch.tensor([0, 2, 5], dtype=torch.int32)
    (key_cache, key), (value_cache, value) = split(keys), split(values)
    key_cache[1, :, :2] = value_cache[1, :, :2] = key_cache[2, :, :5] = value_cache[2, :, :5] = float("nan")
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    words: dict = {"cache_seqlens": lengths, "cache_leftpad": padding}
    result = attention_with_kvcache(query, key_cache, value_cache, key, value, **words)
    whole = attention(query[2:], keys[2:, :, 5:8], values[2:, :, 5:8], upper=1)
    torch.testing.assert_close(result.output[2:], whole.output, rtol=0, atol=1e-14)
    assert result.output.isfinite().all()


def test_reference_of_an_empty_cache_is_zero():
    query, keys, values = whole_sequences()
    result = attention_with_kvcache(query, keys, values, cache_seqlens=torch.zeros(3, dtype=torch.int32))
    assert not result.output.any()
    assert (result.lse == -torch.inf).all()


def test_reference_of_a_cache_writes_into_copies_and_nowhere_but_behind_the_lengths():
    query, keys, values = whole_sequences()
    key, value = draw(3, 2, 2, 8, seed=4), draw(3, 2, 2, 8, seed=5)
    before = keys.clone(), values.clone()
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    result = attention_with_kvcache(query, keys, values, key, value, cache_seqlens=lengths)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])
    for cache, new, old in ((result.key_cache, key, keys), (result.value_cache, value, values)):
        expected = old.clone()
        for sequence, held in enumerate(LENGTHS):
            expected[sequence, :, held : held + 2] = new[sequence]
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 8])
def test_rotation_is_a_product_of_complex_numbers(interleaved, width):
    x, angles = draw(5, 8, seed=6), draw(5, width // 2, seed=7)
    turned = rotate(x, angles.cos(), angles.sin(), interleaved=interleaved)
    pairs = x[:, :width].unflatten(1, (-1, 2)) if interleaved else x[:, :width].unflatten(1, (2, -1)).mT
    product = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    expected = product.flatten(1) if interleaved else product.mT.flatten(1)
    torch.testing.assert_close(turned[:, :width], expected, rtol=0, atol=1e-14)
    assert torch.equal(turned[:, width:], x[:, width:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_scores_depend_on_the_distance_alone(interleaved):
    """Two sequences that hold the same tokens two slots apart, the first two of them padding, see the same."""
    query, key, value = draw(1, 2, 4, 8, seed=8), draw(1, 2, 4, 8, seed=9), draw(1, 2, 4, 8, seed=10)
    room = torch.full((1, 2, 6, 8), float("nan"), dtype=torch.float64)
    angles = torch.arange(6)[:, None] / 10.0 ** torch.arange(4, dtype=torch.float64)
    words: dict = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}

    def attend(start):
        at = torch.tensor([start], dtype=torch.int32)
        return attention_with_kvcache(query, room, room, key, value, cache_seqlens=at, cache_leftpad=at, **words).output

    torch.testing.assert_close(attend(0), attend(2), rtol=0, atol=1e-14)
    without = attention_with_kvcache(query, room, room, key, value, cache_seqlens=torch.zeros(1, dtype=torch.int32))
    assert not torch.allclose(attend(0), without.output)


@pytest.mark.parametrize("is_boolean", [False, True], ids=["added", "boolean"])
def test_reference_of_a_cache_counts_a_mask_by_slots(is_boolean):
    query, keys, values = whole_sequences()
    (key_cache, key), (value_cache, value) = split(keys), split(values)
    mask = draw(3, 1, 2, 8, seed=4)
    mask = mask > 0.0 if is_boolean else mask
    mask[..., 0] = True  # every query sees the first slot, or adds 1 to its score
    result = attention_with_kvcache(
        query, key_cache, value_cache, key, value, cache_seqlens=torch.tensor(LENGTHS), attn_mask=mask
    )
    for sequence, held in enumerate(LENGTHS):
        own, total = slice(sequence, sequence + 1), held + 2
        word: dict = {"mask" if is_boolean else "bias": mask[own, ..., :total]}
        whole = attention(query[own], keys[own, :, :total], values[own, :, :total], upper=held, **word)
        torch.testing.assert_close(result.output[own], whole.output, rtol=0, atol=1e-14)
