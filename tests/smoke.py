"""What anybody would try first with an installed package: run by tests/wheel.py with the Python of such an environment.

``python -I smoke.py torch README.md`` runs a few calls beside torch's, then README's code.
``python -I smoke.py triton``, under ``TRITON_INTERPRET=1``, runs the kernels: they were installed too.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn


def attend(backend: Literal["torch", "triton"]) -> None:
    """Attention and its gradients beside torch's, query and key of unequal length."""
    leaves = [torch.randn(2, 4, length, 16, requires_grad=True) for length in (9, 13, 13)]
    query, key, value = leaves
    for is_causal in (False, True):
        output = fastattn.attention(query, key, value, is_causal=is_causal, backend=backend)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        d_output = torch.randn_like(expected)
        _same(output, expected)
        _same(torch.autograd.grad(output, leaves, d_output), torch.autograd.grad(expected, leaves, d_output))


def modules() -> None:
    """Modules that take the weights of torch's, in evaluation and in training."""
    x = torch.randn(2, 10, 64)
    theirs = nn.MultiheadAttention(64, 4, batch_first=True)
    ours = fastattn.MultiheadAttention(64, 4, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    _same(ours(x, x, x), theirs(x, x, x))
    gradients = [torch.autograd.grad(m(x, x, x)[0].square().sum(), tuple(m.parameters())) for m in (ours, theirs)]
    _same(*gradients)

    weight, bias = torch.randn(64), torch.randn(64)
    _same(fastattn.layer_norm(x, (64,), weight, bias), F.layer_norm(x, (64,), weight, bias))
    _same(fastattn.add_layer_norm(x, x, weight, bias), F.layer_norm(x + x, (64,), weight, bias))
    _same(fastattn.AddRMSNorm(64)(x), nn.RMSNorm(64)(x))


def _same(actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def run_page(page: Path) -> int:
    """Run every block of Python in a page; how many there are."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, page.name, "exec"), {})
    return len(blocks)


def main(backend: Literal["torch", "triton"], *pages: str) -> None:
    """Raise where something is not as it should be, and say what was tried."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    attend(backend)
    if backend == "torch":
        modules()
    blocks = sum(run_page(Path(page)) for page in pages)
    print(f"fastattn in {Path(fastattn.__file__).parent}: {backend} is right, blocks of pages that ran: {blocks}")


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
