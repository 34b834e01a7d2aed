"""What stands for a mask says what transformers' own exact mask says, key by key."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch

import fastattn
from fastattn.testing import random_tensor

masking_utils = pytest.importorskip("transformers.masking_utils", reason="transformers is not installed")

from fastattn.integrations.transformers import masks  # noqa: E402, needs transformers
from fastattn.integrations.transformers.attention import attention_forward  # noqa: E402

BATCH = 2
IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2, 3]])
REMAPS = hasattr(masking_utils, "remap_positions_for_packed_sequence")  # newer ones


def packed(function):
    if REMAPS:
        function = masking_utils.remap_positions_for_packed_sequence(function, POSITIONS)
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(IDS))


def own(batch, head, query, key):
    """A mask function that transformers does not know."""
    return (query + key) % 3 != 0


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(3),
    "wide": masking_utils.sliding_window_causal_mask_function(50),
    "both_sides": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunked": masking_utils.chunked_causal_mask_function(4, torch.tensor([2, 0])),
    "own": masking_utils.and_masks(masking_utils.causal_mask_function, own),
    "or": masking_utils.or_masks(masking_utils.causal_mask_function, own),
}
PACKED = {
    "packed": packed(masking_utils.causal_mask_function),
    "packed_sliding": packed(masking_utils.sliding_window_causal_mask_function(2)),
}
# queries, keys, position of the first query, position of the first key
PLACES = {
    "training": (9, 9, 0, 0),
    "prefill_static": (5, 12, 0, 0),
    "second_chunk": (4, 9, 5, 0),
    "second_chunk_static": (4, 12, 5, 0),
    "decode": (1, 9, 8, 0),
    "sliding_cache": (4, 7, 8, 5),
    "sliding_decode": (1, 3, 8, 6),
    "tensor_offset": (4, 12, torch.tensor(5), 0),
    "tensor_decode": (1, 12, torch.tensor(5), 0),
}
PADDINGS = ("none", "all_seen", "left", "right", "longer")


def make(function, place, padding):
    """Our mask, and the exact one of transformers, for one of the cases."""
    queries, keys, q_offset, kv_offset = place
    length = int(q_offset) + queries
    visible = None
    if padding != "none":
        visible = torch.ones(BATCH, length + 2 * (padding == "longer"), dtype=torch.bool)
        if padding == "left":
            visible[0, :2] = False
        elif padding != "all_seen":
            visible[1, -2:] = False
    arguments = {
        "batch_size": BATCH, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": function, "attention_mask": visible, "device": torch.device("cpu"),
    }  # fmt: skip
    exact = masks.exact_mask(**arguments)
    return masks.attention_mask(**arguments, allow_is_bidirectional_skip=True, dtype=torch.float32), exact


def seen(mask, queries, keys):
    """Which keys attention sees by this mask, ``[B, 1, L, S]``: those whose weights are not 0."""
    query, key = random_tensor(BATCH, 1, queries, 4, seed=0), random_tensor(BATCH, 1, keys, 4, seed=1)
    module = torch.nn.Module()
    _, weights = attention_forward(module, query, key, key, mask, output_attentions=True)
    assert weights is not None
    return torch.nn.functional.pad(weights > 0, (0, keys - weights.shape[3]))


CASES = [
    *itertools.product(FUNCTIONS.items(), PLACES.items(), PADDINGS),
    *itertools.product(PACKED.items(), [("training", PLACES["training"])], ["none"]),
]


@pytest.mark.parametrize(
    ("function", "place", "padding"),
    [pytest.param(f, p, padding, id=f"{name}-{where}-{padding}") for (name, f), (where, p), padding in CASES],
)
def test_mask_hides_what_the_exact_one_hides(function, place, padding):
    queries, keys, _, _ = place
    with fastattn.use_backend("torch"):
        mask, exact = make(function, place, padding)
        if mask is None:
            assert exact.all()
        else:
            assert mask.shape == exact.shape and mask.dtype == torch.bool
            assert torch.equal(mask & True, exact), "what a model that reads the mask would find"
            assert torch.equal(seen(mask, queries, keys), exact)


@pytest.mark.parametrize("name", ["causal", "sliding", "both_sides", "chunked"])
@pytest.mark.parametrize("where", ["training", "second_chunk"])
def test_known_functions_are_carried_as_numbers(name, where):
    mask, _ = make(FUNCTIONS[name], PLACES[where], "left")
    assert isinstance(mask, masks.LazyMask)
    assert all(not torch.is_tensor(word) or word.dim() == 2 for word in mask.words.values())


@pytest.mark.parametrize("function", PACKED.values(), ids=PACKED)
def test_packed_sequences_are_carried_as_documents(function):
    mask, _ = make(function, PLACES["training"], "none")
    assert isinstance(mask, masks.LazyMask) and "document_ids" in mask.words


@pytest.mark.parametrize("name", ["own", "or"])
def test_other_functions_make_the_exact_mask(name):
    mask, exact = make(FUNCTIONS[name], PLACES["training"], "left")
    assert type(mask) is torch.Tensor and torch.equal(mask, exact)


def test_padding_alone_is_stored_once_for_all_queries():
    mask, _ = make(FUNCTIONS["bidirectional"], PLACES["training"], "left")
    assert isinstance(mask, masks.LazyMask) and mask.words.keys() == {"key_padding_mask"}
    assert mask.words["key_padding_mask"].shape == (BATCH, 9)


@pytest.mark.skipif(not REMAPS, reason="this transformers has no positions of packed sequences")
def test_positions_without_their_sequences_are_no_packed_mask():
    """Positions that start anew hide nothing by themselves: they may be of two images in one sequence."""
    remapped = masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, POSITIONS)
    mask, exact = make(masking_utils.and_masks(remapped), PLACES["training"], "none")
    assert type(mask) is torch.Tensor and torch.equal(mask, exact)


def test_lazy_mask_becomes_the_exact_one_where_it_is_used():
    mask, exact = make(FUNCTIONS["sliding"], PLACES["training"], "left")
    assert isinstance(mask, masks.LazyMask)
    assert torch.equal(mask[:, :, 2:, :5], exact[:, :, 2:, :5])
    assert torch.equal(mask.to(torch.float32), exact.float())
    assert torch.equal(torch.cat([mask, mask], dim=2), torch.cat([exact, exact], dim=2))
    assert torch.equal(~mask, ~exact)
    assert mask.detach() is mask and copy.deepcopy(mask) is mask
    stored = io.BytesIO()
    torch.save(mask, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored), exact)
    assert "sliding" not in repr(mask) and repr(mask).startswith("LazyMask((2, 1, 9, 9), {")


def test_without_a_mask_the_layer_says_what_is_seen():
    query = random_tensor(1, 2, 5, 4, seed=0)
    layer: Any = torch.nn.Module()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    near = (torch.arange(5)[:, None] - torch.arange(5)).abs() < 2

    def weights(**words):
        with fastattn.use_backend("torch"):
            _, weights = attention_forward(layer, query, query, query, None, output_attentions=True, **words)
        assert weights is not None
        return weights[0, 0] > 0

    assert weights().all()
    layer.is_causal = True
    assert torch.equal(weights(), causal)
    assert weights(is_causal=False).all()
    assert torch.equal(weights(sliding_window=2), causal & near)
    assert torch.equal(weights(sliding_window=2, is_causal=False), near)
    layer.is_causal = False
    assert weights().all()
    assert torch.equal(weights(is_causal=True), causal)


def test_without_a_mask_more_keys_than_queries_are_refused():
    """As when a model keeps the last queries alone, while the mask was to be None: the diagonal's place is unknown."""
    query, key = random_tensor(1, 2, 3, 4, seed=0), random_tensor(1, 2, 5, 4, seed=1)
    with pytest.raises(ValueError, match=r"attention_mask=None, 3 queries and 5 keys in a Module with is_causal=True"):
        attention_forward(torch.nn.Module(), query, key, key, None, is_causal=True)
    with fastattn.use_backend("torch"):
        output, weights = attention_forward(torch.nn.Module(), query[:, :, :1], key, key, None)
    assert output.shape == (1, 1, 2, 4) and weights is None
