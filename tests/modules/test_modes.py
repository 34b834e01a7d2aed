"""The modes of torch that ``nn.MultiheadAttention`` knows: forward mode, vmap, meta tensors, replaced projections,
counters of operations, vectorised Jacobians, deterministic algorithms; and inputs without anything in them."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn.testing import random_tensor

E, HEADS = 16, 2


def make_pair(**arguments: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """Torch's module, and ours with the same parameters."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, **arguments)
    ours = copy.deepcopy(theirs)
    fastattn.fuse(ours, backend="torch")
    return theirs, ours


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- forward mode

MODULES: dict[str, Any] = {
    "attention": lambda: _Self(fastattn.MultiheadAttention(E, HEADS, batch_first=True)),
    "attention_alone": lambda: _Self(fastattn.MultiheadAttention(E, HEADS, batch_first=True), need_weights=False),
    "encoder_layer": lambda: fastattn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True, activation="gelu"),
    "additive": lambda: _Twice(fastattn.AdditiveAttention(E, E, 8)),
    "layer_norm": lambda: fastattn.AddLayerNorm(E),
    "rms_norm": lambda: fastattn.AddRMSNorm(E),
}


class _Self(nn.Module):
    def __init__(self, attention, **flags):
        super().__init__()
        self.attention, self.flags = attention, flags

    def forward(self, x):
        return self.attention(x, x, x, **self.flags)[0]


class _Twice(_Self):
    def forward(self, x):
        return self.attention(x, x)[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_forward_mode_goes_on_where_gradients_are_off(name, training, backend):
    """no_grad is about reverse mode alone; torch's fast path of inference has no rule for forward mode."""
    torch.manual_seed(0)
    module = MODULES[name]().train(training and name != "encoder_layer")  # whose dropout would draw anew
    x, direction = random_tensor(2, 5, E, seed=1), random_tensor(2, 5, E, seed=2)
    with fastattn.use_backend(backend):
        expected = torch.func.jvp(module, (x,), (direction,))[1]
        with torch.no_grad(), forward_ad.dual_level():
            output = module(forward_ad.make_dual(x, direction))
            tangent = forward_ad.unpack_dual(output).tangent
    assert_close(tangent, expected)


def test_forward_mode_of_a_mask_under_no_grad():
    module, x = make_pair()[1].eval(), random_tensor(2, 5, E, seed=1)
    mask, direction = random_tensor(5, 5, seed=2), random_tensor(5, 5, seed=3)
    expected = torch.func.jvp(lambda mask: module(x, x, x, attn_mask=mask)[0], (mask,), (direction,))[1]
    with torch.no_grad(), forward_ad.dual_level():
        output, _ = module(x, x, x, attn_mask=forward_ad.make_dual(mask, direction))
        assert_close(forward_ad.unpack_dual(output).tangent, expected)


# --------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_vmap_draws_dropout_as_its_randomness_says(need_weights, batched, backend):
    torch.manual_seed(0)
    module = fastattn.MultiheadAttention(E, HEADS, dropout=0.5, batch_first=True, backend=backend)
    x = random_tensor(2, 5, E, seed=1)

    def attend(x, _):
        return module(x, x, x, need_weights=need_weights)[0]

    def run(randomness):
        inputs = x.expand(3, -1, -1, -1) if batched else x
        return vmap(attend, in_dims=(0 if batched else None, 0), randomness=randomness)(inputs, torch.zeros(3))

    same, different = run("same"), run("different")
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness error mode"):
        run("error")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_per_sample_gradients_under_dropout():
    """Each sample draws its own, and its gradient is of what it drew: a dropped row of values moves nothing."""
    module, xs = make_pair(dropout=0.5)[1], random_tensor(4, 1, 5, E, seed=1)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, x):
        output, weights = functional_call(module, parameters, (x, x, x))
        return output.square().sum(), weights

    per_sample = vmap(grad(loss, has_aux=True), in_dims=(None, 0), randomness="different")
    gradients, weights = per_sample(parameters, xs)
    assert len({tuple((w == 0).flatten().tolist()) for w in weights}) > 1
    assert all(torch.isfinite(g).all() and g.any() for g in gradients.values())


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*batching rule")
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("name", MODULES)
def test_vectorised_jacobians_and_hessians_are_those_of_loops(name, strategy):
    """``torch.autograd.functional`` vectorises by an older vmap, which has fewer rules than ``torch.func``'s."""
    torch.manual_seed(0)
    module, x = MODULES[name]().eval(), random_tensor(1, 3, E, seed=1)
    of = torch.autograd.functional
    with fastattn.use_backend("torch"):
        jacobian = of.jacobian(module, x, vectorize=True, strategy=strategy)
        assert_close(jacobian, of.jacobian(module, x))

        def loss(x):
            return module(x).square().sum()

        hessian = of.hessian(loss, x, vectorize=True, outer_jacobian_strategy=strategy)
        torch.testing.assert_close(hessian, of.hessian(loss, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("need_weights", [True, False])
def test_batched_gradients_are_those_of_a_loop(need_weights, backend):
    torch.manual_seed(0)
    module = fastattn.MultiheadAttention(E, HEADS, batch_first=True, backend=backend)
    x = random_tensor(2, 5, E, seed=1).requires_grad_()
    output, _ = module(x, x, x, need_weights=need_weights)
    cotangents = random_tensor(3, 2, 5, E, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no batching rule for its CPU attention
        (together,) = torch.autograd.grad(output, x, cotangents, is_grads_batched=True, retain_graph=True)
    for found, cotangent in zip(together, cotangents):
        assert_close(found, torch.autograd.grad(output, x, cotangent, retain_graph=True)[0])


# -------------------------------------------------------------------------------------------------------- meta tensors


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("appended", [True, False])
def test_attention_on_the_meta_device(appended, training, need_weights):
    """Autocast knows no such device, and raises where it is asked about it."""
    module = fastattn.MultiheadAttention(
        E, HEADS, dropout=0.1, add_bias_kv=appended, add_zero_attn=appended, batch_first=True, device="meta"
    ).train(training)
    x = torch.empty(2, 5, E, device="meta")
    masks = {
        "key_padding_mask": torch.empty(2, 5, dtype=torch.bool, device="meta"),
        "attn_mask": torch.empty(5, 5, dtype=torch.bool, device="meta"),
    }
    for given in ({}, masks):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                output, weights = module(x, x, x, need_weights=need_weights, **given)
            assert output.device.type == "meta" and output.shape == x.shape
            if enabled:
                output.sum().backward()
            assert (weights is None) != need_weights
            assert weights is None or weights.shape == (2, 5, 5 + 2 * appended)


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda: fastattn.TransformerEncoderLayer(E, HEADS, 32, device="meta"), [(5, 2, E)]),
        (lambda: fastattn.TransformerDecoderLayer(E, HEADS, 32, device="meta"), [(5, 2, E), (6, 2, E)]),
        (lambda: fastattn.SelfAttention2d(E, HEADS, device="meta"), [(2, E, 3, 3)]),
        (lambda: fastattn.AdditiveAttention(E, E, 4, device="meta"), [(2, 5, E), (2, 6, E)]),
        (lambda: fastattn.AddRMSNorm(E, device="meta"), [(2, 5, E)]),
    ],
    ids=["encoder", "decoder", "image", "additive", "rms_norm"],
)
def test_other_modules_on_the_meta_device(make, shapes):
    module = make()
    inputs = [torch.empty(*shape, device="meta", requires_grad=True) for shape in shapes]
    result = module(*inputs)
    output = result[0] if isinstance(result, tuple) else result
    output.sum().backward()
    assert output.shape == inputs[0].shape
    assert all(t.grad is not None and t.grad.shape == t.shape for t in inputs)


# ------------------------------------------------------------------------------------------------ replaced projections


class LowRank(nn.Module):
    """A projection and a learned change of it, as fine-tuning adds: ``weight`` is their sum."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Parameter(torch.randn(2, E)), nn.Parameter(torch.randn(E, 2))

    @property
    def weight(self):
        return self.base.weight + self.up @ self.down

    @property
    def bias(self):
        return self.base.bias


class Wrapped(nn.Module):
    """A projection that has no weight to read."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def without_bias(module):
    module.out_proj = nn.Linear(E, E, bias=False)


def without_bias_inside(module):
    module.in_proj_bias = None


def low_rank(module):
    module.out_proj = LowRank(module.out_proj)


def weight_normed(module):
    parametrizations.weight_norm(module.out_proj)


def pruned(module):
    prune.l1_unstructured(module.out_proj, "weight", 0.5)
    prune.l1_unstructured(module, "in_proj_weight", 0.5)


def hooked(module):  # torch reads the weight and calls nothing
    module.out_proj.register_forward_hook(lambda *_: pytest.fail("the projection was called"))


def wider(module):
    module.out_proj = nn.Linear(E, E + 8)


@pytest.mark.parametrize("mode", ["training", "evaluation", "inference"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "replace",
    [without_bias, without_bias_inside, low_rank, weight_normed, pruned, hooked, wider],
    ids=lambda f: f.__name__,
)
def test_replaced_projections_do_what_they_do_in_torch(replace, need_weights, mode):
    results, x = [], random_tensor(2, 5, E, seed=1)
    for module in make_pair():
        torch.manual_seed(1)
        replace(module)
        ours = isinstance(module, fastattn.MultiheadAttention)
        module.train(mode == "training")
        # torch's fast path of inference refuses an out_proj without a bias; ours is compared with its other path
        with torch.set_grad_enabled(mode != "inference" or not ours):
            results.append(module(x, x, x, need_weights=need_weights)[0])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("kind", ["quantised", "wrapped"])
def test_projection_without_a_weight_is_called(kind, inference):
    """torch cannot use them: a quantised layer's ``weight`` is a method, and a wrapper has none."""
    module: Any = make_pair()[1].eval()
    x = random_tensor(2, 5, E, seed=1)
    expected, _ = module(x, x, x)
    if kind == "quantised":
        holder = nn.Sequential(nn.Linear(E, E))
        holder[0].load_state_dict(module.out_proj.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is being moved
            quantization: Any = torch.ao.quantization
            module.out_proj = quantization.quantize_dynamic(holder, {nn.Linear}, dtype=torch.qint8)[0]
    else:
        module.out_proj = Wrapped(module.out_proj)
    with torch.set_grad_enabled(not inference):
        output, _ = module(x, x, x)
    tolerance = 0.05 if kind == "quantised" else 1e-5  # eight bits
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------ counters


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "padding", "float"])
@pytest.mark.parametrize(
    "arguments", [{}, {"dropout": 0.1}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 8, "vdim": 12}], ids=str
)
def test_floating_point_operations_are_counted_as_torchs_are(arguments, masks, need_weights):
    counts = []
    for module in make_pair(**arguments):
        x = random_tensor(2, 5, E, seed=1).requires_grad_()
        key = random_tensor(2, 7, arguments.get("kdim", E), seed=2)
        value = random_tensor(2, 7, arguments["vdim"], seed=3) if "vdim" in arguments else key
        given = {
            "none": {},
            "padding": {"key_padding_mask": torch.zeros(2, 7, dtype=torch.bool)},
            "float": {"attn_mask": torch.zeros(5, 7)},
        }[masks]
        with FlopCounterMode(display=False) as forward:
            output, _ = module(x, key, value, need_weights=need_weights, **given)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0 < counts[0][1]


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_operations_of_layers_are_counted_as_torchs_are(kind):
    theirs = kind(E, HEADS, 32)
    ours = copy.deepcopy(theirs)
    fastattn.fuse(ours, backend="torch")
    counts = []
    for layer in (theirs, ours):
        x = random_tensor(5, 2, E, seed=1).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            layer(*(x,) * (1 if kind is nn.TransformerEncoderLayer else 2)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_operations_of_a_backward_alone_and_of_the_operators(backend):
    """Fused attention is counted as torch counts its own: two products, and five in the backward, which makes the
    scores again."""
    query, key = random_tensor(2, 3, 5, 8, seed=1).requires_grad_(), random_tensor(2, 3, 7, 8, seed=2).requires_grad_()
    product = 2 * 2 * 3 * 5 * 7 * 8
    for weights, products in ((False, 5), (True, 4)):
        with FlopCounterMode(display=False) as forward:
            result: Any = fastattn.attention(
                query, key, key, return_lse=True, window=(1, 1), need_weights=weights, backend=backend
            )
        with FlopCounterMode(display=False) as backward:
            result[0].sum().backward()
        assert forward.get_total_flops() == 2 * product
        assert backward.get_total_flops() == products * product


@pytest.mark.parametrize("key", ["CPU", "CUDA", "XPU", "MPS", "HPU", "MTIA", "XLA", "PrivateUse1"])
@pytest.mark.parametrize("operator", ["attention", "additive", "add_norm"])
def test_operators_have_a_kernel_on_every_device(operator, key):
    for direction in ("forward", "backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastattn::{operator}_{direction}", key)


# ---------------------------------------------------------------------------------------- nothing, and filled memory


@pytest.fixture
def deterministic():
    """In this mode torch fills memory that it hands out with NaN, so that what is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"need_weights": True},
    "heads": {"need_weights": True, "average_attn_weights": False},
    "causal": {"is_causal": True, "need_weights": True},
    "window": {"window": (1, 1), "return_lse": True},
    "softcap": {"softcap": 2.0},
}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("batch", "heads", "length", "keys"),
    [(2, 2, 5, 7), (0, 2, 5, 7), (2, 0, 5, 7), (2, 2, 0, 7), (2, 2, 5, 0)],
    ids=["full", "no_batch", "no_heads", "no_queries", "no_keys"],
)
def test_no_unwritten_memory_shows(batch, heads, length, keys, rule, backend):
    """The average of no heads was memory that nobody had written."""
    query = random_tensor(batch, heads, length, 8, seed=1).requires_grad_()
    key = random_tensor(batch, heads, keys, 8, seed=2).requires_grad_()
    result: Any = fastattn.attention(query, key, key, backend=backend, **RULES[rule])
    results = result if isinstance(result, tuple) else (result,)
    finite = [t.where(t.isfinite(), 0).sum() for t in results]  # the LSE of no keys is -inf
    gradients = torch.autograd.grad(torch.stack(finite).sum(), (query, key))
    for tensor in (*results, *gradients):
        assert not tensor.isnan().any()
    if not heads:
        assert not any(t.any() for t in results)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", MODULES)
def test_modules_run_deterministically(name, backend):
    torch.manual_seed(0)
    module = MODULES[name]()
    with fastattn.use_backend(backend):
        for shape in ((2, 5, E), (0, 5, E), (2, 0, E)):
            x = random_tensor(*shape, seed=1).requires_grad_()
            output = module(x)
            output.sum().backward()
            for tensor in (output, x.grad, *(p.grad for p in module.parameters())):
                assert tensor is not None and not tensor.isnan().any()
