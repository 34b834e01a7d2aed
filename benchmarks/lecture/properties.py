"""S4 to S7 without any training: what holds of attention whatever its weights are.

S4: over sqrt(D), scores are as large at any D; plain, they grow with it, and softmax of them is nearly one-hot. S5:
permuted inputs give permuted outputs, unless a positional encoding says where each stands. S6: behind a causal mask no
output depends on a later input. S7: H heads are H single heads side by side.
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

HEAD_DIMS, KEYS = (1, 4, 16, 64, 256, 1024), 64
SCALED, UNSCALED = "entropy, scores over sqrt(D)", "entropy, plain scores"

Vectors = Sequence[Sequence[float]]


# ------------------------------------------------------------------------------------------------------- S4: the scale


def entropies(seed: int) -> list[dict[str, Any]]:
    """S4: the entropy of a row's weights over the logarithm of the number of keys, 1 where all count alike, 0 where one
    does alone; on average, for queries and keys of D normal numbers."""
    torch.manual_seed(seed)
    rows = []
    for head_dim in HEAD_DIMS:
        query, key = torch.randn(2, 1, 1, KEYS, head_dim)
        row: dict[str, Any] = {"system": "S4", "property": "spread of the weights", "computed by": f"D = {head_dim}"}
        for name, scale in ((SCALED, None), (UNSCALED, 1.0)):
            _, weights = fastattn.attention(query, key, key, scale=scale, need_weights=True)
            row[name] = (torch.special.entr(weights).sum(-1) / math.log(KEYS)).mean().item()
        rows.append(row)
    return rows


def claims_of_entropies(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of variance 1 leave 1 - 1 / (2 log S) of the entropy, nearly, and scores of variance D next to nothing."""
    least, last = min(row[SCALED] for row in rows), rows[-1][UNSCALED]
    return [
        {"text": f"S4, entropy over log S, scores over sqrt(D): at every D up to {HEAD_DIMS[-1]} at least",
         "value": least, "bound": 0.75, "holds": least >= 0.75},
        {"text": f"S4, entropy over log S, plain scores: at D = {HEAD_DIMS[-1]} at most",
         "value": last, "bound": 0.1, "holds": last <= 0.1},
    ]  # fmt: skip


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
        of_scale, rows, maps = entropies(seed), equivariance(seed) + heads(seed), dependences(seed)
    claims = claims_of_entropies(of_scale)
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
    return {"rows": of_scale + rows, "claims": claims, "maps": {name: matrix.tolist() for name, matrix in maps.items()}}


def draw(result: dict[str, Any]) -> Figure:
    """Above, S4 and how far apart are results that S5 and S7 say are the same; below, S6."""
    from matplotlib.figure import Figure

    from benchmarks.reporting.looks import WIDTH

    figure = Figure(figsize=(WIDTH, 6.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1))
    panels = parts[0].subplots(1, 2, width_ratios=(2, 3))
    _draw_entropies(panels[0], [row for row in result["rows"] if row["system"] == "S4"])
    _draw_differences(panels[1], [row for row in result["rows"] if row["system"] in ("S5", "S7")])
    _draw_maps(parts[1], result["maps"])
    return figure


def _draw_entropies(axes: Any, rows: list[dict[str, Any]]) -> None:
    """How evenly the keys are weighted, against the head size."""
    from benchmarks.reporting.looks import BLUE, ORANGE

    sizes = [int(row["computed by"].removeprefix("D = ")) for row in rows]
    for name, colour, marker in ((SCALED, BLUE, "o"), (UNSCALED, ORANGE, "s")):
        label = name.removeprefix("entropy, ")
        axes.plot(sizes, [row[name] for row in rows], color=colour, marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="head size D", ylabel="entropy / log S", ylim=(0, 1.02), xticks=sizes, xticklabels=sizes)
    axes.set_title(f"S4: weights of {KEYS} keys")
    axes.legend(loc="center right")


def _draw_differences(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Units in the last place between the two sides of each equation; 0 has its place on the axis."""
    from benchmarks.reporting.looks import BLUE, GREEN, GREY, ORANGE

    for i, row in enumerate(rows):
        colour = ORANGE if row["computed by"] == WITH_POSITIONS else {"S5": BLUE, "S7": GREEN}[row["system"]]
        axes.barh(i, max(row["ulp apart"], 0.04), color=colour, height=0.6)  # of 0, so much that it can be seen
    axes.axvline(ULPS, color=GREY, linestyle="--")
    axes.set_xscale("symlog", linthresh=1)
    labels = [f"{row['system']}  {row['computed by']}".replace(", ", ",\n", 1) for row in rows]
    axes.set(yticks=range(len(rows)), xlim=(0, 1e8), xlabel="units in the last place apart")
    axes.set_yticklabels([label.replace(" behind", "\nbehind") for label in labels], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title("S5: f(s(x)) = s(f(x))    S7: heads alone")


def _draw_maps(figure: Any, matrices: dict[str, Any]) -> None:
    """S6: who depends on whom; white is exactly nothing."""
    import numpy
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    from benchmarks.reporting.looks import title

    title(figure, "S6: how much each output depends on each input (norm of the derivative; white: exactly 0)")
    maps = {name: numpy.array(matrix) for name, matrix in matrices.items()}
    least = min(matrix[matrix > 0].min() for matrix in maps.values())
    colours = ScalarMappable(LogNorm(least / 5, max(matrix.max() for matrix in maps.values())), "Blues")
    panels = figure.subplots(1, len(maps), sharey=True)
    for axes, (name, matrix) in zip(panels, maps.items()):
        visible = numpy.ma.masked_equal(matrix, 0.0)
        axes.imshow(visible, cmap=colours.cmap, norm=colours.norm, interpolation="nearest")
        axes.set_title(name)
        axes.set(xlabel="input", xticks=range(0, LENGTH, 5), yticks=range(0, LENGTH, 5))
        axes.grid(False)
    panels[0].set_ylabel("output")
    figure.colorbar(colours, ax=panels)


EXPERIMENT = Experiment(
    "properties",
    ("S4", "S5", "S6", "S7"),
    "Scores over sqrt(D) weigh alike at any D; self-attention knows no order, masked it sees nothing later, and its "
    "heads are independent: by any weights.",
    run,
    draw,
)
