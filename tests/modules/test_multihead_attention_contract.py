"""Construction, checkpoints, argument rules and errors: those of ``nn.MultiheadAttention``, to the letter."""

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn

BOTH = (nn.MultiheadAttention, fastattn.MultiheadAttention)
CONSTRUCTIONS = [
    {},
    {"bias": False},
    {"dropout": 0.3, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6},
    {"vdim": 10, "bias": False, "add_bias_kv": True},
    {"kdim": 8, "vdim": 8},
    {"dtype": torch.bfloat16},
]


def both(*args, **kwargs):
    """Torch's module and ours, made under one seed."""
    modules: list[nn.MultiheadAttention] = []
    for kind in BOTH:
        torch.manual_seed(0)
        modules.append(kind(*args, **kwargs))
    return modules


def outcome(function):
    """The class and message of what ``function`` raises, or None."""
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


# ------------------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize("arguments", CONSTRUCTIONS, ids=str)
def test_parameters_are_torchs_bitwise(arguments):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, **arguments)
    after_theirs = torch.rand(1)
    torch.manual_seed(0)
    ours = fastattn.MultiheadAttention(8, 2, **arguments)
    assert torch.equal(torch.rand(1), after_theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for (_, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert list(ours._parameters) == list(theirs._parameters)
    public = {name: value for name, value in vars(theirs).items() if not name.startswith("_")}
    assert {name: value for name, value in vars(ours).items() if not name.startswith("_")} == public
    assert ours._qkv_same_embed_dim == theirs._qkv_same_embed_dim
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("arguments", CONSTRUCTIONS, ids=str)
def test_state_dict_loads_both_ways(arguments):
    theirs, ours = nn.MultiheadAttention(8, 2, **arguments), fastattn.MultiheadAttention(8, 2, **arguments)
    ours.load_state_dict(theirs.state_dict())
    other = nn.MultiheadAttention(8, 2, **arguments)
    other.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), theirs.state_dict().values()))


def test_signatures_begin_with_torchs():
    theirs, ours = (list(inspect.signature(kind).parameters.values()) for kind in BOTH)
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])
    theirs, ours = (list(inspect.signature(kind.forward).parameters.values()) for kind in BOTH)
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize(
    "arguments",
    [(0, 1), (8, 0), (-4, 2), (8, 3), (8.0, 2), (8, 2, 0.0, True, False, False, -1), (True, 1)],
    ids=str,
)
def test_constructor_errors_are_torchs(arguments):
    theirs, ours = (outcome(lambda kind=kind: kind(*arguments)) for kind in BOTH)
    assert ours == theirs


def test_integer_dtype_is_torchs_error():
    theirs, ours = (outcome(lambda kind=kind: kind(8, 2, dtype=torch.int64)) for kind in BOTH)
    assert theirs is not None
    assert ours == theirs


def test_unknown_backend_is_refused():
    unknown: Any = "cuda"
    with pytest.raises(ValueError, match="backend='cuda': expected one of 'auto', 'triton', 'torch'"):
        fastattn.MultiheadAttention(8, 2, backend=unknown)


def test_old_checkpoints_without_packed_flag_load():
    module = fastattn.MultiheadAttention(8, 2)
    state = {name: value for name, value in module.__dict__.items() if name != "_qkv_same_embed_dim"}
    revived = fastattn.MultiheadAttention.__new__(fastattn.MultiheadAttention)
    revived.__setstate__(state)
    assert revived._qkv_same_embed_dim is True


def test_deepcopy_and_pickle_keep_backend_and_weights():
    module = fastattn.MultiheadAttention(8, 2, backend="torch")
    x = torch.randn(3, 2, 8)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.backend == "torch"
        assert torch.equal(twin(x, x, x)[0], module(x, x, x)[0])


# -------------------------------------------------------------------------------------------------------------- errors

L, S, N, E = 3, 4, 2, 8


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def boolean(*shape):
    return zeros(*shape, dtype=torch.bool)


# name: constructor keywords, query, key, value, forward keywords. In training mode, where torch has one path.
WRONG: dict[str, tuple[dict[str, Any], Tensor, Tensor, Tensor, dict[str, Any]]] = {
    "query_1d": ({}, zeros(E), zeros(E), zeros(E), {}),
    "query_4d": ({}, zeros(1, L, N, E), zeros(S, N, E), zeros(S, N, E), {}),
    "key_2d": ({}, zeros(L, N, E), zeros(S, E), zeros(S, N, E), {}),
    "unbatched_key_3d": ({}, zeros(L, E), zeros(S, N, E), zeros(S, N, E), {}),
    "padding_1d": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"key_padding_mask": boolean(S)}),
    "unbatched_padding_2d": ({}, zeros(L, E), zeros(S, E), zeros(S, E), {"key_padding_mask": boolean(1, S)}),
    "mask_1d": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"attn_mask": boolean(S)}),
    "mask_5d": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"attn_mask": boolean(1, 1, 1, L, S)}),
    "unbatched_mask_1d": ({}, zeros(L, E), zeros(S, E), zeros(S, E), {"attn_mask": boolean(S)}),
    "unbatched_mask_4d": ({}, zeros(L, E), zeros(S, E), zeros(S, E), {"attn_mask": boolean(1, 1, L, S)}),
    "unbatched_mask_3d_shape": ({}, zeros(L, E), zeros(S, E), zeros(S, E), {"attn_mask": boolean(3, L, S)}),
    "mask_integer": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"attn_mask": zeros(L, S, dtype=torch.uint8)}),
    "padding_integer": (
        {}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"key_padding_mask": zeros(N, S, dtype=torch.int64)},
    ),
    "mask_list": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"attn_mask": [[True]]}),
    "padding_list": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"key_padding_mask": [[True]]}),
    "embed_dim": ({}, zeros(L, N, 7), zeros(S, N, E), zeros(S, N, E), {}),
    "key_value_shapes": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, 6), {}),
    "key_value_lengths": ({}, zeros(L, N, E), zeros(S, N, E), zeros(5, N, E), {}),
    "key_value_lengths_batch_first": ({"batch_first": True}, zeros(N, L, E), zeros(N, S, E), zeros(N, 5, E), {}),
    "unbatched_key_value_lengths": ({}, zeros(L, E), zeros(S, E), zeros(5, E), {}),
    "key_width": ({}, zeros(L, N, E), zeros(S, N, 6), zeros(S, N, 6), {}),
    "kdim": ({"kdim": 6}, zeros(L, N, E), zeros(S, N, 5), zeros(S, N, E), {}),
    "vdim": ({"vdim": 6}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, 5), {}),
    "separate_lengths": ({"vdim": 6}, zeros(L, N, E), zeros(S, N, E), zeros(5, N, 6), {}),
    "separate_lengths_batch_first": (
        {"vdim": 6, "batch_first": True}, zeros(N, L, E), zeros(N, S, E), zeros(N, 5, 6), {},
    ),
    "mask_2d_shape": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"attn_mask": boolean(S, L)}),
    "mask_3d_shape": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"attn_mask": boolean(3, L, S)}),
    "padding_batch": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"key_padding_mask": boolean(5, S)}),
    "padding_length": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"key_padding_mask": boolean(N, L)}),
    "padding_length_appended": (
        {"add_bias_kv": True, "add_zero_attn": True},
        zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"key_padding_mask": boolean(N, L)},
    ),
    "causal_without_mask": ({}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {"is_causal": True}),
    "dropout_above_one": ({"dropout": 1.5}, zeros(L, N, E), zeros(S, N, E), zeros(S, N, E), {}),
    "input_dtype": ({}, zeros(L, N, E).double(), zeros(S, N, E).double(), zeros(S, N, E).double(), {}),
}  # fmt: skip


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_errors_are_torchs(name, need_weights):
    constructor, query, key, value, arguments = WRONG[name]
    arguments = {"need_weights": need_weights} | arguments
    theirs, ours = (
        outcome(lambda module=module: module(query, key, value, **arguments)) for module in both(E, 2, **constructor)
    )
    assert theirs is not None
    assert ours == theirs


@pytest.mark.parametrize("name", [name for name in WRONG if not name.startswith("dropout")])
def test_errors_are_the_same_in_evaluation(name):
    constructor, query, key, value, arguments = WRONG[name]
    module = fastattn.MultiheadAttention(E, 2, **constructor)
    training = outcome(lambda: module(query, key, value, **arguments))
    assert training is not None
    module.eval()
    with torch.no_grad():
        assert outcome(lambda: module(query, key, value, **arguments)) == training


@pytest.mark.parametrize(
    ("query", "key", "arguments"),
    [
        (zeros(L, N, E), zeros(S, 3, E), {}),
        (zeros(L, N, E), zeros(S, N, E), {"attn_mask": zeros(L, S).double()}),
        (zeros(L, N, E), zeros(S, N, E), {"attn_mask": zeros(L, S).half()}),
        (zeros(L, N, E), zeros(S, N, E), {"key_padding_mask": zeros(N, S).double()}),
    ],
    ids=["batch", "mask_float64", "mask_float16", "padding_float64"],
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_error_types_are_torchs_where_its_messages_tell_of_its_insides(query, key, arguments, need_weights):
    theirs, ours = (
        outcome(lambda module=module: module(query, key, key, need_weights=need_weights, **arguments))
        for module in both(E, 2)
    )
    assert theirs is not None
    assert ours is not None
    assert ours[0] is theirs[0] is RuntimeError


@pytest.mark.parametrize("position", [0, 1, 2])
def test_non_tensors_are_torchs_errors(position):
    inputs: list[Any] = [zeros(L, E), zeros(L, E), zeros(L, E)]
    inputs[position] = [[0.0]]
    theirs, ours = (outcome(lambda module=module: module(*inputs)) for module in both(E, 2))
    assert theirs is not None
    assert ours is not None
    assert ours[0] is theirs[0]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dropout", [1.5, -0.5])
def test_impossible_dropout_is_an_error_of_torchs_type(dropout, need_weights):
    x = zeros(L, N, E)
    theirs, ours = (
        outcome(lambda module=module: module(x, x, x, need_weights=need_weights))
        for module in both(E, 2, dropout=dropout)
    )
    assert (ours and ours[0]) is (theirs and theirs[0])


def test_mismatched_masks_warn_as_in_torch():
    x = zeros(L, N, E)
    for module in both(E, 2):
        with pytest.warns(UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated"):
            module(x, x, x, key_padding_mask=boolean(N, L), attn_mask=zeros(L, L))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(x, x, x, key_padding_mask=zeros(N, L), attn_mask=zeros(L, L))


# ------------------------------------------------------------------------------------------ what is decided on purpose


@pytest.mark.parametrize("training", [True, False])
def test_causal_without_mask_is_an_error_in_both_modes(training):
    module = fastattn.MultiheadAttention(E, 2, batch_first=True).train(training)
    x = zeros(N, L, E)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        module(x, x, x, is_causal=True)


@pytest.mark.parametrize("shape", [(1, S), (L, 1), (1, L, S), (N, L, S), (N, 1, S), (N, 1, L, S), (1, 2, 1, S)])
@pytest.mark.parametrize("floating", [False, True])
def test_broadcast_masks_are_their_expansion(shape, floating):
    module = fastattn.MultiheadAttention(E, 2, add_zero_attn=True, backend="torch")
    torch.manual_seed(0)
    query, key = torch.randn(L, N, E), torch.randn(S, N, E)
    mask = torch.randn(shape) if floating else torch.rand(shape) > 0.6
    four = mask[:, None] if mask.dim() == 3 else mask
    full = four.expand(N, 2, L, S).reshape(2 * N, L, S)
    output, weights = module(query, key, key, attn_mask=mask)
    expected_output, expected_weights = module(query, key, key, attn_mask=full)
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("case", ["whole_entry", "rows"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_row_without_keys_gives_the_output_bias_and_finite_gradients(backend, training, need_weights, kind, case):
    torch.manual_seed(0)
    module = fastattn.MultiheadAttention(E, 2, batch_first=True, backend=backend).train(training)
    nn.init.normal_(module.out_proj.bias)
    x = torch.randn(N, L, E)
    name, blocked = (
        ("key_padding_mask", boolean(N, L)) if case == "whole_entry" else ("attn_mask", boolean(N * 2, L, L))
    )
    blocked[0] = True
    if case == "rows":
        blocked[1] = True
    mask = torch.zeros(blocked.shape).masked_fill(blocked, -torch.inf) if kind == "float" else blocked
    with torch.set_grad_enabled(training):
        output, weights = module(x, x, x, need_weights=need_weights, **{name: mask})
    torch.testing.assert_close(output[0], module.out_proj.bias.expand(L, E), rtol=0, atol=0)
    assert output.isfinite().all()
    if need_weights:
        assert not weights[0].any()
        torch.testing.assert_close(weights[1].sum(-1), torch.ones(L))
    if training:
        output.sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("inference", [True, False])
def test_what_padding_holds_does_not_matter(backend, inference):
    torch.manual_seed(0)
    module = fastattn.MultiheadAttention(E, 2, batch_first=True, backend=backend).train(not inference)
    x = torch.randn(N, L, E)
    padding = boolean(N, L)
    padding[:, -1] = True
    with torch.set_grad_enabled(not inference):
        clean, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
        x[:, -1] = torch.nan
        dirty, _ = module(x, x, x, key_padding_mask=padding, need_weights=False)
    torch.testing.assert_close(dirty[:, :-1], clean[:, :-1])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "masks", [(), ("key_padding_mask",), ("attn_mask",), ("key_padding_mask", "attn_mask")], ids=str
)
def test_small_inference_is_torchs_to_the_bit(masks, need_weights):
    x = torch.randn(N, L, E)
    every = {"key_padding_mask": torch.tensor([[False] * L, [False] * (L - 1) + [True]]), "attn_mask": boolean(L, L)}
    every["attn_mask"][0, 1] = True
    theirs, ours = both(E, 2, batch_first=True)
    ours.__dict__["backend"] = "torch"
    with torch.no_grad():
        results = [
            module.eval()(x, x, x, need_weights=need_weights, **{name: every[name] for name in masks})
            for module in (theirs, ours)
        ]
    assert torch.equal(results[0][0], results[1][0])
    if need_weights:
        assert torch.equal(results[0][1], results[1][1])
    else:
        assert results[1][1] is None


@pytest.mark.parametrize("batch_first", [True, False])
def test_output_is_contiguous(backend, batch_first):
    module = fastattn.MultiheadAttention(E, 2, batch_first=batch_first, backend=backend)
    x = torch.randn(N, L, E)
    assert module(x, x, x, need_weights=False)[0].is_contiguous()
    assert module(x, x, x)[0].is_contiguous()


def test_module_without_backend_follows_the_default():
    module = fastattn.MultiheadAttention(E, 2)
    x = torch.randn(L, N, E, dtype=torch.float64)
    with fastattn.use_backend("triton"), pytest.raises(NotImplementedError, match="float64"):
        module.double()(x, x, x)
    with fastattn.use_backend("torch"):
        module(x, x, x)
