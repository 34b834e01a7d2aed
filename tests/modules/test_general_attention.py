"""The lecture's general attention layer is MultiheadAttention with one head: no module of its own says more.

The layer: query vectors ``Q`` ``[L, D]``, inputs ``X`` ``[S, Dx]``, learned ``K = X W_K`` and ``V = X W_V``;
``Y = softmax(Q K^T / sqrt(D)) V``. A MultiheadAttention with ``kdim = vdim = Dx`` also has a matrix on the queries and
one on the outputs. With identities there it is that layer; and whatever is there, it is that layer still, because
``(Q W_Q) K^T = Q (K W_Q^T)^T`` and ``(A V) W_O = A (V W_O)``: keys and values have learned both.
"""

import math

import torch

from fastattn import MultiheadAttention
from fastattn.testing import random_tensor

QUERIES, INPUTS, QUERY_SIZE, INPUT_SIZE = 5, 7, 6, 9


def general_attention(queries, inputs, key_matrix, value_matrix):
    scores = queries @ (inputs @ key_matrix).mT / math.sqrt(queries.shape[-1])
    return scores.softmax(dim=-1) @ (inputs @ value_matrix)


def make():
    torch.manual_seed(3)
    return MultiheadAttention(
        QUERY_SIZE, 1, bias=False, kdim=INPUT_SIZE, vdim=INPUT_SIZE, batch_first=True, dtype=torch.float64
    )


def inputs(seed):
    return (
        random_tensor(2, QUERIES, QUERY_SIZE, seed=seed, dtype=torch.float64),
        random_tensor(2, INPUTS, INPUT_SIZE, seed=seed + 1, dtype=torch.float64),
    )


def test_one_head_with_identities_is_the_general_layer(seed):
    layer, (queries, x) = make(), inputs(seed)
    torch.nn.init.eye_(layer.q_proj_weight)
    torch.nn.init.eye_(layer.out_proj.weight)
    expected = general_attention(queries, x, layer.k_proj_weight.mT, layer.v_proj_weight.mT)
    torch.testing.assert_close(layer(queries, x, x, need_weights=False)[0], expected, rtol=0, atol=1e-13)


def test_one_head_is_a_general_layer_whatever_it_learned(seed):
    layer, (queries, x) = make(), inputs(seed)
    key_matrix = layer.k_proj_weight.mT @ layer.q_proj_weight
    value_matrix = layer.v_proj_weight.mT @ layer.out_proj.weight.mT
    expected = general_attention(queries, x, key_matrix, value_matrix)
    torch.testing.assert_close(layer(queries, x, x, need_weights=False)[0], expected, rtol=0, atol=1e-13)


def test_scale_keeps_softmax_from_saturating():
    """Why the lecture divides by sqrt(D): dot products of D terms spread by it, and the gradients vanish without."""

    def gradient(scale):
        scores = (random_tensor(64, 1, 512, seed=1) * random_tensor(64, 32, 512, seed=2)).sum(-1).requires_grad_()
        (found,) = torch.autograd.grad((scores * scale).softmax(-1)[:, 0].sum(), scores)
        return found.abs().mean() / scale

    assert gradient(1.0) < 0.2 * gradient(1 / math.sqrt(512))
