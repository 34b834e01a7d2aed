"""What this package tests its kernels with, for testing yours: inputs that lie awkwardly, and error budgets.

A budget is derived, never guessed: the error against the float64 truth may be twice that of the same computation in
plain PyTorch in the same dtype (the *peer*), plus one unit in the last place.

    query, key, value = attention_inputs(2, 4, 97, 130, 64, dtype=torch.bfloat16, layout="feature_map")
    truth = fastattn.reference.attention(query.double(), key.double(), value.double()).output
    peer = fastattn.reference.attention(query, key, value).output
    assert_within_budget(my_attention(query, key, value), truth=truth, peer=peer, name="output")
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = [
    "BROADCASTS",
    "LAYOUTS",
    "Broadcast",
    "Error",
    "ErrorRecord",
    "Layout",
    "alibi_slopes",
    "assert_within_budget",
    "attention_inputs",
    "attention_mask",
    "attention_sinks",
    "document_ids",
    "error_rows",
    "error_table",
    "key_padding_mask",
    "measure_error",
    "prefix_lengths",
    "random_tensor",
    "record_errors",
    "ulp",
]

Layout = Literal["dense", "heads_inside", "feature_map", "packed", "broadcast", "every_other"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Broadcast = Literal["none", "batch", "head", "query", "key", "batch_head"]
BROADCASTS: tuple[Broadcast, ...] = get_args(Broadcast)

# ------------------------------------------------------------------------------------------------------------- inputs


def random_tensor(
    *shape: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal numbers, the same on every device: drawn on the CPU in float32, then rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def attention_inputs(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    *,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: Layout = "dense",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``[B, H, L, D]``, key ``[B, Hk, S, D]`` and value ``[B, Hk, S, Dv]``, standard normal, without gradient.

    Args:
        batch: ``B``.
        heads: ``H``.
        seqlen_q: ``L``.
        seqlen_k: ``S``.
        head_dim: ``D``.
        kv_heads: ``Hk``, a divisor of ``H``; default ``H``.
        value_dim: ``Dv``; default ``D``.
        dtype: any floating dtype.
        device: where they lie; the values do not depend on it.
        layout: how they lie in memory. ``dense``: contiguous. ``heads_inside``: views of ``[B, L, H, D]``, as a linear
            layer leaves them. ``feature_map``: views of ``[B, H * D, L]``, the ``[B, C, H * W]`` of a convolution.
            ``packed``: slices of one ``[B, max(L, S), (H + Hk) * D + Hk * Dv]``, as a packed projection leaves them.
            ``broadcast``: stride 0 over the batch (query) and over the heads (key and value). ``every_other``: every
            second element of a buffer, starting at the second, so that nothing is aligned.
        seed: of the random numbers.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    value_dim = head_dim if value_dim is None else value_dim
    if layout == "packed":
        widths = (heads * head_dim, kv_heads * head_dim, kv_heads * value_dim)
        packed = random_tensor(batch, max(seqlen_q, seqlen_k), sum(widths), seed=seed, dtype=dtype, device=device)
        query, key, value = packed.split(widths, dim=2)
        return (
            query[:, :seqlen_q].unflatten(2, (heads, head_dim)).transpose(1, 2),
            key[:, :seqlen_k].unflatten(2, (kv_heads, head_dim)).transpose(1, 2),
            value[:, :seqlen_k].unflatten(2, (kv_heads, value_dim)).transpose(1, 2),
        )

    def draw(index: int, heads: int, length: int, size: int) -> Tensor:
        def normal(*shape: int) -> Tensor:
            return random_tensor(*shape, seed=3 * seed + index, dtype=dtype, device=device)

        if layout == "heads_inside":
            return normal(batch, length, heads, size).transpose(1, 2)
        if layout == "feature_map":
            return normal(batch, heads * size, length).unflatten(1, (heads, size)).transpose(2, 3)
        if layout == "broadcast":
            shape = (1, heads, length, size) if index == 0 else (batch, 1, length, size)
            return normal(*shape).expand(batch, heads, length, size)
        if layout == "every_other":
            return normal(batch, heads, length, 2 * size + 1)[..., 1::2]
        if layout == "dense":
            return normal(batch, heads, length, size)
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}")

    return (
        draw(0, heads, seqlen_q, head_dim),
        draw(1, kv_heads, seqlen_k, head_dim),
        draw(2, kv_heads, seqlen_k, value_dim),
    )


def attention_mask(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    *,
    dtype: torch.dtype = torch.bool,
    broadcast: Broadcast = "none",
    hidden: float = 0.25,
    block: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """A random ``attn_mask`` that broadcasts to ``[B, H, L, S]``.

    Args:
        batch: ``B``.
        heads: ``H``.
        seqlen_q: ``L``.
        seqlen_k: ``S``.
        dtype: ``torch.bool`` (True = may attend), or floating: normal numbers to add, ``-inf`` where it hides.
        broadcast: the axis of size 1 (``batch_head``: both of them, as a 2-D ``[L, S]`` mask).
        hidden: the probability of hiding a pair. Rows that may see nothing come up, with ``key`` most of all.
        block: hide whole blocks of ``block x block`` pairs, as block-sparse attention does, instead of single pairs.
        device: where it lies; the values do not depend on it.
        seed: of the random numbers.
    """
    if broadcast not in BROADCASTS:
        raise ValueError(f"broadcast={broadcast!r}: expected one of {', '.join(map(repr, BROADCASTS))}")
    names = ("batch", "head", "query", "key")
    shape = [1 if name == broadcast else size for name, size in zip(names, (batch, heads, seqlen_q, seqlen_k))]
    if broadcast == "batch_head":
        shape = shape[2:]
    generator = torch.Generator().manual_seed(seed)
    coarse = [*shape[:-2], *(-(-size // block) for size in shape[-2:])]
    hides = torch.rand(coarse, generator=generator) < hidden
    if block > 1:
        for axis in (-2, -1):
            hides = hides.repeat_interleave(block, dim=axis).narrow(axis, 0, shape[axis])
    if dtype == torch.bool:
        return ~hides.to(device)
    bias = torch.randn(shape, generator=generator).masked_fill(hides, -math.inf)
    return bias.to(device=device, dtype=dtype)


def key_padding_mask(
    batch: int, seqlen_k: int, *, minimum: int = 1, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """A random ``[B, S]`` padding mask, True = padding; every sequence keeps at least ``minimum`` keys."""
    generator = torch.Generator().manual_seed(seed)
    low = min(minimum, seqlen_k)
    lengths = torch.randint(low, seqlen_k + 1, (batch, 1), generator=generator)
    return (torch.arange(seqlen_k) >= lengths).to(device)


def document_ids(
    batch: int,
    length: int,
    *,
    shortest: int = 1,
    longest: int = 100,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Random ``[B, length]`` document ids, as packing leaves them: document 0, 1, 2, ... one behind the other.

    Args:
        batch: ``B``.
        length: of the packed sequence.
        shortest: the fewest tokens of a document (the last one is cut off).
        longest: the most tokens of a document.
        device: where they lie; the values do not depend on it.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(shortest, longest + 1, (batch, length), generator=generator).cumsum(dim=1)
    positions = torch.arange(length).expand(batch, length).contiguous()
    return torch.searchsorted(starts, positions, right=True).to(device=device, dtype=torch.int32)


def prefix_lengths(batch: int, seqlen_k: int, *, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """A random ``[B]`` tensor of prefixes, each of 0 to ``seqlen_k`` keys."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, seqlen_k + 1, (batch,), generator=generator).to(device=device, dtype=torch.int32)


def alibi_slopes(
    heads: int,
    *,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Random ALiBi slopes ``[H]``, or ``[B, H]``, of the magnitudes of arXiv:2108.12409: 2 to the power -8 to -1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (heads,) if batch is None else (batch, heads)
    return torch.exp2(-1 - 7 * torch.rand(shape, generator=generator)).to(device=device, dtype=dtype)


def attention_sinks(
    heads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """Random sinks ``[H]``, some of the size of a row's largest scores: normal around 1, of standard deviation 2."""
    return (1 + 2 * random_tensor(heads, seed=seed)).to(device=device, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------- errors


class Error(NamedTuple):
    """How far a tensor is from the truth, over the elements where the truth is finite."""

    maximum: float
    rms: float


class ErrorRecord(NamedTuple):
    """One tensor that :func:`assert_within_budget` looked at. Plain values: processes can exchange them."""

    backend: str
    feature: str
    name: str
    dtype: str
    count: int
    error: tuple[float, float]
    peer_error: tuple[float, float]


_record: list[ErrorRecord] | None = None


@contextlib.contextmanager
def record_errors() -> Generator[list[ErrorRecord]]:
    """Collect an :class:`ErrorRecord` of every :func:`assert_within_budget` inside the ``with`` block."""
    global _record
    previous, _record = _record, []
    try:
        yield _record
    finally:
        _record = previous


def ulp(magnitude: float, dtype: torch.dtype) -> float:
    """The distance of ``dtype``'s neighbouring numbers at ``magnitude``."""
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(max(abs(magnitude), info.smallest_normal)))
    return info.eps * 2.0**exponent


def measure_error(actual: Tensor, truth: Tensor) -> Error:
    """Maximum and root-mean-square of ``actual - truth`` where ``truth`` is finite; NaN and inf there give inf."""
    finite = torch.isfinite(truth)
    difference = (actual.detach().double() - truth.detach().double())[finite].abs()
    if difference.numel() == 0:
        return Error(0.0, 0.0)
    if not bool(torch.isfinite(difference).all()):
        return Error(math.inf, math.inf)
    return Error(difference.max().item(), difference.square().mean().sqrt().item())


def assert_within_budget(
    actual: Tensor,
    *,
    truth: Tensor,
    peer: Tensor,
    name: str,
    allowance: float = 0.0,
    feature: str = "",
    backend: str = "",
) -> None:
    """Raise unless ``actual`` is about as close to ``truth`` as plain PyTorch in the same dtype comes.

    Maximum and RMS error may each be twice the peer's, plus one ulp of the dtype at the truth's largest magnitude.
    Where the truth is infinite, ``actual`` has to be the same infinity; where it is NaN, anything goes.

    Args:
        actual: what is tested.
        truth: the same in float64, from the same (rounded) inputs.
        peer: the same in ``actual``'s dtype, in plain PyTorch.
        name: what it is, for the message.
        allowance: an absolute error that the algorithm has by its nature and the peer has not, derived by the caller.
        feature: what the case exercises, for the error table.
        backend: what computed it, for the error table.

    Raises:
        AssertionError: it is not; the message shows both errors, the budget, and the worst element.
        ValueError: the peer is not finite where the truth is: it can grant no budget.
    """
    dtype, dtype_name, peer_name = actual.dtype, *(str(t.dtype).removeprefix("torch.") for t in (actual, peer))
    label = f"{name} {tuple(actual.shape)} {dtype_name}"
    if not actual.shape == truth.shape == peer.shape:
        raise AssertionError(f"{label}: the truth is {tuple(truth.shape)}, the peer {tuple(peer.shape)}")
    actual, truth, peer = (t.detach().double() for t in (actual, truth, peer))
    error, peer_error = measure_error(actual, truth), measure_error(peer, truth)
    if math.isinf(peer_error.maximum):
        raise ValueError(f"{label}: the peer is not finite where the truth is, so there is no budget to derive")
    finite = torch.isfinite(truth)
    magnitude = truth[finite].abs().max().item() if bool(finite.any()) else 0.0
    if _record is not None:
        count = int(finite.sum())
        _record.append(ErrorRecord(backend, feature, name, peer_name, count, tuple(error), tuple(peer_error)))

    grain = ulp(magnitude, dtype) + allowance
    budget = Error(*(2.0 * e + grain for e in peer_error))
    infinite = torch.isinf(truth)
    wrong_infinities = int((actual[infinite] != truth[infinite]).sum())
    if error.maximum <= budget.maximum and error.rms <= budget.rms and not wrong_infinities:
        return
    distance = torch.where(finite, (actual - truth).abs(), 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    distance = torch.where(infinite & (actual != truth), math.inf, distance)
    worst = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
    raise AssertionError(
        f"{label} is outside its error budget (2 x peer + {grain:.3g}; largest truth {magnitude:.3g}):\n"
        f"  max error {error.maximum:.3e}, peer {peer_error.maximum:.3e}, budget {budget.maximum:.3e}\n"
        f"  rms error {error.rms:.3e}, peer {peer_error.rms:.3e}, budget {budget.rms:.3e}\n"
        f"  worst at {list(worst)}: got {actual[worst].item():.6g}, truth {truth[worst].item():.6g}, "
        f"peer {peer[worst].item():.6g}\n"
        f"  {int((~torch.isfinite(actual) & finite).sum())} elements are not finite where the truth is, "
        f"{wrong_infinities} of {int(infinite.sum())} infinities are wrong"
    )


# -------------------------------------------------------------------------------------------------------- error table


def error_rows(records: Iterable[ErrorRecord]) -> list[dict[str, Any]]:
    """The records by backend, feature and dtype, forward and gradients apart, ready for JSON.

    Tensors named ``d_...`` are gradients. Each row holds ``backend``, ``feature``, ``dtype``, ``pass`` (``forward`` or
    ``gradients``), ``tensors`` (how many went into it), ``max_error``, ``rms_error``, ``peer_max_error`` and
    ``peer_rms_error``.
    """
    groups: dict[tuple[str, str, str, str], list[ErrorRecord]] = {}
    for record in records:
        direction = "gradients" if record.name.startswith("d_") else "forward"
        groups.setdefault((record.backend, record.feature, record.dtype, direction), []).append(record)

    def summary(errors: list[tuple[float, float]], counts: list[int]) -> tuple[float, float]:
        squares = sum(count * rms**2 for count, (_, rms) in zip(counts, errors))
        return max(maximum for maximum, _ in errors), math.sqrt(squares / max(1, sum(counts)))

    rows = []
    for (backend, feature, dtype, direction), members in groups.items():
        counts = [m.count for m in members]
        ours, peers = summary([m.error for m in members], counts), summary([m.peer_error for m in members], counts)
        rows.append(
            {
                "backend": backend,
                "feature": feature,
                "dtype": dtype,
                "pass": direction,
                "tensors": len(members),
                "max_error": ours[0],
                "rms_error": ours[1],
                "peer_max_error": peers[0],
                "peer_rms_error": peers[1],
            }
        )
    return sorted(rows, key=lambda row: (row["backend"], row["feature"], row["dtype"], row["pass"]))


def error_table(records: Iterable[ErrorRecord]) -> str:
    """:func:`error_rows` as text, a line for each backend, feature and dtype: ours beside eager's."""
    lines: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in error_rows(records):
        lines.setdefault((row["backend"], row["feature"], row["dtype"]), {})[row["pass"]] = row
    if not lines:
        return "no errors were recorded"
    width = max(len(feature) for _, feature, _ in lines)
    cells = "{:>9} {:>9} {:>9} {:>9}"
    head = f"{'backend':8} {'feature':{width}} {'dtype':8}"
    columns = cells.format("max", "eager", "rms", "eager")
    table = [
        f"{'error against float64':{len(head)}}  {'forward':^{len(columns)}}  {'gradients':^{len(columns)}}".rstrip(),
        f"{head}  {columns}  {columns}",
    ]
    for (backend, feature, dtype), passes in lines.items():
        line = f"{backend:8} {feature:{width}} {dtype:8}"
        for direction in ("forward", "gradients"):
            row = passes.get(direction)
            numbers = ("max_error", "peer_max_error", "rms_error", "peer_rms_error")
            line += "  " + cells.format(*(f"{row[n]:.2e}" if row else "" for n in numbers))
        table.append(line.rstrip())
    return "\n".join(table)
