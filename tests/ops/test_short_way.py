"""The short way of a call: what it computes is the same to the last bit as on the long way, errors included."""

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import fastattn
from fastattn.ops.common import short_way
from fastattn.ops.residual_norm import api as norm_api
from tests.machines import DEVICE
from tests.ops import short_way_cases as cases
from tests.ops.short_way_cases import Draw, assert_same, counted, long_way, results_and_gradients

LAYOUTS = ("dense", "strided", "unaligned")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def forgetful():
    cases.forget()
    yield
    cases.forget()


# --------------------------------------------------------------------------------------------------------------- parity


def in_turn(of):
    """Each case with one dtype and one layout, which take turns."""
    return [
        pytest.param(case, DTYPES[number % 2], LAYOUTS[number % 3], id=name)
        for number, (name, case) in enumerate(of.items())
    ]


def check_parity(case, dtype, layout, calls=3):
    """The first call goes the long way, the second is written down, and the others go by plans."""
    with counted() as taken:
        found = [results_and_gradients(case, Draw(seed, dtype, layout)) for seed in range(calls)]
    with long_way():
        for seed in range(1, calls):
            assert_same(found[seed], results_and_gradients(case, Draw(seed, dtype, layout)))
    assert (taken.forwards, taken.planned, taken.backwards) == (calls - 1, calls - 2, calls - 2)
    assert sum(map(len, cases.WAYS)) == 1


@pytest.mark.parametrize(("case", "dtype", "layout"), in_turn(cases.ATTENTION))
def test_attention_is_the_same_by_the_short_way(case, dtype, layout):
    check_parity(case, dtype, layout)


@pytest.mark.parametrize(("case", "dtype", "layout"), in_turn(cases.NORMS))
def test_norm_is_the_same_by_the_short_way(case, dtype, layout):
    check_parity(case, dtype, layout)


@pytest.mark.parametrize(("case", "dtype", "layout"), in_turn(cases.ADDITIVE))
def test_additive_attention_is_the_same_by_the_short_way(case, dtype, layout):
    check_parity(case, dtype, layout)


@pytest.mark.parametrize(("case", "dtype", "layout"), in_turn(cases.MULTIHEAD))
def test_multihead_attention_is_the_same_by_the_short_way(case, dtype, layout):
    check_parity(case, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_is_the_same_by_the_short_way(dtype, layout):
    if dtype == torch.float32:  # the cases above have these layouts in turn, this one dtype all of them
        check_parity(cases.ATTENTION["mask"], dtype, layout)
        cases.forget()
    check_parity(cases.NORMS["layer_of_all"], dtype, layout, calls=4)


# ----------------------------------------------------------------------------------------------------------- neighbours


@contextlib.contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


NEIGHBOURS: dict[str, dict[str, Any]] = {
    "the first": {},
    "without gradients of q": {"frozen": (0,)},
    "without gradients of k and v": {"frozen": (1, 2)},
    "without gradients": {"frozen": (0, 1, 2)},
    "a shape": {"length": 6},
    "a layout": {"layout": "strided"},
    "an address": {"layout": "unaligned"},
    "a dtype": {"dtype": torch.float16},
    "causal": {"is_causal": True},
    "a window of numbers that are equal": {"window": (1, 0)},
    "another such window": {"window": (0, 1)},
    "no backend": {"backend": None, "context": lambda: fastattn.use_backend("triton")},
    "auto": {"backend": "auto"},
    "the torch backend by default": {"backend": None, "context": lambda: fastattn.use_backend("torch")},
    "the torch backend": {"backend": "torch"},
    "plain kernels": {"context": lambda: fastattn.use_kernels("triton")},
    "kernels in no fixed order": {"context": lambda: fastattn.use_kernels(deterministic=False)},
    "deterministic algorithms": {"context": deterministic_algorithms},
    "no_grad": {"context": torch.no_grad},
    "inference_mode": {"context": torch.inference_mode},
}


def attend_as(seed, *, frozen=(), length=5, layout="dense", dtype=torch.float32, context=None, **options):
    draw = Draw(seed, dtype, layout)
    query, key, value = (draw(1, 1, length, 4, grad=number not in frozen) for number in range(3))
    with contextlib.nullcontext() if context is None else context():
        words: dict[str, Any] = {"backend": "triton", **options}
        output: Any = fastattn.attention(query, key, value, **words)
        found = [output.detach()]
        if output.requires_grad:
            found += torch.autograd.grad(output, draw.leaves, torch.ones_like(output))
    return [*found, torch.tensor([output.requires_grad, output.is_inference(), output.is_leaf])]


def test_neighbours_in_the_signature_one_after_another():
    """Each of these changes one part of the signature; taken for one another, they would read the wrong memory, lose
    gradients or run what was not asked for."""
    with long_way():
        expected = {name: attend_as(number, **changes) for number, (name, changes) in enumerate(NEIGHBOURS.items())}
    with counted() as taken:
        for _ in range(3):
            for number, (name, changes) in enumerate(NEIGHBOURS.items()):
                assert_same(attend_as(number, **changes), expected[name])
    of_kernels = [changes for name, changes in NEIGHBOURS.items() if "torch" not in name]
    assert len(cases.WAYS[0]) == len(of_kernels)
    assert (taken.forwards, taken.planned) == (2 * len(of_kernels), len(of_kernels))


def test_inference_tensors_are_refused_as_by_the_long_way():
    """Autograd keeps no inference tensor for a backward; a signature is the same with one and without."""
    with torch.inference_mode():
        query = torch.randn(1, 1, 3, 4, device=DEVICE)
    key = torch.randn(1, 1, 3, 4, device=DEVICE, requires_grad=True)
    for other in [query.clone()] * 4 + [query]:
        outcome = result_or_error(fastattn.attention, other, key, key, backend="triton")
        with long_way():
            assert str(outcome)[:60] == str(result_or_error(fastattn.attention, other, key, key, backend="triton"))[:60]


# --------------------------------------------------------------------------------------------------------------- errors


def result_or_error(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


QKV = tuple(torch.randn(1, 2, 3, 4).to(DEVICE) for _ in range(3))
X, WEIGHT = torch.randn(3, 8).to(DEVICE), torch.randn(8).to(DEVICE)
ALMOST_RIGHT: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "is_causal=1": (fastattn.attention, QKV, {"is_causal": True}, {"is_causal": 1}),
    "window of floats": (fastattn.attention, QKV, {"window": (1, 2)}, {"window": (1.0, 2.0)}),
    "window of a bool": (fastattn.attention, QKV, {"window": (1, 2)}, {"window": (True, 2)}),
    "window in a list": (fastattn.attention, QKV, {"window": (1, 2)}, {"window": [1, 2]}),
    "prefix=True": (fastattn.attention, QKV, {"is_causal": True, "prefix": 1}, {"is_causal": True, "prefix": True}),
    "prefix=1.0": (fastattn.attention, QKV, {"is_causal": True, "prefix": 1}, {"is_causal": True, "prefix": 1.0}),
    "dropout_p=True": (fastattn.attention, QKV, {"dropout_p": 1.0}, {"dropout_p": True}),
    "scale in a tensor": (fastattn.attention, QKV, {"scale": 0.5}, {"scale": torch.tensor(0.5)}),
    "need_weights=0": (fastattn.attention, QKV, {}, {"need_weights": 0}),
    "return_lse=1": (fastattn.attention, QKV, {"return_lse": True}, {"return_lse": 1}),
    "a sparse mask": (fastattn.attention, QKV, {"attn_mask": torch.eye(3)}, {"attn_mask": torch.eye(3).to_sparse()}),
    "a list for a mask": (fastattn.attention, QKV, {"attn_mask": torch.ones(3)}, {"attn_mask": [1.0, 1.0, 1.0]}),
    "another shape": (fastattn.attention, QKV, {"sinks": torch.ones(2)}, {"sinks": torch.ones(3)}),
    "an odd backend": (fastattn.attention, QKV, {}, {"backend": "Triton"}),
    "eps in a tensor": (fastattn.add_layer_norm, (X,), {"eps": 1e-5}, {"eps": torch.tensor(1e-5)}),
    "eps=True": (fastattn.add_layer_norm, (X,), {"eps": 1.0}, {"eps": True}),
    "eps=1": (fastattn.add_layer_norm, (X,), {"eps": 1.0}, {"eps": 1}),
    "no eps": (fastattn.add_layer_norm, (X,), {"eps": 1.0}, {"eps": None}),
    "dropout of a norm": (fastattn.add_layer_norm, (X,), {"dropout_p": 1.0}, {"dropout_p": True}),
    "sizes of floats": (fastattn.add_layer_norm, (X,), {"normalized_shape": (8,)}, {"normalized_shape": (8.0,)}),
    "a size as a float": (fastattn.add_layer_norm, (X,), {"normalized_shape": 8}, {"normalized_shape": 8.0}),
    "unit_offset=0": (fastattn.add_layer_norm, (X,), {}, {"unit_offset": 0}),
    "round_residual=1": (fastattn.add_layer_norm, (X, X), {}, {"round_residual": 1}),
    "return_residual=1": (fastattn.add_layer_norm, (X, X), {"return_residual": True}, {"return_residual": 1}),
    "a dtype as a word": (fastattn.add_layer_norm, (X,), {"out_dtype": torch.float32}, {"out_dtype": "float32"}),
    "a number for a weight": (fastattn.add_rms_norm, (X,), {"weight": WEIGHT}, {"weight": 1.0}),
    "a row scale of two rows": (
        fastattn.add_layer_norm, (X,), {"row_scale": torch.ones(3)}, {"row_scale": torch.ones(2)},
    ),
    "a nested residual": (
        fastattn.add_rms_norm, (X,), {"residual": X}, {"residual": torch.nested.nested_tensor([torch.ones(2, 8)])},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "args", "right", "almost"), ALMOST_RIGHT.values(), ids=ALMOST_RIGHT)
def test_almost_right_arguments_get_the_same_answer_once_there_is_a_plan(function, args, right, almost):
    """Their values equal those of a call that has a plan, or nearly do."""
    right, almost = (
        {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        for options in (right, almost)
    )
    with long_way():
        expected = result_or_error(function, *args, **{"backend": "triton", **almost})
    with counted() as taken:
        for _ in range(3):
            function(*args, **{"backend": "triton", **right})
    assert taken.planned == 1
    for _ in range(2):
        found = result_or_error(function, *args, **{"backend": "triton", **almost})
        if isinstance(cases.tensors_of(expected)[0], torch.Tensor):
            assert_same(cases.tensors_of(found), cases.tensors_of(expected))
        else:
            assert found == expected


def test_tensors_that_are_negated_when_they_are_read():
    """The imaginary part of a conjugate holds the numbers of the opposite sign. torch writes it out before it enters an
    operator; a plan handed its memory to the kernel."""
    plain = torch.randn(3, 8, device=DEVICE)

    def negated(seed):
        return torch.complex(plain, plain + seed).conj().imag

    def normed(x):
        return fastattn.layer_norm(x, 8, backend="triton")

    for seed in range(4):
        x = negated(seed)
        assert x.is_neg()
        expected = x.clone()
        assert torch.equal(
            fastattn.layer_norm(x, 8, backend="triton"), fastattn.layer_norm(expected, 8, backend="triton")
        )
        x = plain.clone().requires_grad_()
        output = fastattn.layer_norm(x, 8, backend="triton")
        (found,) = torch.autograd.grad(output, x, negated(seed), retain_graph=True)
        (wanted,) = torch.autograd.grad(output, x, expected)
        assert torch.equal(found, wanted)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("case", ["second", "later"])
def test_training_call_keeps_neither_x_nor_the_residual_beside_their_sum(case):
    """A scale of rows that needs no gradient, as stochastic depth has one, does not change that."""
    weight, scale = torch.ones(8, device=DEVICE, requires_grad=True), torch.rand(3, device=DEVICE)

    def call():
        x, residual = (torch.randn(3, 8, device=DEVICE, requires_grad=True) * 1 for _ in range(2))
        output: Any = fastattn.add_layer_norm(x, residual, weight, row_scale=scale, backend="triton")
        return output, [weakref.ref(t) for t in (x, residual)]

    for _ in range(1 if case == "second" else 3):
        call()
    with counted() as taken:
        output, references = call()
    assert taken.forwards == 1
    assert [reference() for reference in references] == [None, None]
    saved = [t for t in output.grad_fn.saved_tensors if t.numel() == output.numel()]
    assert len(saved) == 1  # the sum


def test_entries_hold_no_tensor():
    def call(name, of):
        draw = Draw(0)
        output = cases.tensors_of(of[name](draw))
        output[0].sum().backward()
        return [weakref.ref(t) for t in (*draw.leaves, *output)]

    for name, of in (("everything", cases.ATTENTION), ("layer_of_all", cases.NORMS), ("masks", cases.ADDITIVE)):
        for _ in range(3):
            references = call(name, of)
            gc.collect()
            assert [reference() for reference in references] == [None] * len(references)


def test_entries_are_bounded(monkeypatch):
    monkeypatch.setattr(short_way, "MOST_ENTRIES", 3)
    way = norm_api._SHORT
    for size in range(4, 10):
        for _ in range(3):
            fastattn.layer_norm(torch.ones(2, size, device=DEVICE), size, backend="triton")
        assert len(way) == min(size - 3, 3)
    for size in range(20, 30):
        fastattn.layer_norm(torch.ones(2, size, device=DEVICE), size, backend="triton")
    assert len(way._seen) <= 3


def test_backwards_of_an_entry_are_bounded(monkeypatch):
    monkeypatch.setattr(short_way, "MOST_ENTRIES", 2)
    for step in [1, 1, 1, 2, 3, 4, 5]:
        x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
        gradient = torch.randn(3, 8 * step, device=DEVICE)[:, ::step]
        (found,) = torch.autograd.grad(fastattn.layer_norm(x, 8, backend="triton"), x, gradient)
        with long_way():
            (expected,) = torch.autograd.grad(fastattn.layer_norm(x, 8, backend="triton"), x, gradient)
        assert torch.equal(found, expected)
    (entry,) = norm_api._SHORT._entries.values()
    assert len(entry._backwards) == 2


def test_call_that_cannot_be_written_down_takes_the_long_way_for_good(monkeypatch):
    from fastattn_kernels.common import plans

    monkeypatch.setattr(plans, "ENABLED", False)
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    with counted() as taken:
        for _ in range(4):
            fastattn.layer_norm(x, 8, backend="triton").sum().backward()
    assert taken.forwards == 1  # which found out
    assert taken.planned == taken.backwards == 0
