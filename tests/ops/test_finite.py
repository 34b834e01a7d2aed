"""NaN and inf are found wherever they are, and a sum that overflows where no element does is not taken for one."""

import math

import pytest
import torch

from fastattn.ops.common.finite import is_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_is_found(value, dtype):
    whole, other = torch.ones(3, 5, dtype=dtype), torch.ones(2, dtype=dtype)
    assert is_finite(whole, other)
    whole[1, 2] = value
    assert not is_finite(other, whole)
    whole[2, 2] = -value
    assert not is_finite(whole)


def test_float16_whose_sum_is_beyond_float16_is_finite():
    large = torch.full((4, 512), 60000.0, dtype=torch.float16)
    assert math.isinf(large.sum())
    assert is_finite(large)
    assert is_finite(torch.empty(0), large.requires_grad_())
