"""Forward and every gradient of additive attention against the float64 reference."""

import dataclasses
import random
import zlib
from typing import Any

import pytest
import torch

import fastattn
from fastattn.reference import additive_attention as reference
from fastattn.testing import assert_within_budget, attention_inputs, attention_mask, key_padding_mask, random_tensor
from tests.ops.additive_cuts import cut_small

# What it returns depends on its arguments; a test knows which it gave.
attend: Any = fastattn.ops.additive_attention

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("poisoned")]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The plainest level first.
AXES: dict[str, list[Any]] = {
    "dtype": list(DTYPES),
    "batch": [1, 2],
    "heads": [1, 2],
    "lengths": [(21, 40), (1, 1), (1, 130), (67, 3), (130, 150), (5, 64)],
    "size": [6, 1, 19, 100, 256],
    "value_dim": [20, 1, 64, 130],
    "mask": ["none", "bool-none", "bool-head", "bool-query", "bool-key", "bool-batch_head", "add-none", "add-batch",
             "add-key", "bool-blocks"],
    "padding": [False, True],
    "causal": [False, True],
    "shared": [False, True],
    "outputs": ["plain", "heads", "average"],
    "layout": ["dense", "heads_inside", "feature_map", "broadcast", "every_other"],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """The levels of :data:`AXES`."""

    dtype: str = "fp32"
    batch: int = 1
    heads: int = 1
    lengths: tuple[int, int] = (21, 40)
    size: int = 6
    value_dim: int = 20
    mask: str = "none"
    padding: bool = False
    causal: bool = False
    shared: bool = False
    outputs: str = "plain"
    layout: str = "dense"
    seed: int = 0

    @property
    def id(self) -> str:
        changed = [f for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default]
        return "-".join(["plain" * (not changed), *(f"{f.name}_{getattr(self, f.name)}" for f in changed), self.dtype])

    @property
    def cost(self) -> int:
        """How many columns of tiles the forward goes through in Triton's interpreter, about a millisecond each."""
        tiles = -(-self.lengths[0] // 64) * -(-self.lengths[1] // 32)
        return self.batch * self.heads * tiles * self.size


def check(case: Case, backend: str, device: torch.device) -> None:
    """Hold output, weights and gradients of a case to the budget: twice the error of the reference in its dtype."""
    seed, dtype, (length, keys) = zlib.crc32(case.id.encode()) + case.seed, DTYPES[case.dtype], case.lengths
    query, key, value = attention_inputs(
        case.batch, case.heads, length, keys, case.size, value_dim=case.value_dim, dtype=dtype, device=device,
        layout=case.layout, seed=seed,  # type: ignore[arg-type]
    )  # fmt: skip
    weight = random_tensor(1 if case.shared else case.heads, case.size, seed=seed, dtype=dtype, device=device)
    tensors, mask, bias, padding = [query, key, value, weight], None, None, None
    if case.mask != "none":
        kind, broadcast = case.mask.split("-")
        made = attention_mask(
            case.batch, case.heads, length, keys, dtype=torch.bool if kind == "bool" else dtype, seed=seed,
            broadcast="none" if broadcast == "blocks" else broadcast,  # type: ignore[arg-type]
            block=64 if broadcast == "blocks" else 1, device=device,
        )  # fmt: skip
        mask, bias = (made, None) if kind == "bool" else (None, made)
    if case.padding:
        padding = key_padding_mask(case.batch, keys, device=device, seed=seed)
    if bias is not None:
        tensors.append(bias)
    d_output = random_tensor(case.batch, case.heads, length, case.value_dim, seed=seed + 1, dtype=dtype, device=device)
    needs_weights, average = case.outputs != "plain", case.outputs == "average"
    shape = (case.batch, *[case.heads] * (not average), length, keys)
    d_weights = random_tensor(*shape, seed=seed + 2, dtype=dtype, device=device)

    def ours(query, key, value, weight, bias=None):
        found = attend(
            query, key, value, weight[0] if case.shared else weight, attn_mask=mask if bias is None else bias,
            key_padding_mask=padding, is_causal=case.causal, need_weights=needs_weights, average_attn_weights=average,
            backend=backend,  # type: ignore[arg-type]
        )  # fmt: skip
        return found if isinstance(found, tuple) else (found,)

    def defined(query, key, value, weight, bias=None):
        upper = 0 if case.causal else None
        found = reference(query, key, value, weight, bias=bias, mask=mask, key_padding_mask=padding, upper=upper)
        weights = found.weights.mean(dim=1) if average else found.weights
        return (found.output, weights) if needs_weights else (found.output,)

    def results(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        outputs = function(*leaves)
        given = [g.to(dtype) for g in (d_output, d_weights)[: len(outputs)]]
        return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, given)]

    names = ["output", "weights"][: 1 + needs_weights] + ["d_query", "d_key", "d_value", "d_weight", "d_attn_mask"]
    actual = results(ours, dtype)
    allowed = allowances(tensors, mask, padding, case.causal, d_output, d_weights if needs_weights else None)
    for name, a, t, p in zip(names, actual, results(defined, torch.float64), results(defined, dtype)):
        allowance = allowed[name]
        assert_within_budget(
            a, truth=t, peer=p, name=name, allowance=allowance, feature="additive attention", backend=backend
        )


def allowances(tensors, mask, padding, is_causal, d_output, d_weights) -> dict[str, float]:
    """What the kernels may lose beyond eager PyTorch, in absolute numbers, by the result's name.

    As in attention (``attention_cases.allowances``): a weight is made of a score that was summed up twice, in two
    orders, and has the absolute error of the two for a relative one; and the mean of a row of ``dP`` is ``sum(output *
    d_output)``, with the rounding of the output. In eager PyTorch both differences are exact where they cancel (a row
    that sees one key has the weight 1 and the gradient 0). A float32 sum loses about an ulp of its terms' magnitudes.
    """
    dtype = tensors[0].dtype
    query, key, value, weight, *biases = (t.double() for t in tensors)
    bias = biases[0] if biases else None
    found = reference(
        query, key, value, weight, bias=bias, mask=mask, key_padding_mask=padding, upper=0 if is_causal else None
    )
    p, d_output, w = found.weights, d_output.double(), weight.abs()[:, None, None]
    bent = torch.tanh(query[..., :, None, :] + key[..., None, :, :])
    slope = 1 - bent.square()
    scores = (w * bent.abs()).sum(-1) + (0 if bias is None else bias.abs().nan_to_num(posinf=0.0))
    relative = p * (1 + scores + (scores * (p > 0)).amax(-1, keepdim=True))
    d_p = d_output.abs() @ value.abs().mT
    if d_weights is not None:
        d_weights = d_weights.double().abs()
        d_p = d_p + (d_weights if d_weights.dim() == 4 else d_weights[:, None])
    means = (p * d_p).sum(-1, keepdim=True)
    d_scores = (relative * (d_p + means))[..., None]
    # the tangent, and what its argument lost, move the slope by three units at most
    pairs = d_scores * slope + 3 * (p * (d_p + means))[..., None]
    float32 = {
        "output": relative @ value.abs(),
        "weights": relative,
        "d_query": w[:, 0] * pairs.sum(3),
        "d_key": w[:, 0] * pairs.sum(2),
        "d_value": relative.mT @ d_output.abs(),
        "d_weight": (d_scores * bent.abs() + (p * (d_p + means))[..., None]).sum((0, 2, 3)).sum_to_size(weight.shape),
    }
    mean = (found.output * d_output).square().sum(-1).sqrt()[..., None]  # what the output's rounding does to the mean
    rounded = {
        "d_query": w[:, 0] * mean * (p[..., None] * slope).sum(3),
        "d_key": w[:, 0] * (mean[..., None] * p[..., None] * slope).square().sum(2).sqrt(),
        "d_weight": (mean * (p[..., None] * bent).sum(3)).square().sum((0, 2)).sum_to_size(weight.shape).sqrt(),
    }
    if bias is not None:
        float32["d_attn_mask"] = d_scores[..., 0].sum_to_size(bias.shape)
        rounded["d_attn_mask"] = (mean * p).sum_to_size(bias.shape)
    result = {name: torch.finfo(torch.float32).eps * t.max().item() for name, t in float32.items()}
    for name, t in rounded.items():
        result[name] += torch.finfo(dtype).eps * t.max().item()
    return result


# What a level needs so that it shows, or so that it takes no longer in the interpreter than the others.
NEEDED: dict[Any, dict[str, Any]] = {
    **{axis: {"batch": 2} for axis in ("mask", "padding", "layout")},
    **{size: {"lengths": (5, 20)} for size in (100, 256)},
    "bool-blocks": {"lengths": (130, 150), "batch": 1, "size": 2},
    (130, 150): {"size": 3},
}
# The levels that every dtype has to show.
IN_16_BITS = (19, "add-none", "average")


def alone(axis: str, level: Any, dtype: str) -> Case:
    levels: dict[str, Any] = {"dtype": dtype, **NEEDED.get(axis, {}), **NEEDED.get(level, {}), axis: level}
    return Case(**levels)


ALONE = [
    alone(axis, level, dtype)
    for axis, levels in AXES.items()
    if axis != "dtype"
    for level in levels
    for dtype in (DTYPES if level in IN_16_BITS else ["fp32"])
]


def random_cases(seed: int) -> list[Case]:
    rng, cases = random.Random(seed), []
    while len(cases) < 6:
        levels: dict[str, Any] = {axis: rng.choice(levels) for axis, levels in AXES.items()}
        case = Case(**levels, seed=seed)
        if case.cost <= 100:
            cases.append(case)
    return cases


def pytest_generate_tests(metafunc):
    if "sampled" in metafunc.fixturenames:
        cases = random_cases(metafunc.config.seed)
        metafunc.parametrize("sampled", cases, ids=[f"{i}-{case.id}" for i, case in enumerate(cases)])


@pytest.mark.parametrize("case", dict.fromkeys(ALONE), ids=lambda case: case.id)
def test_additive_grad_matches_reference(case, backend, device):
    check(case, backend, device)


def test_additive_grad_of_random_combinations_matches_reference(sampled, backend, device):
    check(sampled, backend, device)


@pytest.mark.parametrize("case", [c for c in dict.fromkeys(ALONE) if c.dtype == "fp32"], ids=lambda case: case.id)
def test_additive_grad_in_small_blocks_matches_reference(case, device, monkeypatch):
    """The torch backend cuts large calls into blocks of rows; here every call is large."""
    cut_small(monkeypatch, 6000)
    check(case, "torch", device)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids="b{0[0]}".format)
def test_additive_of_empty_tensors(shape, backend, device):
    batch, heads, length, keys = shape
    leaves = [
        random_tensor(*s, seed=0, device=device).requires_grad_()
        for s in ((batch, heads, length, 5), (batch, heads, keys, 5), (batch, heads, keys, 6), (heads, 5))
    ]
    output, weights = attend(*leaves, need_weights=True, average_attn_weights=False, backend=backend)
    assert output.shape == (batch, heads, length, 6)
    assert weights.shape == (batch, heads, length, keys)
    assert not output.any()
    gradients = torch.autograd.grad(output.sum() + weights.sum(), leaves)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients, leaves))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_additive_hardware_tanh_is_within_the_budget(dtype, device, monkeypatch):
    """The instruction errs by up to 2^-11 of its result. Here every tangent does, this way or that, in an otherwise
    exact computation: what is left of the budget is what the kernels' own rounding may take."""
    seed, shapes = 5, ((1, 2, 40, 64), (1, 2, 60, 64), (1, 2, 60, 24), (2, 64))
    tensors = [random_tensor(*s, seed=seed + i, dtype=dtype, device=device) for i, s in enumerate(shapes)]
    d_output = random_tensor(1, 2, 40, 24, seed=seed, dtype=dtype, device=device)

    def results(compute: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(compute).requires_grad_() for t in tensors]
        output = reference(*leaves).output
        return [output.detach(), *torch.autograd.grad(output, leaves, d_output.to(compute))]

    truth, peer = results(torch.float64), results(dtype)
    for sign in ("up", "down", "random"):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "tanh", _erring(torch.tanh, sign))
            erring = results(torch.float64)
        names = ("output", "d_query", "d_key", "d_value", "d_weight")
        for name, a, t, p in zip(names, erring, truth, peer):
            assert_within_budget(a.to(dtype), truth=t, peer=p, name=f"{name}, {sign}")


def _erring(tanh, sign):
    class Erring(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            bent = tanh(x)
            noise = 2 * torch.rand(bent.shape, generator=torch.Generator().manual_seed(0), dtype=bent.dtype) - 1
            relative = {"up": 1.0, "down": -1.0, "random": noise.to(bent.device)}[sign]
            bent = (bent * (1 + 2.0**-11 * relative)).clamp(-1, 1)
            ctx.save_for_backward(bent)
            return bent

        @staticmethod
        def backward(ctx, *grads):
            (bent,) = ctx.saved_tensors
            return grads[0] * (1 - bent * bent)

    return Erring.apply


def test_additive_is_bitwise_deterministic(backend, device):
    shapes = ((1, 2, 70, 3), (1, 2, 90, 3), (1, 2, 90, 8), (2, 3))

    def gradients():
        leaves = [random_tensor(*s, seed=i, device=device).requires_grad_() for i, s in enumerate(shapes)]
        output = attend(*leaves, backend=backend)
        return torch.autograd.grad(output.square().sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients()))
