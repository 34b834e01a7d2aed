"""Jagged nested tensors in attention, modules and whole encoders: what the padded batch gives, without its padding."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nested import nested_tensor_from_jagged

import fastattn
from fastattn.testing import random_tensor

N, L, E, H = 4, 9, 16, 2
LENGTHS = torch.tensor([3, 9, 0, 6])
PADDING = torch.arange(L) >= LENGTHS[:, None]
LEFT_PADDING = PADDING.flip(1)


def draw(*shape, seed=0):
    return random_tensor(*shape, seed=seed)


def zero_in(padding, tensor):
    return tensor.masked_fill(padding[..., None], 0)


@pytest.mark.parametrize("padding", [PADDING, LEFT_PADDING], ids=["right", "left"])
def test_packed_batch_comes_back(padding):
    x = draw(N, L, 3, 2).requires_grad_()
    packed: Any = fastattn.pack(x, padding)
    assert packed.offsets().tolist() == [0, 3, 12, 12, 18]
    back = fastattn.unpack(packed, padding, padding_value=-1.0)
    assert torch.equal(back[~padding], x[~padding])
    assert torch.equal(back[padding], torch.full_like(back[padding], -1.0))
    (d_x,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(d_x, (~padding)[..., None, None].expand_as(x).float())


def module_of(kind, train, **options):
    torch.manual_seed(0)
    return kind(E, H, batch_first=True, dropout=0.0, **options).train(train)


def compare(packed_call, padded_call, x, padding=PADDING):
    """Results and gradients of ``x`` where there is no padding, in a packed and in a padded run."""
    found = fastattn.unpack(packed_call(fastattn.pack(x, padding)), padding)
    expected = zero_in(padding, padded_call(x))
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=1e-5)
    of_output = draw(*found.shape, seed=5)
    for one, other in zip(*(torch.autograd.grad((t * of_output).sum(), x) for t in (found, expected))):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padding", [PADDING, LEFT_PADDING], ids=["right", "left"])
def test_encoder_runs_packed_from_first_layer_to_last(train, norm_first, padding):
    layer = module_of(fastattn.TransformerEncoderLayer, train, dim_feedforward=24, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, norm=nn.LayerNorm(E)).train(train)
    x = draw(N, L, E).requires_grad_()
    compare(encoder, lambda x: encoder(x, src_key_padding_mask=padding), x, padding)
    above = torch.ones(L, L, dtype=torch.bool).triu(1)
    if padding is PADDING:  # where causality counts from the same place in a row as in a sequence
        compare(
            lambda packed: encoder(packed, mask=above, is_causal=True),
            lambda x: encoder(x, mask=above, src_key_padding_mask=padding),
            x,
        )


@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_attends_to_a_packed_memory(norm_first):
    layer = module_of(fastattn.TransformerDecoderLayer, True, dim_feedforward=24, norm_first=norm_first)
    x, memory = draw(N, L, E).requires_grad_(), draw(N, L, E, seed=1)
    of_memory = PADDING.flip(0)
    above = torch.ones(L, L, dtype=torch.bool).triu(1)
    compare(
        lambda packed: layer(packed, fastattn.pack(memory, of_memory), tgt_is_causal=True),
        lambda x: layer(
            x, memory, tgt_mask=above, tgt_key_padding_mask=PADDING, memory_key_padding_mask=of_memory
        ),
        x,
    )  # fmt: skip


def test_fused_model_takes_packed_batches():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    fused = copy.deepcopy(plain)
    fastattn.fuse(fused)
    x = draw(N, L, E).requires_grad_()
    compare(fused, lambda x: torch.nan_to_num(plain(x, src_key_padding_mask=PADDING)), x, PADDING.clone())


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "boolean": {"attn_mask": draw(L, L, seed=3) > 0.7},
    "floating": {"attn_mask": draw(L, L, seed=3)},
    "of heads": {"attn_mask": draw(N * H, L, L, seed=3)},
    "of keys": {"key_padding_mask": draw(N, L, seed=4) > 0.8},
    "of keys, floating": {"key_padding_mask": draw(N, L, seed=4)},
    "both": {"attn_mask": draw(L, L, seed=3), "key_padding_mask": draw(N, L, seed=4)},
}


@pytest.mark.parametrize("masks", MASKS)
def test_multihead_attention_takes_masks_by_positions_inside_a_sequence(masks):
    attention = module_of(fastattn.MultiheadAttention, True)
    given = MASKS[masks]
    padding = {**given}
    hidden = padding.pop("key_padding_mask", torch.zeros(N, L, dtype=torch.bool))
    hidden = hidden | PADDING if hidden.dtype == torch.bool else hidden.masked_fill(PADDING, -torch.inf)
    x = draw(N, L, E).requires_grad_()
    compare(
        lambda packed: attention(packed, packed, packed, need_weights=False, **given)[0],
        lambda x: attention(x, x, x, need_weights=False, key_padding_mask=hidden, **padding)[0],
        x,
    )


def jagged(*shape, seed=0, offsets=None):
    """``[N, H, j, shape]``."""
    offsets = torch.tensor([0, 3, 7]) if offsets is None else offsets
    values = draw(int(offsets[-1]), H, *shape, seed=seed).requires_grad_()
    return nested_tensor_from_jagged(values, offsets).transpose(1, 2), values


def test_attention_of_jagged_tensors_is_that_of_packed_ones():
    offsets, slopes = torch.tensor([0, 3, 7]), torch.ones(H)
    (query, q), (key, k), (value, v) = (jagged(8, seed=seed, offsets=offsets) for seed in range(3))
    words: dict[str, Any] = {"is_causal": True, "alibi_slopes": slopes, "return_lse": True}
    output, lse = fastattn.attention(query, key, value, **words)
    expected = fastattn.attention_varlen(q, k, v, offsets.int(), **words)
    jagged_output: Any = output
    assert output.shape == query.shape  # the same sequences, so that both can be added
    assert torch.equal(jagged_output.transpose(1, 2).values(), expected[0])
    assert torch.equal(lse.transpose(1, 2).values().transpose(0, 1), expected[1])
    (found,) = torch.autograd.grad((output + query).values().sum(), q)
    (wanted,) = torch.autograd.grad((expected[0] + q).sum(), q)
    torch.testing.assert_close(found, wanted)
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    hidden[:, 0] = True
    masked: Any = fastattn.attention(query, key, value, key_padding_mask=hidden)
    visible: Any = fastattn.attention_varlen(q, k, v, offsets.int(), attn_mask=~hidden[:, None, None])
    assert torch.equal(masked.transpose(1, 2).values(), visible)


def test_wrong_arguments_are_named():
    (query, _), dense = jagged(8), draw(2, H, 4, 8)
    with pytest.raises(TypeError, match=r"key is torch.strided: expected a jagged nested tensor"):
        fastattn.attention(query, dense, dense)
    with pytest.raises(ValueError, match=r"expected a jagged tensor \[sequences, heads, length, head_dim\]"):
        fastattn.attention(query.transpose(1, 2), query, query)
    with pytest.raises(ValueError, match="need_weights=True"):
        fastattn.attention(query, query, query, need_weights=True)
    with pytest.raises(ValueError, match="document_ids with jagged tensors"):
        fastattn.attention(query, query, query, document_ids=torch.zeros(1, 4).int())
    with pytest.raises(ValueError, match="key_padding_mask has shape"):
        fastattn.attention(query, query, query, key_padding_mask=torch.zeros(3, 4, dtype=torch.bool))
    x, attention = draw(N, L, E), module_of(fastattn.MultiheadAttention, False)
    packed = fastattn.pack(x, PADDING)
    with pytest.raises(RuntimeError, match="need_weights=False"):
        attention(packed, packed, packed)
    with pytest.raises(TypeError, match=r"key is torch\.strided"):
        attention(packed, x, x, need_weights=False)
    with pytest.raises(NotImplementedError, match="add_zero_attn"):
        module_of(fastattn.MultiheadAttention, False, add_zero_attn=True)(packed, packed, packed, need_weights=False)
    with pytest.raises(TypeError, match=r"key_padding_mask is torch\.float32"):
        fastattn.pack(x, PADDING.float())
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(4, 8\) for x of shape \(4, 9, 16\)"):
        fastattn.pack(x, PADDING[:, 1:])
    with pytest.raises(TypeError, match=r"packed is torch\.strided"):
        fastattn.unpack(x, PADDING)
    with pytest.raises(ValueError, match="other lengths than packed has"):
        fastattn.unpack(packed, PADDING.flip(0))
