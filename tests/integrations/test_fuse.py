"""``fuse``: the modules are ours, they are called, the results stay, and everything can be undone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastattn
from fastattn.modules import _layer_inference

E, H, N, L = 16, 4, 2, 6


@pytest.fixture(autouse=True)
def on_torch():
    """Which backend computes is not the question here."""
    with fastattn.use_backend("torch"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The modules whose attention was computed by our forward, and not handed on to torch's, in order. Layers call them
    in inference as well, where they would do without."""
    monkeypatch.setattr(_layer_inference, "_is_for_us", lambda *_: False)
    seen, ours, theirs = [], fastattn.MultiheadAttention.forward, nn.MultiheadAttention.forward

    def recording(self, *args, **kwargs):
        seen.append(self)
        return ours(self, *args, **kwargs)

    def only_for_torchs_own(self, *args, **kwargs):
        assert type(self) is nn.MultiheadAttention, "forward went to torch's implementation"
        return theirs(self, *args, **kwargs)

    monkeypatch.setattr(fastattn.MultiheadAttention, "forward", recording)
    monkeypatch.setattr(nn.MultiheadAttention, "forward", only_for_torchs_own)
    return seen


class Subclass(nn.MultiheadAttention):
    pass


class Overriding(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class SubclassedNorm(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input)


class SubclassedLayer(nn.TransformerEncoderLayer):
    pass


def layer(**arguments):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(E, H, 32, batch_first=True, **arguments)


def random_input():
    torch.manual_seed(1)
    return torch.randn(N, L, E)


PADDING = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_in_inference_calls_ours(calls, norm_first):
    model, x = nn.Sequential(layer(norm_first=norm_first)).eval(), random_input()
    with torch.no_grad():
        expected = model(x)
        report = fastattn.fuse(model)
        torch.testing.assert_close(model(x), expected)
    assert calls == [model[0].self_attn]
    assert report.replaced == {
        "0": fastattn.TransformerEncoderLayer,
        "0.self_attn": fastattn.MultiheadAttention,
        "0.norm1": fastattn.AddLayerNorm,
        "0.norm2": fastattn.AddLayerNorm,
    }
    assert all(type(model.get_submodule(name)) is kind for name, kind in report.replaced.items())
    assert report.fused_paths_off == ("0",)


def test_encoder_layer_itself_as_the_model_calls_ours(calls):
    model, x = layer().eval(), random_input()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        assert fastattn.fuse(model).replaced[""] is type(model) is fastattn.TransformerEncoderLayer
        torch.testing.assert_close(model(x, src_key_padding_mask=PADDING), expected)
    assert calls == [model.self_attn]


def test_encoder_with_padding_calls_ours_in_inference(calls):
    model, x = nn.TransformerEncoder(layer(), 3).eval(), random_input()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        report = fastattn.fuse(model)
        output = model(x, src_key_padding_mask=PADDING)
    assert calls == [each.self_attn for each in model.layers]
    assert set(report.fused_paths_off) == {"", "layers.0", "layers.1", "layers.2"}
    torch.testing.assert_close(output[~PADDING], expected[~PADDING])


def test_whole_transformer_trains_as_before(calls):
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=True)
    source, target = random_input(), random_input() + 1
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    results = []
    for replaced in (False, True):
        if replaced:
            # Four layers, six attention modules, ten norms in the layers and one behind each stack.
            assert len(fastattn.fuse(model).replaced) == 4 + 6 + 10 + 2
        model.zero_grad()
        output = model(source, target, tgt_mask=causal, tgt_is_causal=True)
        output.square().sum().backward()
        results.append((output, [p.grad for p in model.parameters()]))
    assert len(calls) == 6
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_dropout_under_one_seed_is_torchs():
    model, x = layer(dropout=0.0), random_input()
    model.self_attn.dropout = 0.3
    torch.manual_seed(2)
    expected = model(x)
    fastattn.fuse(model)
    torch.manual_seed(2)
    torch.testing.assert_close(model(x), expected)


def test_modules_parameters_hooks_and_modes_stay():
    model = nn.Transformer(E, H, 1, 1, 32, batch_first=True)
    attention = model.get_submodule("encoder.layers.0.self_attn")
    attention.get_parameter("in_proj_weight").requires_grad_(False)
    attention.eval()
    seen = []
    attention.register_forward_hook(lambda *_: seen.append("hook"))
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    fastattn.fuse(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert not attention.training
    assert not attention.get_parameter("in_proj_weight").requires_grad
    model(random_input(), random_input())
    assert seen == ["hook"]


def test_undo_restores_everything():
    model, x = nn.TransformerEncoder(layer(), 2).eval(), random_input()
    kinds = [type(module) for module in model.modules()]
    before = copy.deepcopy([{k: v for k, v in m.__dict__.items() if k[0] != "_"} for m in model.modules()])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        report = fastattn.fuse(model, backend="torch")
        for name in ("self_attn", "norm1", "norm2"):
            assert vars(model.get_submodule(f"layers.1.{name}"))["backend"] == "torch"
        report.undo()
        report.undo()
        assert torch.equal(model(x, src_key_padding_mask=PADDING), expected)
    assert [type(module) for module in model.modules()] == kinds
    assert repr([{k: v for k, v in m.__dict__.items() if k[0] != "_"} for m in model.modules()]) == repr(before)


def test_context_manager_undoes_also_after_an_error():
    model = layer()

    def fail():
        with fastattn.fuse(model) as report:
            assert report.replaced.keys() == {"", "self_attn", "norm1", "norm2"}
            assert type(model) is fastattn.TransformerEncoderLayer
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert type(model) is nn.TransformerEncoderLayer
    assert type(model.self_attn) is nn.MultiheadAttention
    assert type(model.norm1) is nn.LayerNorm
    assert model.activation_relu_or_gelu == 1


def test_undo_refuses_what_changed_since():
    model = layer()
    report = fastattn.fuse(model)
    nn.utils.parametrize.register_parametrization(model.self_attn, "in_proj_weight", nn.Identity())
    with pytest.raises(RuntimeError, match="self_attn is now a ParametrizedMultiheadAttention"):
        report.undo()
    assert model.activation_relu_or_gelu == 0
    nn.utils.parametrize.remove_parametrizations(model.self_attn, "in_proj_weight")
    report.undo()
    assert type(model.self_attn) is nn.MultiheadAttention


def test_what_is_left_alone_is_reported_with_the_reason():
    model = nn.ModuleDict(
        {
            "plain": nn.MultiheadAttention(E, H),
            "subclass": Subclass(E, H),
            "overriding": Overriding(E, H),
            "ours": fastattn.MultiheadAttention(E, H),
            "quantizable": torch.ao.nn.quantizable.MultiheadAttention(E, H),
            "norm": SubclassedNorm(E),
            "layer": SubclassedLayer(E, H, 32),
        }
    )
    report = fastattn.fuse(model)
    assert report.replaced.keys() == {"plain", "layer.self_attn", "layer.norm1", "layer.norm2"}
    assert report.left_alone.keys() == {"subclass", "overriding", "ours", "quantizable", "norm", "layer"}
    assert "Subclass is a subclass of nn.MultiheadAttention" in report.left_alone["subclass"]
    assert "Overriding overrides forward" in report.left_alone["overriding"]
    assert report.left_alone["ours"] == "it is a fastattn.MultiheadAttention already"
    assert "is quantizable" in report.left_alone["quantizable"]
    assert "SubclassedNorm overrides forward" in report.left_alone["norm"]
    assert "SubclassedLayer is a subclass of nn.TransformerEncoderLayer" in report.left_alone["layer"]
    assert report.fused_paths_off == ("layer",)
    assert type(model["subclass"]) is Subclass
    text = str(report)
    assert "plain: now a fastattn.MultiheadAttention" in text
    assert "overriding: left alone: its class" in text


def test_module_put_there_by_hand_is_called_too(calls):
    model, x = layer().eval(), random_input()
    model.self_attn = fastattn.MultiheadAttention(E, H, batch_first=True).eval()
    with torch.no_grad():
        model(x)
        assert calls == []  # torch's fused path, silently
        report = fastattn.fuse(model)
        assert report.left_alone == {"self_attn": "it is a fastattn.MultiheadAttention already"}
        assert report.fused_paths_off == ("",)
        model(x)
    assert calls == [model.self_attn]


def test_shared_module_is_replaced_once():
    shared = nn.MultiheadAttention(E, H)
    model = nn.ModuleList([shared, shared])
    assert fastattn.fuse(model).replaced.keys() == {"0"}
    assert model[0] is model[1]
    assert type(model[1]) is fastattn.MultiheadAttention


def test_replaced_model_can_be_copied_pickled_and_stacked():
    model, x = layer().eval(), random_input()
    fastattn.fuse(model)
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
            assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (nn.MultiheadAttention(E, H), fastattn.MultiheadAttention),
        (nn.LayerNorm(E), fastattn.AddLayerNorm),
        (nn.RMSNorm(E, eps=1e-5), fastattn.AddRMSNorm),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_part_itself_as_the_model_is_replaced_and_restored(model, kind):
    before, x = type(model), random_input()
    arguments = (x, x, x) if before is nn.MultiheadAttention else (x,)
    expected = model(*arguments)
    with fastattn.fuse(model) as report:
        assert report.replaced == {"": kind}
        assert str(report) == f"the model: now a fastattn.{kind.__name__}"
        torch.testing.assert_close(model(*arguments), expected)
    assert type(model) is before
    assert fastattn.fuse(kind(E, H) if before is nn.MultiheadAttention else kind(E)).left_alone.keys() == {""}


NORMS = {
    "identity": (nn.Identity(), None),
    "subclass": (SubclassedNorm(E), None),
    "rms": (nn.RMSNorm(E), fastattn.AddRMSNorm),
    "ours": (fastattn.AddRMSNorm(E), fastattn.AddRMSNorm),
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_layer_with_another_norm_is_replaced_only_where_that_becomes_ours(name, norm_first):
    model, x = layer(norm_first=norm_first, dropout=0.0), random_input()
    norm, kind = copy.deepcopy(NORMS[name])
    model.register_module("norm1", norm)
    expected = model(x)
    report = fastattn.fuse(model)
    assert type(model.self_attn) is fastattn.MultiheadAttention
    assert type(model.norm2) is fastattn.AddLayerNorm
    if kind is None:
        assert type(model) is nn.TransformerEncoderLayer
        assert report.left_alone[""].startswith("its norm1 stays a ")
        assert type(model.norm1).__name__ in report.left_alone[""]
    else:
        assert type(model) is fastattn.TransformerEncoderLayer
        assert type(model.norm1) is kind
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)
    report.undo()
    torch.testing.assert_close(model.train()(x), expected)


def test_layer_with_another_attention_is_left_alone_but_not_its_norms():
    model = nn.TransformerDecoderLayer(E, H, 32)
    model.multihead_attn = Overriding(E, H)
    report = fastattn.fuse(model)
    assert "its multihead_attn stays a " in report.left_alone[""]
    assert "overrides forward" in report.left_alone["multihead_attn"]
    assert report.replaced.keys() == {"self_attn", "norm1", "norm2", "norm3"}


def test_methods_that_were_put_on_a_module_leave_it_alone():
    """A new class would not change what they do, and the report would be wrong."""
    model = nn.Transformer(E, H, 1, 1, 32)
    layer, attention = (model.get_submodule(name) for name in ("encoder.layers.0", "decoder.layers.0.multihead_attn"))
    vars(layer)["_ff_block"] = lambda x: x
    vars(attention)["forward"] = attention.forward
    report = fastattn.fuse(model)
    assert report.left_alone == {
        "encoder.layers.0": "its _ff_block was replaced",
        "decoder.layers.0": "its multihead_attn stays a torch.nn.modules.activation.MultiheadAttention",
        "decoder.layers.0.multihead_attn": "its forward was replaced",
    }


def test_nested_tensors_still_pass():
    model = nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(E)).eval()
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad():
        expected = model(nested)
        fastattn.fuse(model)
        for got, want in zip(model(nested).unbind(), expected.unbind()):
            torch.testing.assert_close(got, want)


def test_wrong_arguments_are_refused():
    wrong: Any = {"model": {}, "backend": "gpu"}
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        fastattn.fuse(wrong["model"])
    model = layer()
    with pytest.raises(ValueError, match="backend='gpu': expected one of"):
        fastattn.fuse(model, backend=wrong["backend"])
    assert type(model.self_attn) is nn.MultiheadAttention


def test_model_without_attention_says_so():
    assert str(fastattn.fuse(nn.Linear(2, 2))) == "no attention, norm or transformer layer of torch.nn in this model"
