"""Torch's own context parallelism, as far as it runs on a CPU.

The public ``context_parallel`` turns calls of SDPA into its ring for kernels of GPUs alone. Its ring itself takes any
operator that returns an LSE, and is given that of CPUs here by hand.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_aten = torch.ops.aten


def _forward(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Any:
    return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)


def _backward(
    *, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool, grad_out: Tensor
) -> Any:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, 0.0, is_causal
    )


def ring(tensors: Sequence[Tensor], d_output: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Output and gradients by torch's ring, without a mask and without its balancing."""
    _attention: Any = importlib.import_module("torch.distributed.tensor.experimental._context_parallel._attention")
    _attention._cp_options.enable_load_balance = False
    _attention.set_rotate_method("alltoall")
    own = [tensor.detach() for tensor in tensors]
    output, lse, *_ = _attention._templated_ring_attention(group, 2, _forward, *own)
    gradients = _attention._templated_ring_attention_backward(
        group, 2, _backward, d_output, "grad_out", *own, output, lse, is_causal=False
    )
    return [output, *gradients]


@contextlib.contextmanager
def context_parallel(mesh: dist.DeviceMesh, backend: str) -> Generator[None]:
    """Inside of it SDPA of shards is attention over the whole sequence, by torch's public function."""
    from torch.distributed.tensor.experimental import context_parallel

    chosen = sdpa_kernel(SDPBackend.MATH) if backend == "math" else contextlib.nullcontext()
    buffer = torch.zeros(2 * mesh.size())  # it wants one to share out, of a length that it can balance
    with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0]), chosen:
        yield


def sdpa(tensors: Sequence[Tensor], d_output: Tensor, *, is_causal: bool) -> list[Tensor]:
    """Output and gradients of SDPA, which is torch's function at the time of the call."""
    query, key, value = tensors
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    return [output.detach(), *torch.autograd.grad(output, tensors, d_output)]
