"""A case of the norm parity tests: what it is called, its inputs, how each side computes it, and the check."""

import dataclasses
import zlib
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.ops.residual_norm.operator import dropout_factor as of_kernels
from fastattn.reference import add_norm
from fastattn.testing import assert_within_budget, random_tensor
from tests import pairwise

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FUNCTIONS: dict[str, Any] = {"layer": fastattn.add_layer_norm, "rms": fastattn.add_rms_norm}
EPS = 1e-5
reference: Any = add_norm  # called with what a case is made of
# How x and residual lie: `rows` has gaps between rows, `transposed` is a [L, B, N] seen as [B, L, N], `broadcast` has
# one row of x for all, `every_other` a last axis of stride 2, `permuted` three axes whose rows need three strides.
LAYOUTS = ["dense", "rows", "transposed", "broadcast", "every_other", "permuted"]

# The plainest level first. `own` is the dtype of x, `wide` float32, `narrow` the other 16-bit one.
AXES: dict[str, list[Any]] = {
    "dtype": list(DTYPES),
    "kind": ["layer", "rms"],
    "size": [96, 1, 2, 7, 64, 255, 769, 1024, 1025, 2049, 4097],
    "rows": [(5,), (), (1,), (2, 3), (3, 1, 2), (130,), (0,)],
    "residual": ["own", "none", "wide", "narrow"],
    "weight": ["own", "none", "wide"],
    "bias": ["own", "none", "wide"],
    "x_bias": ["none", "own", "wide"],
    "row_scale": ["none", "own", "wide", "shared"],
    "unit_offset": [False, True],
    "dropout": [0.0, 0.4],
    "rounded": [True, False],
    "outputs": ["both", "norm"],
    "out_dtype": [None, "wide"],
    "residual_dtype": [None, "wide", "narrow"],
    "layout": LAYOUTS,
    "gradient": ["dense", "rows", "broadcast"],
    "offset": [0.0, 1000.0],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """The levels of :data:`AXES`; the defaults are a residual add with an affine layer norm."""

    dtype: str = "fp32"
    kind: str = "layer"
    size: int = 96
    rows: tuple[int, ...] = (5,)
    residual: str = "own"
    weight: str = "own"
    bias: str = "own"
    x_bias: str = "none"
    row_scale: str = "none"
    unit_offset: bool = False
    dropout: float = 0.0
    rounded: bool = True
    outputs: str = "both"
    out_dtype: str | None = None
    residual_dtype: str | None = None
    layout: str = "dense"
    gradient: str = "dense"
    offset: float = 0.0
    seed: int = 0

    @property
    def id(self) -> str:
        parts = [self.kind, f"m{'x'.join(map(str, self.rows)) or 'one'}", f"n{self.size}"]
        for field in dataclasses.fields(self)[4:]:
            level = getattr(self, field.name)
            if level != field.default:
                parts.append(f"{field.name}_{level}" if not isinstance(level, bool) else f"{field.name}_{level!s:.1}")
        return "-".join([*parts, self.dtype])

    @property
    def makes_sense(self) -> bool:
        """Does every level that is not plain change anything, and is there a truth to compare with?"""
        adds = self.residual != "none" or self.x_bias != "none" or self.dropout > 0 or self.row_scale != "none"
        if self.unit_offset and self.weight == "none":
            return False
        if not self.rounded and not adds:
            return False
        if self.layout in ("transposed", "broadcast") and len(self.rows) < 2:
            return False
        if self.layout == "permuted" and len(self.rows) < 3:
            return False
        if self.row_scale == "shared" and not self.rows:
            return False
        # a mean of a thousand deviations in 16 bits leaves nothing of them
        return not self.offset or (self.dtype == "fp32" and self.residual_dtype != "narrow")

    @property
    def cost(self) -> int:
        """About how many thousand elements pass by."""
        rows = 1
        for size in self.rows:
            rows *= size
        return rows * max(self.size, 64) // 1000

    def named_dtype(self, level: str | None) -> torch.dtype | None:
        """The dtype that a level names."""
        if level in (None, "none"):
            return None
        narrow = torch.float16 if self.dtype == "bf16" else torch.bfloat16
        return {"own": DTYPES[self.dtype], "shared": DTYPES[self.dtype], "wide": torch.float32, "narrow": narrow}[level]


def _laid_out(case: Case, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Standard normal ``[*rows, size]`` in the case's layout."""
    rows, size = case.rows, case.size

    def normal(*shape: int) -> torch.Tensor:
        return random_tensor(*shape, seed=seed, dtype=dtype, device=device)

    if case.layout == "rows":
        return normal(*rows, size + 3)[..., 1 : size + 1]
    if case.layout == "transposed":
        return normal(rows[1], rows[0], *rows[2:], size).transpose(0, 1)
    if case.layout == "broadcast":
        return normal(1, *rows[1:], size).expand(*rows, size)
    if case.layout == "every_other":
        return normal(*rows, 2 * size + 1)[..., 1::2]
    if case.layout == "permuted":
        return normal(rows[2], rows[1], rows[0] + 1, size)[:, :, 1:].permute(2, 1, 0, 3)
    return normal(*rows, size)


def _gradient(case: Case, seed: int, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """That of a result, as a layer behind it may leave it."""
    shape = tuple(like.shape)
    if case.gradient == "rows":
        return random_tensor(*shape[:-1], shape[-1] + 5, seed=seed, dtype=like.dtype, device=device)[..., 2:-3]
    if case.gradient == "broadcast":  # of a sum over rows, or over everything
        return random_tensor(*(1,) * len(shape), seed=seed, dtype=like.dtype, device=device).expand(shape)
    return random_tensor(*shape, seed=seed, dtype=like.dtype, device=device)


class Inputs:
    """The tensors of a case, those that have a gradient by name, and the other arguments."""

    def __init__(self, case: Case, device: torch.device) -> None:
        seed = zlib.crc32(case.id.encode()) + case.seed
        dtype = DTYPES[case.dtype]
        shape = (*case.rows, case.size)
        x = _laid_out(case, seed, dtype, device)
        self.tensors: dict[str, torch.Tensor] = {"x": x + case.offset if case.offset else x}
        if (of_residual := case.named_dtype(case.residual)) is not None:
            self.tensors["residual"] = _laid_out(case, seed + 1, of_residual, device)
        for index, name in enumerate(("weight", "bias", "x_bias")):
            if (of_vector := case.named_dtype(getattr(case, name))) is not None:
                self.tensors[name] = random_tensor(case.size, seed=seed + 2 + index, dtype=of_vector, device=device)
        if (of_scale := case.named_dtype(case.row_scale)) is not None:
            rows = (1, *case.rows[1:]) if case.row_scale == "shared" else case.rows
            self.tensors["row_scale"] = random_tensor(*rows, seed=seed + 5, dtype=of_scale, device=device)
        self.options: dict[str, Any] = {
            "eps": EPS,
            "unit_offset": case.unit_offset,
            "out_dtype": case.named_dtype(case.out_dtype),
            "residual_dtype": case.named_dtype(case.residual_dtype),
            "round_residual": case.rounded,
        }
        self.shape, self.seed = torch.Size(shape), seed


def _expanded(tensors: dict[str, torch.Tensor], rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """With the row scale in its full shape, which is what the reference takes."""
    return {name: t.expand(rows) if name == "row_scale" else t for name, t in tensors.items()}


def dropout_factor(backend: str, x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """What a backend's call with ``x`` multiplies it by right behind ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    if backend == "torch":
        return F.dropout(torch.ones_like(x), p)  # drawn in the order in which the elements lie
    state = torch.randint(0, 2**31 - 1, (2,), dtype=torch.int64, device=x.device)
    return of_kernels(state, x, p)


def eager(tensors: dict[str, torch.Tensor], *, kind: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's sum under torch's own norm, as plain PyTorch has it."""
    branch = {name: t for name, t in tensors.items() if name not in ("weight", "bias")}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    of_sum = {name: options[name] for name in ("dropout_keep", "dropout_p")}
    residual = reference(**branch, **of_sum, residual_dtype=options["residual_dtype"]).residual
    total = residual
    if not options["round_residual"]:
        total = reference(**branch, **of_sum, residual_dtype=torch.float32).residual
    out_dtype = options["out_dtype"] or tensors["x"].dtype
    dtypes = {t.dtype for t in (total, weight, bias) if t is not None} | {out_dtype}
    if options["unit_offset"] or len(dtypes) > 1:
        total = total.float()
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
    if options["unit_offset"] and weight is not None:
        weight = 1.0 + weight
    if kind == "layer":
        output = F.layer_norm(total, total.shape[-1:], weight, bias, options["eps"])
    else:
        output = F.rms_norm(total, total.shape[-1:], weight, options["eps"])
        output = output if bias is None else output + bias
    return output.to(out_dtype), residual


def check(feature: str, case: Case, backend: str, device: torch.device) -> None:
    """Both results and every gradient within their budgets."""
    inputs = Inputs(case, device)
    keep = None
    if case.dropout:
        keep = dropout_factor(backend, inputs.tensors["x"], case.dropout, inputs.seed) != 0

    def evaluate(function: Any, dtype: torch.dtype | None, **more: Any) -> dict[str, torch.Tensor]:
        """Results and gradients by name; in float64 all the way where ``dtype`` says so."""
        leaves = {
            name: (t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_()
            for name, t in inputs.tensors.items()
        }
        options = dict(inputs.options)
        if dtype is not None:
            options |= {"out_dtype": dtype, "residual_dtype": dtype}
        results = function(leaves, **options, **more)
        if case.outputs == "norm":
            results = results[:1]
        gradients = [
            _gradient(case, inputs.seed + 10 + i, r, device) if dtype is None else gradients_of[i].to(dtype)
            for i, r in enumerate(results)
        ]
        if dtype is None:
            gradients_of[:] = gradients
        found = torch.autograd.grad(results, list(leaves.values()), gradients)
        named = dict(zip(("output", "residual"), (r.detach() for r in results)))
        return named | {f"d_{name}": g for name, g in zip(leaves, found)}

    gradients_of: list[torch.Tensor] = []

    def ours(leaves: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(inputs.seed)
        returns = case.outputs == "both"
        result = FUNCTIONS[case.kind](
            **leaves, **options, dropout_p=case.dropout, return_residual=returns, backend=backend
        )
        return result if returns else (result,)

    def theirs(leaves: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
        full = _expanded(leaves, case.rows)
        options |= {"kind": case.kind, "dropout_keep": keep, "dropout_p": case.dropout}
        # the torch backend runs torch's own norms, and is as good as they are; the kernels are held to the formula
        plain = options["residual_dtype"] != torch.float64 and backend == "torch"
        return eager(full, **options) if plain else tuple(reference(**full, **options))

    actual = evaluate(ours, None)
    peer = evaluate(theirs, None)
    truth = evaluate(theirs, torch.float64)
    allowances = _allowances(case, inputs, keep, gradients_of, backend)
    for name, tensor in actual.items():
        assert_within_budget(
            tensor, truth=truth[name], peer=peer[name], name=name, feature=f"norm: {feature}", backend=backend,
            allowance=allowances.get(name, 0.0),
        )  # fmt: skip
    pairwise.met.append(("norm", backend, {name: getattr(case, name) for name in AXES}))


def _multiplier(case: Case, given: dict[str, torch.Tensor]) -> Any:
    """What multiplies the columns."""
    return given["weight"] + case.unit_offset if "weight" in given else 1.0


def _allowances(
    case: Case, inputs: Inputs, keep: torch.Tensor | None, gradients: list[torch.Tensor], backend: str
) -> dict[str, float]:
    """What float32 loses in gradients however it is done, and the peer by luck may not where a result has few elements.

    The gradient of ``r`` is a difference of terms that may cancel, each rounded: two units of the largest sum of their
    magnitudes. A sum of K rounded numbers errs by sqrt(K) units of the sum of their magnitudes (Higham and Mary 2019,
    arXiv:1907.10550, with probability close to one). The row scale's gradient sums, over a row, what the rounding of
    ``r`` has perturbed independently.
    """
    if not all(inputs.shape):
        return {}
    unit = 2.0**-24
    given = {name: t.detach().double() for name, t in _expanded(inputs.tensors, case.rows).items()}
    branch = {name: t for name, t in given.items() if name not in ("weight", "bias")}
    options: dict[str, Any] = {"dropout_keep": keep, "dropout_p": case.dropout}
    total = reference(**branch, **options).residual
    centred = total - total.mean(-1, keepdim=True) if case.kind == "layer" else total
    rstd = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normal = centred * rstd
    d_output = gradients[0].double()
    weighted = d_output * _multiplier(case, given)
    means = (weighted * normal).mean(-1, keepdim=True) * normal
    of_sum = rstd * (weighted.abs() + means.abs())
    if case.kind == "layer":
        of_sum = of_sum + rstd * weighted.mean(-1, keepdim=True).abs()
    if len(gradients) > 1:
        of_sum = of_sum + gradients[1].double().abs()
    of_branch = of_sum if keep is None else of_sum * keep / (1.0 - case.dropout)
    of_x = of_branch * given["row_scale"].abs()[..., None] if "row_scale" in given else of_branch
    # torch's CPU kernels take the mean of what was multiplied by rstd already
    of_normal = normal.abs() + (total.abs() * rstd if backend == "torch" else 0.0)

    def summed_over_rows(terms: torch.Tensor) -> float:
        rows = terms.reshape(-1, case.size)
        # equal terms are rounded alike, one after the other: then errors add up, to half a unit of each partial sum
        growth = len(rows) / 2 if case.gradient == "broadcast" else len(rows) ** 0.5
        return unit * max(1.0, growth) * rows.sum(0).max().item()

    # the means that are subtracted are sums over a row, however small the difference is
    of_means = unit * case.size**0.5 * (rstd * weighted.abs().mean(-1, keepdim=True)).max().item()
    # a leaf that broadcasts has a gradient that sums over what it is broadcast along, in float32 or its own dtype
    shared = case.rows[0] if case.row_scale == "shared" else 1
    terms = of_branch * (given["x"] + given.get("x_bias", 0.0)).abs()
    rounding = torch.finfo(case.named_dtype(case.residual_dtype) or DTYPES[case.dtype]).eps / 2
    rows_of_terms = terms.square().sum(-1).sqrt().max() * rounding * 2 + terms.sum(-1).max() * unit * case.size**0.5
    return {
        "output": 2 * unit * (normal * _multiplier(case, given)).abs().max().item(),  # that of the inverse deviation
        "d_residual": 2 * unit * of_sum.max().item() + of_means,
        "d_x": 2 * unit * of_x.max().item() + of_means,
        "d_weight": summed_over_rows(d_output.abs() * of_normal),
        "d_bias": summed_over_rows(d_output.abs()),
        "d_x_bias": summed_over_rows(of_x) + of_means * inputs.shape[:-1].numel(),
        "d_row_scale": rows_of_terms.item() * shared**0.5,
    }
