"""S5 to S7 without any training: what holds of self-attention whatever its weights are.

S5: permuted inputs give permuted outputs, unless a positional encoding says where each stands. S6: behind a causal mask
no output depends on a later input. S7: H heads are H single heads side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastattn
from benchmarks.lecture.experiment import Experiment
from fastattn import reference
from fastattn.models.transformer import TransformerConfig, TransformerTrunk
from fastattn.modules.positional_encoding import LearnedPositionalEncoding
from fastattn.testing import ulp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTH, WIDTH, HEADS = 16, 8, 4
# Sums have at most so many terms. Each may cost half a unit in the last place, in both of the results compared
ULPS = LENGTH + WIDTH

EXACT_SUMS, ROUNDED = "its formula in exact sums, float64", "reference, float64 rounded to float32"
TO_THE_BIT = (EXACT_SUMS, ROUNDED)
WITH_POSITIONS = "MultiheadAttention behind learned positions"
UNMASKED = "self-attention"

Vectors = Sequence[Sequence[float]]


# ----------------------------------------------------------------------------------------------------- S5: permutations


def self_attention(x: Tensor, weights: Tensor) -> Tensor:
    """The reference's single head over ``x`` ``[L, E]``; ``weights`` ``[3, E, E]`` make queries, keys and values."""
    query, key, value = (x @ weight for weight in weights)
    return reference.attention(query[None, None], key[None, None], value[None, None]).output[0, 0]


def self_attention_of_exact_sums(x: Vectors, weights: Sequence[Vectors]) -> list[list[float]]:
    """The same formula, every sum rounded once: as if added up exactly, so that the order of its terms cannot matter.

    In floating point ``(a + b) + c`` is not ``a + (b + c)``, and softmax and the weighted sum add up over the keys in
    the order in which these come. ``math.fsum`` gives the float nearest to the true sum.
    """

    def dot(a: Sequence[float], b: Sequence[float]) -> float:
        return math.fsum(p * q for p, q in zip(a, b))

    query, keys, values = ([[dot(row, column) for column in zip(*weight)] for row in x] for weight in weights)
    outputs = []
    for q in query:
        scores = [dot(q, k) / math.sqrt(len(q)) for k in keys]
        largest = max(scores)
        exponentials = [math.exp(score - largest) for score in scores]
        total = math.fsum(exponentials)
        outputs.append([dot([e / total for e in exponentials], feature) for feature in zip(*values)])
    return outputs


def equivariance(seed: int) -> list[dict[str, Any]]:
    """S5: how far f(s(x)) is from s(f(x)), by each way to compute f."""
    torch.manual_seed(seed)
    x, weights = torch.randn(LENGTH, WIDTH).double(), torch.randn(3, WIDTH, WIDTH).double() / math.sqrt(WIDTH)
    order = torch.randperm(LENGTH)
    layer = fastattn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    positions = LearnedPositionalEncoding(LENGTH, WIDTH, std=1.0)

    def exactly(x: Tensor) -> Tensor:
        return torch.tensor(self_attention_of_exact_sums(x.tolist(), weights.tolist()), dtype=torch.float64)

    def by_layer(x: Tensor) -> Tensor:
        return layer(x[None], x[None], x[None], need_weights=False)[0][0]

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "reference, float64": lambda x: self_attention(x, weights),
        ROUNDED: lambda x: self_attention(x, weights).float(),
        EXACT_SUMS: exactly,
        "MultiheadAttention, float32": lambda x: by_layer(x.float()),
        WITH_POSITIONS: lambda x: by_layer(positions(x.float())),
    }
    with torch.no_grad():
        return [_row("S5", "f(s(x)) = s(f(x))", way, f(x[order]), f(x)[order]) for way, f in ways.items()]


# ------------------------------------------------------------------------------------------------------- S6: causality


def dependence(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``[L, L]``: the norm of the derivative of each output of ``f`` by each input ``x`` ``[L, E]``."""
    jacobian = torch.autograd.functional.jacobian(f, x)
    assert isinstance(jacobian, Tensor)
    return jacobian.norm(dim=(1, 3))  # of [L, E, L, E]


def dependences(seed: int) -> dict[str, Tensor]:
    """S6: who depends on whom, in self-attention without a mask, with the causal one, and in a stack of two blocks."""
    torch.manual_seed(seed)
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    layer = fastattn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    trunk = TransformerTrunk(2, TransformerConfig(WIDTH, HEADS, layers=2, activation="gelu"), causal=True).double()

    def plain(x: Tensor) -> Tensor:
        return layer(x[None], x[None], x[None], need_weights=False)[0][0]

    def masked(x: Tensor) -> Tensor:
        return layer(x[None], x[None], x[None], attn_mask=hidden, is_causal=True, need_weights=False)[0][0]

    def blocks(x: Tensor) -> Tensor:
        for block in trunk.layers:
            x = block(x[None], hidden, is_causal=True)[0]
        return x

    return {
        UNMASKED: dependence(plain, x),
        "masked self-attention": dependence(masked, x),
        "two causal blocks": dependence(blocks, x),
    }


# ----------------------------------------------------------------------------------------------------------- S7: heads


def heads(seed: int) -> list[dict[str, Any]]:
    """S7: a layer of H heads against H layers of one head, each with its own rows of the same parameters."""
    torch.manual_seed(seed)
    rows = []
    for dtype in (torch.float64, torch.float32):
        layer = fastattn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True, dtype=dtype)
        x = torch.randn(1, LENGTH, WIDTH).to(dtype)
        size = WIDTH // HEADS
        with torch.no_grad():
            together = layer(x, x, x, need_weights=False)[0]
            w_q, w_k, w_v = (w.split(size) for w in layer.in_proj_weight.chunk(3))
            single = [
                fastattn.attention((x @ w_q[h].T)[None], (x @ w_k[h].T)[None], (x @ w_v[h].T)[None])[0]
                for h in range(HEADS)
            ]
            alone = torch.cat(single, dim=-1) @ layer.out_proj.weight.T
        way = f"MultiheadAttention, {str(dtype).removeprefix('torch.')}"
        rows.append(_row("S7", f"{HEADS} heads = {HEADS} single heads", way, together, alone))
    return rows


# ------------------------------------------------------------------------------------------------------ the experiment


def _row(system: str, what: str, way: str, a: Tensor, b: Tensor) -> dict[str, Any]:
    """How far two results are apart, in units in the last place of the largest number in them."""
    apart = (a - b).abs().max().item() / ulp(b.abs().max().item(), b.dtype)
    return {"system": system, "property": what, "computed by": way, "ulp apart": apart, "same bits": torch.equal(a, b)}


def run(quick: bool, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Rows, claims, and the maps of who depends on whom; both forms are one."""
    with torch.random.fork_rng(devices=[]):
        rows, maps = equivariance(seed) + heads(seed), dependences(seed)
    claims: list[dict[str, Any]] = []
    for row in rows:
        what, apart = f"{row['system']}, {row['property']}, ulp apart: {row['computed by']}", row["ulp apart"]
        if row["computed by"] == WITH_POSITIONS:
            # A hundredth of the largest result, in float32: no rounding
            claims.append({"text": f"{what}, at least", "value": apart, "bound": 1e5, "holds": apart >= 1e5})
        else:
            bound = 0 if row["computed by"] in TO_THE_BIT else ULPS
            claims.append({"text": f"{what}, at most", "value": apart, "bound": bound, "holds": apart <= bound})
    for name, matrix in maps.items():
        later, earlier = matrix.triu(1).max().item(), matrix[torch.ones_like(matrix).tril().bool()].min().item()
        rows.append({
            "system": "S6", "property": "no output depends on a later input", "computed by": name,
            "largest derivative by a later input": later, "least by an earlier one": earlier,
        })  # fmt: skip
        what = f"S6, derivatives by later inputs: {name}"
        if name == UNMASKED:
            claims.append({"text": f"{what}, above", "value": later, "bound": 0.0, "holds": later > 0})
        else:
            claims.append({"text": f"{what}, all", "value": later, "bound": 0.0, "holds": later == 0})
        text = f"S6, derivatives by earlier inputs: {name}, all above"
        claims.append({"text": text, "value": earlier, "bound": 0.0, "holds": earlier > 0})
    say(f"{sum(claim['holds'] for claim in claims)} of {len(claims)} properties hold")
    return {"rows": rows, "claims": claims, "maps": {name: matrix.tolist() for name, matrix in maps.items()}}


def draw(result: dict[str, Any]) -> Figure:
    """Who depends on whom; white is exactly nothing."""
    import numpy
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    from benchmarks.reporting.looks import WIDTH, title

    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    title(figure, "How much each output depends on each input (norm of the derivative; white: exactly 0)")
    maps = {name: numpy.array(matrix) for name, matrix in result["maps"].items()}
    least = min(matrix[matrix > 0].min() for matrix in maps.values())
    scale = LogNorm(least / 5, max(matrix.max() for matrix in maps.values()))
    panels = figure.subplots(1, len(maps), sharey=True)
    for axes, (name, matrix) in zip(panels, maps.items()):
        shown = axes.imshow(numpy.ma.masked_equal(matrix, 0.0), cmap="Blues", norm=scale, interpolation="nearest")
        axes.set_title(name)
        axes.set(xlabel="input", xticks=range(0, LENGTH, 5), yticks=range(0, LENGTH, 5))
        axes.grid(False)
    panels[0].set_ylabel("output")
    figure.colorbar(shown, ax=panels)
    return figure


EXPERIMENT = Experiment(
    "properties",
    ("S5", "S6", "S7"),
    "Self-attention knows no order, masked it sees nothing later, and its heads are independent: by any weights.",
    run,
    draw,
)
