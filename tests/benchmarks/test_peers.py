"""What others offer: that every variant of every family passes the gate or says why it refuses, and what it says.

Packages that cannot be installed here are stood in for by their documented signatures, written out in plain torch.
"""

import dataclasses
import importlib.machinery
import importlib.util
import itertools
import sys
import types
import warnings
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from benchmarks.cases import AttentionCase, Kind, Mask, NormCase
from benchmarks.families import attention, families, peers
from benchmarks.families.additive import AdditiveCase
from benchmarks.families.decode import DecodeCase
from benchmarks.families.functions import FunctionCase
from benchmarks.measure.accuracy import Gate
from benchmarks.variants import Refused

CASE = AttentionCase("attention", 2, 2, 37, 8)
EVERY_MASK = pytest.mark.parametrize("mask", get_args(Mask))
DIRECTIONS = pytest.mark.parametrize("backward", [False, True], ids=["eval", "train"])


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


def _variant(name):
    return attention.FAMILY.variant(name)


def _outcome(family, variant, case, gate):
    """None where the variant passes, else the reason that it refuses with."""
    if (reason := variant.applies(case)) is not None:
        return reason
    try:
        step = variant.build(case, case.dtype)
        accuracy = gate.check(step, variant)
    except Refused as refusal:
        return str(refusal)
    assert accuracy.passed, (case.name, variant.name, accuracy)
    return None


# -------------------------------------------------------------------------------------------------------- every variant


def _every_case():
    for backward in (False, True):
        for family, masks in (
            ("attention", get_args(Mask)),
            ("module", ("none", "padding", "causal")),
            ("layer", ("none", "causal")),
            ("sequence", ("causal",)),
        ):
            yield from (AttentionCase(family, 2, 2, 37, 8, mask=mask, backward=backward) for mask in masks)
        yield AttentionCase("attention", 2, 2, 37, 8, mask="causal", weights=True, backward=backward)
        yield AttentionCase("module", 2, 2, 37, 8, mask="causal", weights=True, backward=backward)
        for kind, dropout_p in itertools.product(get_args(Kind), (0.0, 0.5)):
            yield NormCase("norm", kind, 37, 12, dropout_p=dropout_p, backward=backward)


# What runs on any CPU without a compiler; what is not named here may run too, or say why it does not
SURE = {
    "attention": {"fastattn", "naive", "sdpa", "sdpa-flash", "sdpa-math"},
    "module": {"fastattn", "nn.MultiheadAttention", "qkv+sdpa"},
    "layer": {"fastattn", "nn.TransformerEncoderLayer"},
    "sequence": {variant.name for variant in families()["sequence"].variants},
    "norm": {"fastattn", "eager"},
}


@pytest.mark.parametrize("case", list(_every_case()), ids=lambda case: case.name)
def test_every_variant_passes_or_says_why_not(case):
    family = families()[case.family]
    gate = Gate(family, case)
    fast = [variant for variant in family.variants if not variant.slow]
    outcomes = {variant.name: _outcome(family, variant, case, gate) for variant in fast}
    assert all(reason is None or reason.strip() for reason in outcomes.values()), outcomes
    sure = SURE[case.family]
    if case.family in ("attention", "module") and case.weights:
        sure = sure - {"sdpa", "sdpa-flash", "sdpa-math", "qkv+sdpa"}
    elif case.family == "attention" and case.mask == "softcap":
        sure = {"fastattn", "naive"}
    assert {name for name, reason in outcomes.items() if reason is None} >= sure, outcomes


# Those of the family of kernels are attention's, and that of packed sequences refuses CPUs
SLOW = [
    (family.name, variant)
    for family in families().values()
    for variant in family.variants
    if variant.slow and family.name not in ("kernels", "varlen")
]


@pytest.mark.skipif(peers.cannot_compile(CASE) is not None, reason=str(peers.cannot_compile(CASE)))
@pytest.mark.parametrize(("family", "variant"), SLOW, ids=[f"{family}-{variant.name}" for family, variant in SLOW])
def test_every_compiled_variant_passes(family, variant):
    """A forward each: compiling takes seconds."""
    case = dataclasses.replace(CASE, family=family, mask="causal")
    if family == "norm":
        case = NormCase("norm", "rms", 37, 12)
    elif family == "additive":
        case = AdditiveCase("additive", 2, 37, 8)
    elif family == "decode":
        case = DecodeCase("decode", 2, 4, 2, 64, 16, page_size=16)
    elif family == "functions":
        case = FunctionCase("functions", "t5_bias", 2, 2, 37, 8)
    gate = Gate(families()[family], case)
    assert _outcome(families()[family], variant, case, gate) is None


# ------------------------------------------------------------------------------------------------------ what is at hand


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = peers.cannot_compile(CASE)
    assert reason == (
        "torch.compile needs a C++ compiler: no-such-compiler is not on the path (the variable CXX names another)"
    )
    for family, variant in SLOW:
        case = NormCase("norm", "rms", 4, 4) if family == "norm" else dataclasses.replace(CASE, family=family)
        assert variant.applies(case) == reason
    monkeypatch.setenv("CXX", sys.executable)
    assert peers.cannot_compile(CASE) is None


def test_compiling_for_a_gpu_needs_triton(monkeypatch):
    on_cuda = dataclasses.replace(CASE, device="cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert peers.cannot_compile(on_cuda) == "torch.compile needs triton, which is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert peers.cannot_compile(on_cuda) is None


def test_compiled_functions_of_one_code_share_no_limit(monkeypatch):
    """torch keeps eight graphs of a code object. FlexAttention ran its ninth case eagerly, and was timed so."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_with_inductor = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **how: compile_with_inductor(function, backend=backend, **how)
    )
    first = peers.compiled(lambda x: x + 1)
    results = [first(torch.ones(1)).item()]
    for number in range(2, 13):
        results.append(peers.compiled(lambda x, number=number: x + number)(torch.ones(1)).item())
    assert results == list(range(2, 14))
    assert len(graphs) == 12
    first(torch.ones(1))  # and the first is still there
    assert len(graphs) == 12


def test_flex_refuses_a_backward_on_a_cpu():
    assert (
        _variant("flex").applies(dataclasses.replace(CASE, backward=True)) == "FlexAttention has no backward on a CPU"
    )


# ----------------------------------------------------------------------------------------------------------------- SDPA


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def _operators(name):
    step = _variant(name).build(dataclasses.replace(CASE, mask="causal"), torch.float32)
    with _Operators() as seen:
        step()
    return " ".join(seen.names)


def test_sdpa_runs_the_kernel_it_is_pinned_to():
    assert "flash_attention" in _operators("sdpa-flash")
    assert "flash_attention" not in _operators("sdpa-math")
    assert "bmm" in _operators("sdpa-math")


@pytest.mark.parametrize("kind", ["efficient", "cudnn"])
def test_sdpa_without_its_kernel_refuses_and_does_not_fall_back(kind):
    """torch's own word for it, once the question is not asked before."""
    with pytest.raises(Refused, match=f"torch has no {kind} kernel for it"):
        _variant(f"sdpa-{kind}").build(CASE, CASE.dtype)
    assert _variant(f"sdpa-{kind}").applies(CASE) == f"torch has no {kind} kernel on a CPU"


SAID = (
    ("Memory efficient kernel not used because:", "Memory Efficient attention has been runtime disabled."),
    (
        "Flash attention kernel not used because:",
        "Expected half precision.\n Got float.",
        "Head size 300 is too large.",
    ),
    ("cuDNN attention kernel not used because:", "cuDNN attention has been runtime disabled."),
)


def _no_kernel(*qkv, **words):
    for message in itertools.chain.from_iterable(SAID):
        warnings.warn(f"{message} (Triggered internally at somewhere.cpp:99.)", stacklevel=1)
    raise RuntimeError("No available kernel. Aborting execution.")


def test_sdpa_refuses_with_torchs_reasons(monkeypatch, recwarn):
    monkeypatch.setattr(F, "scaled_dot_product_attention", _no_kernel)
    with pytest.raises(Refused) as refusal:
        _variant("sdpa-flash").build(CASE, CASE.dtype)
    assert str(refusal.value) == (
        "torch has no flash kernel for it: Expected half precision. Got float.; Head size 300 is too large."
    )
    assert not recwarn.list


def test_sdpa_failing_otherwise_is_no_refusal(monkeypatch):
    def boom(*qkv, **words):
        raise RuntimeError("boom")

    monkeypatch.setattr(F, "scaled_dot_product_attention", boom)
    with pytest.raises(RuntimeError, match="boom"):
        _variant("sdpa-flash").build(CASE, CASE.dtype)


# ------------------------------------------------------------------------------------------------------------- packages


def _package(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def _attend(query, key, value, visible=None, softcap=0.0, bias=None):
    """Over ``[B, L, H, D]``, the formula."""
    assert query.shape == (2, 37, 2, 8)
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) / query.shape[-1] ** 0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(dim=-1), value)


def _seen_by_flash(seqlen, causal, window_size):
    """Keys from ``window_size[0]`` before to ``window_size[1]`` behind a query's own; negative: without end."""
    left, right = (seqlen if side < 0 else side for side in window_size)
    behind = torch.arange(seqlen) - torch.arange(seqlen)[:, None]
    return (behind >= -left) & (behind <= (0 if causal else right))


def _flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    seqlen, bias = q.shape[1], None
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32
        distance = (torch.arange(seqlen)[:, None] - torch.arange(seqlen)).abs()
        bias = -alibi_slopes[:, None, None] * distance
    return _attend(q, k, v, _seen_by_flash(seqlen, causal, window_size), softcap, bias)


def _flash_attn_3_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    output = _attend(q, k, v, _seen_by_flash(q.shape[1], causal, window_size), softcap)
    return output, torch.zeros(())


class _LowerTriangularMask:
    pass


def _memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    seqlen = query.shape[1]
    if isinstance(attn_bias, _LowerTriangularMask):
        return _attend(query, key, value, torch.ones(seqlen, seqlen, dtype=torch.bool).tril())
    if attn_bias is not None:
        assert attn_bias.shape == (2, 2, seqlen, seqlen)
        assert attn_bias.dtype == query.dtype
    return _attend(query, key, value, bias=attn_bias)


@pytest.fixture
def packages(monkeypatch):
    _package(monkeypatch, "flash_attn", flash_attn_func=_flash_attn_func)
    _package(monkeypatch, "flash_attn_interface", flash_attn_func=_flash_attn_3_func)
    _package(monkeypatch, "xformers")
    functions = {
        "memory_efficient_attention": _memory_efficient_attention,
        "LowerTriangularMask": _LowerTriangularMask,
    }
    _package(monkeypatch, "xformers.ops", **functions)


PACKAGES = ("flash-attn", "flash-attn-3", "xformers")


@DIRECTIONS
@EVERY_MASK
@pytest.mark.parametrize("name", PACKAGES)
def test_package_computes_attention_or_says_what_it_lacks(name, mask, backward, packages):
    """Layouts, causality, windows, slopes and biases, on the CPU, where only the question of the device forbids it."""
    case = dataclasses.replace(CASE, mask=mask, backward=backward)
    lacking = {
        "flash-attn": ("padding", "boolean", "sparse", "documents", "bias"),
        "flash-attn-3": ("padding", "boolean", "sparse", "documents", "bias", "alibi"),
        "xformers": ("softcap",),
    }[name]
    refusal = _variant(name).applies(dataclasses.replace(case, device="cuda", dtype=torch.bfloat16))
    if mask in lacking:
        assert refusal is not None
        assert mask in refusal
        return
    assert refusal is None
    accuracy = Gate(attention.FAMILY, case).check(_variant(name).build(case, case.dtype), _variant(name))
    assert accuracy.passed, accuracy


@pytest.mark.parametrize("name", PACKAGES)
def test_package_says_why_it_cannot_be_used(name, packages, monkeypatch):
    applies = _variant(name).applies
    on_cuda = dataclasses.replace(CASE, device="cuda", dtype=torch.bfloat16)
    assert applies(on_cuda) is None
    assert applies(CASE) == "needs a CUDA device"
    assert applies(dataclasses.replace(on_cuda, weights=True)) == "returns no weights"
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert applies(on_cuda) == f"{name} is not installed"


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-3"])
def test_flash_attn_takes_half_precision_and_heads_to_256(name, packages):
    applies = _variant(name).applies
    on_cuda = dataclasses.replace(CASE, device="cuda", dtype=torch.float16, head_dim=256)
    assert applies(on_cuda) is None
    assert applies(dataclasses.replace(on_cuda, dtype=torch.float32)) == "takes float16 and bfloat16, not float32"
    assert applies(dataclasses.replace(on_cuda, head_dim=264)) == "head_dim=264: it takes up to 256"


def test_package_that_does_not_load_is_refused(packages, monkeypatch):
    """As one built for another torch: it is there, and an undefined symbol stops its import."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(Refused, match="flash-attn is installed, but does not load: import of flash_attn halted"):
        _variant("flash-attn").build(CASE, CASE.dtype)


def test_xformers_without_an_operator_is_refused(packages, monkeypatch):
    def none(*qkv, attn_bias):
        raise NotImplementedError("No operator found:\n  `fa2F` is not supported because:\n    it has no such kernel")

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", none)
    step = _variant("xformers").build(CASE, CASE.dtype)
    with pytest.raises(Refused, match=r"^No operator found: `fa2F` is not supported because: it has no such kernel$"):
        step()
