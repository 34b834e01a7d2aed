"""``patch_sdpa``: what calls torch's function inside a block runs on ours, and nothing else does."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.testing import random_tensor

TORCH = F.scaled_dot_product_attention


def qkv(*, requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (random_tensor(2, 3, 5, 8, seed=i).requires_grad_(requires_grad) for i in range(3))
    return query, key, value


@pytest.fixture(autouse=True)
def _torch_backend():
    """What is tested is the way there."""
    with fastattn.use_backend("torch"):
        yield
    assert F.scaled_dot_product_attention is TORCH


def test_patch_routes_calls_inside_the_block_alone():
    inputs = qkv()
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    with fastattn.patch_sdpa() as patch:
        torch.testing.assert_close(F.scaled_dot_product_attention(*inputs, is_causal=True), expected)
        torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(*inputs, None, 0.0, True), expected)
    assert F.scaled_dot_product_attention is TORCH
    F.scaled_dot_product_attention(*inputs)
    assert (patch.routed, patch.refused.total()) == (2, 0)
    assert str(patch) == "2 calls on fastattn, 0 traced, 0 to torch"


def test_patch_is_undone_by_an_exception_and_blocks_are_nested():
    inputs, patches = qkv(), []

    def fail():
        with fastattn.patch_sdpa() as outer:
            F.scaled_dot_product_attention(*inputs)
            with fastattn.patch_sdpa() as inner:
                F.scaled_dot_product_attention(*inputs)
            F.scaled_dot_product_attention(*inputs)
            patches.extend((outer, inner))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [patch.routed for patch in patches] == [2, 1]
    assert F.scaled_dot_product_attention is TORCH


def test_patch_entered_again_inside_itself_counts_on():
    patch = fastattn.patch_sdpa()
    with patch, patch:
        F.scaled_dot_product_attention(*qkv())
    assert patch.routed == 1 and F.scaled_dot_product_attention is TORCH


def test_patch_decorates_functions():
    patch = fastattn.patch_sdpa()

    @patch
    def attend(*inputs):
        """Attend."""
        return F.scaled_dot_product_attention(*inputs)

    torch.testing.assert_close(attend(*qkv()), TORCH(*qkv()))
    attend(*qkv())
    assert patch.routed == 2 and attend.__doc__ == "Attend."


def test_patch_affects_the_thread_that_entered_it_alone():
    inside, done, found = threading.Event(), threading.Event(), []

    def other():
        inside.wait(10)
        found.append(F.scaled_dot_product_attention(*qkv()))
        with fastattn.patch_sdpa() as own:
            F.scaled_dot_product_attention(*qkv())
        found.append(own.routed)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fastattn.patch_sdpa() as patch:
        inside.set()
        assert done.wait(10)
        assert F.scaled_dot_product_attention is not TORCH, "the other thread left its block, this one did not"
        F.scaled_dot_product_attention(*qkv())
    thread.join()
    torch.testing.assert_close(found[0], TORCH(*qkv()))
    assert found[1] == 1 and patch.routed == 1


def test_patch_hands_to_torch_what_ours_refuses_and_says_why():
    query, key, value = qkv()
    with fastattn.use_backend("triton"), fastattn.patch_sdpa() as patch:
        output = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    torch.testing.assert_close(output, TORCH(query.double(), key.double(), value.double()))
    assert patch.routed == 0 and patch.refused.total() == 1
    assert "query is torch.float64: it takes float16, bfloat16 and float32" in str(patch)


def test_patch_leaves_an_error_that_torch_raises_too():
    query, key, value = qkv()
    with fastattn.patch_sdpa() as patch, pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(query, key[..., :4], value)
    assert patch.refused.total() == 1


def test_patch_hands_on_tensors_of_other_classes():
    lengths = [torch.randn(n, 2, 8) for n in (3, 5)]
    jagged = torch.nested.nested_tensor(lengths, layout=torch.jagged).transpose(1, 2)
    with fastattn.patch_sdpa() as patch:
        output = F.scaled_dot_product_attention(jagged, jagged, jagged)
    assert output.is_nested and patch.refused.total() == 1


def test_patch_gives_gradients():
    inputs = qkv(requires_grad=True)
    with fastattn.patch_sdpa() as patch:
        output = F.scaled_dot_product_attention(*inputs, enable_gqa=True, scale=0.3)
    found = torch.autograd.grad(output.sum(), inputs)
    wanted = torch.autograd.grad(TORCH(*inputs, scale=0.3).sum(), inputs)
    torch.testing.assert_close(found, wanted)
    assert patch.routed == 1


def test_patch_serves_torchs_own_module():
    module, x = nn.MultiheadAttention(8, 2, batch_first=True), random_tensor(2, 5, 8, seed=0)
    expected, _ = module(x, x, x, need_weights=False)
    with fastattn.patch_sdpa() as patch:
        output, _ = module(x, x, x, need_weights=False)
    torch.testing.assert_close(output, expected)
    assert patch.routed == 1


def test_patch_is_seen_by_torch_compile():
    """A graph that was traced inside is ours, one that was traced outside is torch's, and neither serves the other."""
    compiled = torch.compile(lambda *inputs: F.scaled_dot_product_attention(*inputs), backend="eager", fullgraph=True)
    inputs = qkv()
    expected = TORCH(*inputs)
    torch.testing.assert_close(compiled(*inputs), expected)
    with fastattn.patch_sdpa() as patch:
        for _ in range(3):
            torch.testing.assert_close(compiled(*inputs), expected)
        assert patch.traced == 1
    torch.testing.assert_close(compiled(*inputs), expected)
    with fastattn.patch_sdpa() as again:
        torch.testing.assert_close(compiled(*inputs), expected)
    assert patch.traced == 1, "outside torch's was traced, or its graph ran again"
    assert again.traced <= 1, "the graph of the first block may serve the second"


def test_importing_patches_nothing():
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
