"""Transformer layers: construction, checkpoints, hooks, errors, torch's containers, copies, transforms."""

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import fastattn
from fastattn.testing import assert_within_budget
from tests.modules.transformer_cases import OURS, THEIRS, Case, make_arguments, make_layer

KINDS = ["encoder", "decoder"]
E, H, N, L = 12, 4, 2, 6
CONSTRUCTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False, "norm_first": True},
    {"dropout": 0.3, "batch_first": True, "activation": "gelu", "layer_norm_eps": 1e-3},
    {"activation": nn.PReLU(), "dtype": torch.bfloat16},
]

PADDING = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])


def outcome(function):
    """The class and message of what ``function`` raises, or None."""
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


def arguments_for(case: Case) -> dict[str, Any]:
    return make_arguments(case, 1)


# ------------------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize("arguments", CONSTRUCTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_torchs_bitwise_and_load_both_ways(kind, arguments):
    torch.manual_seed(0)
    theirs = THEIRS[kind](E, H, 20, **arguments)
    after_theirs = torch.rand(1)
    torch.manual_seed(0)
    ours = OURS[kind](E, H, 20, **arguments)
    assert torch.equal(torch.rand(1), after_theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    others = OURS[kind](E, H, 20, **arguments), THEIRS[kind](E, H, 20, **arguments)
    for other, source in zip(others, (theirs, ours)):
        other.load_state_dict(source.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), source.state_dict().values()))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_ours_and_attributes_torchs(kind):
    theirs = THEIRS[kind](E, H, 20, 0.2, "gelu", 1e-3, True, True)
    ours = OURS[kind](E, H, 20, 0.2, "gelu", 1e-3, True, True, backend="torch")
    for (name, part), (other, peer) in zip(ours.named_children(), theirs.named_children()):
        assert name == other
        assert isinstance(part, type(peer))
        assert part.extra_repr() == peer.extra_repr()
        fused = isinstance(part, (nn.MultiheadAttention, nn.LayerNorm))
        assert type(part).__module__.startswith("fastattn") == fused
        assert not fused or part.backend == "torch"
    public = {name: value for name, value in vars(theirs).items() if not name.startswith("_")}
    assert {n: v for n, v in vars(ours).items() if not n.startswith("_")} == public | (
        {"activation_relu_or_gelu": 0} if kind == "encoder" else {}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_begin_with_torchs(kind):
    theirs, ours = (list(inspect.signature(kinds[kind]).parameters.values()) for kinds in (THEIRS, OURS))
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert [(p.name, p.kind) for p in ours[len(theirs) :]] == [("backend", inspect.Parameter.KEYWORD_ONLY)]
    theirs, ours = (list(inspect.signature(kinds[kind].forward).parameters.values()) for kinds in (THEIRS, OURS))
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize(
    "arguments", [(0, 1), (8, 3), (8, 2, -1), (8, 2, 20, 1.5), (8, 2, 20, 0.1, "swish"), ("8", 2)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_constructor_errors_are_torchs(kind, arguments):
    theirs, ours = (outcome(lambda kinds=kinds: kinds[kind](*arguments)) for kinds in (THEIRS, OURS))
    assert theirs is not None
    assert ours == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_backend_is_refused(kind):
    with pytest.raises(ValueError, match="backend='cuda': expected one of 'auto', 'triton', 'torch'"):
        OURS[kind](E, H, backend="cuda")


@pytest.mark.parametrize("activation", ["relu", nn.PReLU()], ids=["string", "module"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_are_equal(kind, activation):
    layer = OURS[kind](E, H, 20, activation=activation, batch_first=True, backend="torch").eval()
    arguments = arguments_for(Case(kind, size=(E, H)))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert twin.self_attn.backend == twin.norm1.backend == "torch"
        assert torch.equal(twin(**arguments), layer(**arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_from_before_activations_have_relu(kind):
    layer = OURS[kind](E, H, 20, activation="gelu")
    state = {name: value for name, value in layer.__dict__.items() if name != "activation"}
    revived = OURS[kind].__new__(OURS[kind])
    revived.__setstate__(state)
    assert revived.activation is torch.nn.functional.relu


# -------------------------------------------------------------------------------------------------------------- errors

X = torch.zeros(N, L, E)
WRONG: dict[str, dict[str, Any]] = {
    "input_1d": {"x": torch.zeros(E)},
    "input_4d": {"x": torch.zeros(1, N, L, E)},
    "input_width": {"x": torch.zeros(N, L, E + 1)},
    "input_dtype": {"x": X.double()},
    "mask_integer": {"mask": torch.zeros(L, L, dtype=torch.int64)},
    "mask_shape": {"mask": torch.zeros(L, L + 1)},
    "mask_dtype": {"mask": torch.zeros(L, L, dtype=torch.float64)},
    "mask_1d": {"mask": torch.zeros(L, dtype=torch.bool)},
    "padding_integer": {"key_padding_mask": torch.zeros(N, L, dtype=torch.uint8)},
    "padding_shape": {"key_padding_mask": torch.zeros(N, L + 1, dtype=torch.bool)},
    "padding_1d": {"key_padding_mask": torch.zeros(L, dtype=torch.bool)},
    "both_integer": {
        "mask": torch.zeros(L, L, dtype=torch.int64),
        "key_padding_mask": torch.zeros(N, L, dtype=torch.bool),
    },
    "mask_list": {"mask": [[True]]},
    "padding_list": {"key_padding_mask": [[True]]},
    "causal_without_mask": {"is_causal": True},
    "memory_width": {"memory": torch.zeros(N, L, E + 1)},
    "memory_batch": {"memory": torch.zeros(N + 1, L, E)},
    "memory_mask_shape": {"memory": X, "memory_mask": torch.zeros(L + 1, L)},
    "memory_padding_shape": {"memory": X, "memory_key_padding_mask": torch.zeros(N, L + 1, dtype=torch.bool)},
    "memory_causal_without_mask": {"memory": X, "memory_is_causal": True},
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in KINDS for name in WRONG if kind == "decoder" or "memory" not in name]
)
def test_errors_are_torchs(kind, name):
    wrong = dict(WRONG[name])
    inputs = (wrong.pop("x", X), *([wrong.pop("memory", X)] if kind == "decoder" else []))
    prefix = "src" if kind == "encoder" else "tgt"
    names = {name: name if name.startswith("memory") else f"{prefix}_{name}" for name in wrong}
    if kind == "encoder":
        names["is_causal"] = "is_causal"
    renamed = {names[name]: value for name, value in wrong.items()}
    theirs, ours = (kinds[kind](E, H, 20, batch_first=True) for kinds in (THEIRS, OURS))
    results = []
    with warnings.catch_warnings(), fastattn.use_backend("torch"):
        warnings.filterwarnings("ignore", "Support for mismatched")
        for layer, training in ((theirs, True), (ours, True), (ours, False)):
            with torch.set_grad_enabled(layer.train(training).training):
                results.append(outcome(lambda layer=layer: layer(*inputs, **renamed)))
    if name in ("input_dtype", "mask_dtype", "memory_width", "memory_batch"):  # these messages tell of torch's insides
        results = [result and result[0] for result in results]
    theirs, in_training, in_evaluation = results
    assert theirs is not None
    assert in_training == in_evaluation == theirs


def test_wrong_width_in_front_of_a_norm_is_named():
    with pytest.raises(ValueError, match="normalized_shape"):
        fastattn.TransformerEncoderLayer(E, H, 20, norm_first=True)(torch.zeros(L, E + 1))


def test_mismatched_masks_warn_as_in_torch():
    mask = torch.zeros(L, L)
    for kinds in (THEIRS, OURS):
        layer = kinds["encoder"](E, H, 20, batch_first=True)
        with pytest.warns(UserWarning, match="mismatched src_key_padding_mask and src_mask is deprecated") as caught:
            layer(X, src_mask=mask, src_key_padding_mask=PADDING)
        assert len(caught) == 1


def test_backend_by_name_refuses_and_does_not_fall_back():
    layer = fastattn.TransformerEncoderLayer(E, H, 20, dtype=torch.float64, backend="triton")
    with pytest.raises(NotImplementedError, match="float64"):
        layer(torch.zeros(L, E, dtype=torch.float64))


# --------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_every_part_see_what_they_see_in_torch(kind, norm_first, training):
    case = Case(kind=kind, norm_first=norm_first, activation="module", mode="train" if training else "eval")
    seen = {}
    for kinds in (THEIRS, OURS):
        layer = make_layer(case, kinds)
        calls = seen[kinds is OURS] = []

        def note(name, calls=calls):
            return lambda _, inputs, output: calls.append(
                (name, inputs[0], output[0] if isinstance(output, tuple) else output)
            )

        for name, part in layer.named_children():
            part.register_forward_hook(note(name))
        with torch.set_grad_enabled(training), fastattn.use_backend("torch"):
            layer(**arguments_for(case))
    names = [name for name, _, _ in seen[True]]
    assert names == [name for name, _, _ in seen[False]]
    assert len(names) == {"encoder": 9, "decoder": 12}[kind]
    for (_, *ours), (_, *theirs) in zip(seen[True], seen[False]):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("hooked", ["norm2", "dropout1", "nothing"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_hook_takes_one_add_apart_and_no_other(monkeypatch, norm_first, hooked):
    calls = []
    plain = fastattn.AddLayerNorm.forward

    def note(self, x, residual=None, **options):
        calls.append((self, residual is not None, options.get("dropout_p")))
        return plain(self, x, residual, **options)

    monkeypatch.setattr(fastattn.AddLayerNorm, "forward", note)
    layer = fastattn.TransformerEncoderLayer(E, H, 20, 0.5, norm_first=norm_first)
    if hooked != "nothing":
        layer.get_submodule(hooked).register_forward_pre_hook(lambda module, inputs: None)
    layer(torch.randn(L, E))
    fused = 0.5 if hooked == "nothing" else 0.0
    expected = {
        (False, "norm2"): [(True, 0.5), (False, None)],
        (False, "dropout1"): [(True, 0.0), (True, 0.5)],
        (False, "nothing"): [(True, 0.5), (True, 0.5)],
        (True, "norm2"): [(False, None), (False, None)],
        (True, "dropout1"): [(False, None), (True, 0.0)],
        (True, "nothing"): [(False, None), (True, fused)],
    }[norm_first, hooked]
    assert [module for module, *_ in calls] == [layer.norm1, layer.norm2]
    assert [tuple(rest) for _, *rest in calls] == expected


# --------------------------------------------------------------------------------- what padding and empty rows may hold


@pytest.mark.parametrize("norm_first", [False, True])
def test_what_padding_holds_does_not_matter(backend, norm_first):
    case = Case(norm_first=norm_first, mode="eval_no_grad", size=(E, H))
    layer = make_layer(case, OURS, backend=backend)
    torch.manual_seed(0)
    x = torch.randn(N, L, E)
    with torch.no_grad():
        clean = layer(x, src_key_padding_mask=PADDING)
        x[PADDING] = torch.nan
        dirty = layer(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(dirty[~PADDING], clean[~PADDING])


@pytest.mark.parametrize("norm_first", [False, True])
def test_sequence_of_padding_alone_is_finite_with_finite_gradients(norm_first):
    layer = make_layer(Case(norm_first=norm_first, size=(E, H)), OURS, backend="torch")
    padding = torch.tensor([[True] * L, [False] * L])
    output = layer(torch.randn(N, L, E), src_key_padding_mask=padding)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


# ---------------------------------------------------------------------------------------------- inside torch's modules


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_torchs_encoder_calls_ours_in_inference_and_makes_no_nested_tensors(monkeypatch):
    layers = make_layer(Case(size=(E, H)), THEIRS), make_layer(Case(size=(E, H)), OURS, backend="torch")
    theirs, ours = (nn.TransformerEncoder(layer, 2).eval() for layer in layers)
    torch.manual_seed(0)
    x = torch.randn(N, L, E)
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=PADDING)
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", None)
        monkeypatch.setattr(torch, "_nested_tensor_from_mask", None)
        output = ours(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(output[~PADDING], expected[~PADDING])
    assert all(type(layer) is fastattn.TransformerEncoderLayer for layer in ours.layers)


def test_activation_that_torchs_inference_takes_for_another_is_kept():
    """``torch._transformer_encoder_layer_fwd`` computes the exact GELU whatever ``nn.GELU`` was asked for, and a copied
    ``nn.TransformerDecoderLayer`` has ReLU where it had a module."""
    torch.manual_seed(0)
    x = torch.randn(N, L, E)
    encoder = fastattn.TransformerEncoderLayer(E, H, 20, 0.0, nn.GELU("tanh"), batch_first=True)
    decoder = fastattn.TransformerDecoderLayer(E, H, 20, 0.0, nn.GELU("tanh"), batch_first=True)
    with torch.no_grad(), fastattn.use_backend("torch"):
        torch.testing.assert_close(encoder.eval()(x), encoder.train()(x), rtol=1e-6, atol=1e-6)
        assert torch.equal(nn.TransformerDecoder(decoder, 1)(x, x), decoder(x, x))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_whole_transformer_of_ours_matches_torchs():
    models = []
    for kinds in (THEIRS, OURS):
        torch.manual_seed(0)
        stacks = (
            nn.TransformerEncoder(kinds["encoder"](E, H, 20, 0.0, batch_first=True), 2),
            nn.TransformerDecoder(kinds["decoder"](E, H, 20, 0.0, batch_first=True), 2),
        )
        models.append(nn.Transformer(E, H, custom_encoder=stacks[0], custom_decoder=stacks[1], batch_first=True))
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    torch.manual_seed(1)
    source, target = torch.randn(N, L, E), torch.randn(N, L, E)
    with fastattn.use_backend("torch"):
        theirs, ours = (model(source, target, tgt_mask=causal) for model in models)
    torch.testing.assert_close(ours, theirs)


def test_nested_tensors_go_torchs_way():
    layer = make_layer(Case(mode="eval", size=(E, H)), OURS, backend="torch")
    sequences = [torch.randn(3, E), torch.randn(5, E)]
    with torch.no_grad():
        nested = torch.nested.nested_tensor(sequences)
        for got, x in zip(layer(nested).unbind(), sequences):
            torch.testing.assert_close(got, layer(x))
    layer.train()
    with pytest.raises(AssertionError, match="does not support NestedTensor outside of its fast path"):
        layer(nested)


# ---------------------------------------------------------------------------------------------------------- transforms


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", [Case(padding="bool"), Case("decoder", norm_first=True, mask="causal_hint")], ids=str)
def test_compile_without_graph_breaks(backend, case):
    layer, twin = (make_layer(case, OURS, backend=backend) for _ in range(2))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for run, parameters in ((layer, layer.parameters()), (compiled, twin.parameters())):
        output = run(**arguments_for(case))
        output.square().sum().backward()
        results.append((output, [p.grad for p in parameters]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_export_with_a_dynamic_batch(backend, kind, strict):
    case = Case(kind, padding="bool", norm_first=strict, mode="eval")
    layer, arguments = make_layer(case, OURS, backend=backend), arguments_for(case)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {name: {0: batch} for name in arguments}
    exported = torch.export.export(layer, (), arguments, dynamic_shapes=shapes, strict=strict).module()
    other = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in arguments.items()}
    torch.testing.assert_close(exported(**other), layer(**other))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_the_dtype_and_the_accuracy_of_torch(backend, kind, norm_first):
    case = Case(kind, norm_first=norm_first, activation="gelu")
    arguments = arguments_for(case)
    with torch.no_grad():
        truth = make_layer(case, THEIRS).double()(**{name: tensor.double() for name, tensor in arguments.items()})
        with torch.autocast("cpu", torch.bfloat16):
            peer, actual = make_layer(case, THEIRS)(**arguments), make_layer(case, OURS, backend=backend)(**arguments)
    assert actual.dtype == peer.dtype == torch.float32
    assert_within_budget(actual, truth=truth, peer=peer, name="output")


@pytest.mark.parametrize("kind", KINDS)
def test_script_gets_torchs_layer_and_says_so(kind):
    case = Case(kind, mode="eval", activation="gelu")
    layer, arguments = make_layer(case, OURS, backend="torch"), arguments_for(case)
    with pytest.warns(UserWarning, match="torch.jit.script") as caught:
        scripted: Any = torch.jit.script(copy.deepcopy(layer))
    said = "\n".join(str(warning.message) for warning in caught)
    for name in ("MultiheadAttention", "AddLayerNorm", type(layer).__name__):
        assert f"cannot compile fastattn.{name}" in said
    torch.testing.assert_close(scripted(**arguments), layer(**arguments))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for its CPU attention
@pytest.mark.parametrize("norm_first", [False, True])
def test_per_sample_gradients_are_the_gradients_of_each_sample(norm_first):
    case = Case(norm_first=norm_first)
    layer, x = make_layer(case, OURS, backend="torch"), arguments_for(case)["src"]
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample,)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        for name, gradient in grad(loss)(parameters, sample).items():
            torch.testing.assert_close(together[name][i], gradient, rtol=1e-4, atol=1e-4)
