"""Dropout by counter-based random numbers (Philox, Salmon et al. 2011): drawn anew by every kernel, never stored."""

import triton
import triton.language as tl


@triton.jit
def dropout_keep(rows, cols, batch_head, dropout):
    """Which weights dropout keeps: a function of the position alone, so that every kernel draws the same.

    Seed and offset are read from the device: a CUDA graph may change them between replays.
    """
    seed, offset = tl.load(dropout.state_ptr), tl.load(dropout.state_ptr + 1).to(tl.int32)
    zeros = rows * 0 + cols * 0
    # 7 rounds pass the paper's battery of tests (BigCrush); its 10 are a safety margin
    bits, _, _, _ = tl.philox(seed, zeros + cols, zeros + rows, zeros + batch_head, zeros + offset, n_rounds=7)
    return tl.uint_to_uniform_float(bits) >= dropout.p


@triton.jit
def dropout_scale(dropout):
    """What kept weights are multiplied by; 0 where all are dropped."""
    return tl.where(dropout.p < 1.0, 1.0 / tl.maximum(1.0 - dropout.p, 1e-30), 0.0)


@triton.jit
def dropout_factor(rows, cols, batch_head, dropout):
    """What dropout multiplies each weight by: 0 or :func:`dropout_scale`."""
    return tl.where(dropout_keep(rows, cols, batch_head, dropout), dropout_scale(dropout), 0.0)
