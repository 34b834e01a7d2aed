"""The way of transformer layers in inference on the CPU: when they take it, and that it gives what the modules give."""

from typing import Any

import pytest
import torch
from torch import nn

import fastattn
from fastattn.modules import _layer_inference

E, H, N, L, S = 12, 2, 3, 6, 4
CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * L, [False] * 2 + [True] * 4, [True] * L])
MASKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"src_mask": CAUSAL},
    "promise": {"src_mask": CAUSAL, "is_causal": True},
    "padding": {"src_key_padding_mask": PADDING[:2].repeat(2, 1)[:N]},
    "both": {"src_mask": CAUSAL, "src_key_padding_mask": PADDING[:2].repeat(2, 1)[:N]},
}


def make(kind="encoder", **options: Any) -> Any:
    torch.manual_seed(0)
    made: Any = {"encoder": fastattn.TransformerEncoderLayer, "decoder": fastattn.TransformerDecoderLayer}[kind]
    options = {"batch_first": True, "dtype": torch.float64, **options}
    return made(E, H, 20, **options, backend="torch").eval()


def by_modules(layer, *args, **kwargs):
    """What the layer gives with a hook, that does nothing."""
    handle = layer.linear1.register_forward_hook(lambda *_: None)
    try:
        with torch.no_grad():
            return layer(*args, **kwargs)
    finally:
        handle.remove()


@pytest.fixture
def without_modules(monkeypatch):
    def called(*_, **__):
        raise AssertionError("a module was called")

    for kind in (fastattn.MultiheadAttention, fastattn.AddLayerNorm, nn.Linear):
        monkeypatch.setattr(kind, "forward", called)


# ------------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU("tanh"), nn.SiLU()], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_encoder_layer_gives_what_its_modules_give(monkeypatch, masks, norm_first, activation):
    for options in ({}, {"batch_first": False}, {"bias": False}):
        layer = make(norm_first=norm_first, activation=activation, **options)
        x = torch.randn((N, L, E) if layer.self_attn.batch_first else (L, N, E), dtype=torch.float64)
        expected = by_modules(layer, x, **MASKS[masks])
        before = x.clone()
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(layer, "_encoded", None)  # the modules' way
            torch.testing.assert_close(layer(x, **MASKS[masks]), expected)
        assert torch.equal(x, before)


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layer_gives_what_its_modules_give(monkeypatch, norm_first):
    for options in ({}, {"batch_first": False}):
        layer = make("decoder", norm_first=norm_first, **options)
        x, memory = torch.randn(N, L, E, dtype=torch.float64), torch.randn(N, S, E, dtype=torch.float64)
        if options:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        before = x.clone(), memory.clone()
        for masks in (
            {},
            {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING[:, 2:] & False},
        ):
            expected = by_modules(layer, x, memory, **masks)
            with torch.no_grad(), monkeypatch.context() as patch:
                patch.setattr(layer, "_decoded", None)
                torch.testing.assert_close(layer(x, memory, **masks), expected)
        assert torch.equal(x, before[0])
        assert torch.equal(memory, before[1])


def test_no_module_is_called(without_modules):
    x = torch.randn(N, L, E, dtype=torch.float64)
    with torch.no_grad():
        make()(x, CAUSAL)
        make("decoder")(x, x)


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.fixture
def packs(monkeypatch):
    monkeypatch.setattr(_layer_inference, "_FEWEST_LEFT_OUT", 1)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_left_out(packs, norm_first, causal):
    layer, mask = make(norm_first=norm_first), CAUSAL if causal else None
    x = torch.randn(N, L, E, dtype=torch.float64)
    expected = by_modules(layer, x, mask, PADDING)
    x[PADDING] = torch.nan
    floating = torch.zeros(N, L, dtype=x.dtype).masked_fill(PADDING, -torch.inf)
    float_mask = None if mask is None else torch.zeros(L, L, dtype=x.dtype).masked_fill(mask, -torch.inf)
    with torch.no_grad():
        for arguments in ((x, mask, PADDING), (x, float_mask, floating)):
            output = layer(*arguments)
            torch.testing.assert_close(output[~PADDING], expected[~PADDING])
            assert not output[PADDING].any()


def test_padding_that_is_more_than_padding_is_not_left_out(packs):
    layer, x = make(), torch.randn(N, L, E, dtype=torch.float64)
    bias = torch.zeros(N, L, dtype=x.dtype).masked_fill(PADDING & (torch.arange(N) < 2)[:, None], -1.0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, src_key_padding_mask=bias), by_modules(layer, x, src_key_padding_mask=bias))


@pytest.mark.parametrize(("convert", "error"), [
    (torch.Tensor.half, RuntimeError),
    (torch.Tensor.to_sparse, TypeError),
], ids=["dtype", "layout"])  # fmt: skip
def test_padding_of_another_kind_keeps_its_error_where_it_would_be_left_out(packs, convert, error):
    layer, x = make(), torch.randn(N, L, E, dtype=torch.float64)
    padding = convert(torch.zeros(N, L, dtype=x.dtype).masked_fill(PADDING, -torch.inf))
    with torch.no_grad(), pytest.raises(error, match=r"a floating mask is torch\.float16|has the layout"):
        layer(x, src_key_padding_mask=padding)


def test_promise_of_causality_without_a_mask_stays_an_error_where_padding_is_left_out(packs):
    """The packed rows ignored the promise, and saw keys that were to be hidden from them."""
    x = torch.randn(N, L, E, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        make()(x, src_key_padding_mask=PADDING, is_causal=True)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_stack_leaves_padding_out_as_torchs_does(packs):
    layer = make(dtype=torch.float32)
    theirs = nn.TransformerEncoderLayer(E, H, 20, batch_first=True)
    theirs.load_state_dict(layer.state_dict())
    padding = PADDING[:2]
    x = torch.randn(2, L, E)
    with torch.no_grad():
        outputs = [nn.TransformerEncoder(each, 2).eval()(x, src_key_padding_mask=padding) for each in (layer, theirs)]
    torch.testing.assert_close(*outputs)


# -------------------------------------------------------------------------------------------------- which calls take it


def is_taken(layer, x, masks=(None, None, False)):
    return _layer_inference.encode(layer, x, masks) is not None


def test_layers_that_call_their_modules():
    x = torch.randn(N, L, E, dtype=torch.float64)
    with torch.no_grad():
        assert is_taken(make(), x)
        assert not is_taken(make(), x[0])
        assert not is_taken(make(), x.float())
        assert not is_taken(make().train(), x)
        assert not is_taken(make().bfloat16(), x.bfloat16())
        assert not is_taken(make(activation=lambda t: t.softmax(1)), x)
        for change in (
            lambda layer: layer.dropout1.train(),
            lambda layer: setattr(layer, "dropout2", nn.Identity()),
            lambda layer: setattr(layer, "norm1", nn.LayerNorm(E, dtype=torch.float64)),
            lambda layer: setattr(layer.norm1, "bias", nn.Parameter(torch.zeros(E))),
            lambda layer: setattr(layer.norm1, "bias", nn.Parameter(torch.zeros(1, dtype=torch.float64))),
            lambda layer: setattr(layer.self_attn, "in_proj_bias", nn.Parameter(torch.zeros(1, dtype=torch.float64))),
            lambda layer: layer.norm2.register_forward_pre_hook(lambda *_: None),
            lambda layer: setattr(layer.linear1, "forward", layer.linear1.forward),
            lambda layer: setattr(layer, "self_attn", nn.MultiheadAttention(E, H, dtype=torch.float64)),
            lambda layer: nn.utils.parametrizations.weight_norm(layer.linear2),
        ):
            layer = make()
            change(layer)
            assert not is_taken(layer, x)
        with torch.autocast("cpu"):
            assert not is_taken(make(), x)
    assert not is_taken(make(), x)  # gradients are on


def test_fused_layer_of_torch_takes_it():
    layer, x = nn.TransformerEncoderLayer(E, H, 20, batch_first=True).eval(), torch.randn(N, L, E)
    with torch.no_grad():
        expected = layer(x, CAUSAL)
        fastattn.fuse(layer, backend="torch")
        assert is_taken(layer, x)
        torch.testing.assert_close(layer(x, CAUSAL), expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_row_that_sees_nothing_is_what_the_modules_make_of_it(kind):
    layer, x, mask = make(dtype=kind), torch.randn(N, L, E, dtype=kind), CAUSAL.clone()
    mask[2] = True
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask), by_modules(layer, x, mask))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_output_made_under_no_grad_may_be_changed_in_place_behind_it(norm_first, batch_first):
    """As torch's: where it is no view, autograd counts the change."""
    words: dict[str, Any] = {"dropout": 0.0, "norm_first": norm_first, "batch_first": batch_first, "backend": "torch"}
    encoder, decoder = (
        made(E, H, 20, **words).eval() for made in (fastattn.TransformerEncoderLayer, fastattn.TransformerDecoderLayer)
    )
    attention = fastattn.MultiheadAttention(E, H, batch_first=batch_first, backend="torch").eval()
    for length in (L, 70):  # one of attention by the formula, one of the fused kernel
        x, change = torch.randn(N, length, E), torch.ones(E, requires_grad=True)
        with torch.no_grad():
            outputs = [encoder(x), decoder(x, x)]
            if batch_first:  # with the other order torch's is a view, too
                outputs.append(attention(x, x, x, need_weights=False)[0])
        for output in outputs:
            (gradient,) = torch.autograd.grad(output.add_(change).sum(), change)
            assert gradient.unique().item() == output[..., 0].numel()
