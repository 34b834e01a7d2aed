"""``replace_attention``: the modules are ours, they are called, the results stay, and everything can be undone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastattn

E, H, N, L = 16, 4, 2, 6


@pytest.fixture(autouse=True)
def on_torch():
    """Which backend computes is not the question here."""
    with fastattn.use_backend("torch"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The modules whose attention was computed by our forward, and not handed on to torch's, in order."""
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
        report = fastattn.replace_attention(model)
        torch.testing.assert_close(model(x), expected)
    assert calls == [model[0].self_attn]
    assert report.replaced == ("0.self_attn",)
    assert report.fused_paths_off == ("0",)


def test_encoder_layer_itself_as_the_model_calls_ours(calls):
    model, x = layer().eval(), random_input()
    fastattn.replace_attention(model)
    with torch.no_grad():
        model(x, src_key_padding_mask=PADDING)
    assert calls == [model.self_attn]


def test_encoder_with_padding_calls_ours_in_inference(calls):
    model, x = nn.TransformerEncoder(layer(), 3).eval(), random_input()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        report = fastattn.replace_attention(model)
        output = model(x, src_key_padding_mask=PADDING)
    assert calls == [each.self_attn for each in model.layers]
    assert set(report.fused_paths_off) == {"TransformerEncoder", "layers.0", "layers.1", "layers.2"}
    torch.testing.assert_close(output[~PADDING], expected[~PADDING])


def test_whole_transformer_trains_as_before(calls):
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=True)
    source, target = random_input(), random_input() + 1
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    results = []
    for replaced in (False, True):
        if replaced:
            assert len(fastattn.replace_attention(model).replaced) == 6
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
    fastattn.replace_attention(model)
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
    fastattn.replace_attention(model)
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
    before = copy.deepcopy([{k: v for k, v in m.__dict__.items() if k[0] != "_"} for m in model.modules()])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        report = fastattn.replace_attention(model, backend="torch")
        assert vars(model.get_submodule("layers.1.self_attn"))["backend"] == "torch"
        report.undo()
        report.undo()
        assert torch.equal(model(x, src_key_padding_mask=PADDING), expected)
    assert all(type(each.self_attn) is nn.MultiheadAttention for each in model.layers)
    assert repr([{k: v for k, v in m.__dict__.items() if k[0] != "_"} for m in model.modules()]) == repr(before)


def test_context_manager_undoes_also_after_an_error():
    model = layer()

    def fail():
        with fastattn.replace_attention(model) as report:
            assert report.replaced == ("self_attn",)
            assert type(model.self_attn) is fastattn.MultiheadAttention
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert type(model.self_attn) is nn.MultiheadAttention
    assert model.activation_relu_or_gelu == 1


def test_undo_refuses_what_changed_since():
    model = layer()
    report = fastattn.replace_attention(model)
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
        }
    )
    report = fastattn.replace_attention(model)
    assert report.replaced == ("plain",)
    assert report.left_alone.keys() == {"subclass", "overriding", "ours", "quantizable"}
    assert "Subclass is a subclass of nn.MultiheadAttention" in report.left_alone["subclass"]
    assert "Overriding overrides forward" in report.left_alone["overriding"]
    assert report.left_alone["ours"] == "it is a fastattn.MultiheadAttention already"
    assert "is quantizable" in report.left_alone["quantizable"]
    assert type(model["subclass"]) is Subclass
    text = str(report)
    assert "plain: replaced" in text
    assert "overriding: left alone: its class" in text


def test_module_put_there_by_hand_is_called_too(calls):
    model, x = layer().eval(), random_input()
    model.self_attn = fastattn.MultiheadAttention(E, H, batch_first=True).eval()
    with torch.no_grad():
        model(x)
        assert calls == []  # torch's fused path, silently
        assert fastattn.replace_attention(model).fused_paths_off == ("TransformerEncoderLayer",)
        model(x)
    assert calls == [model.self_attn]


def test_shared_module_is_replaced_once():
    shared = nn.MultiheadAttention(E, H)
    model = nn.ModuleList([shared, shared])
    assert fastattn.replace_attention(model).replaced == ("0",)
    assert model[0] is model[1]
    assert type(model[1]) is fastattn.MultiheadAttention


def test_replaced_model_can_be_copied_pickled_and_stacked():
    model, x = layer().eval(), random_input()
    fastattn.replace_attention(model)
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin.self_attn) is fastattn.MultiheadAttention
            assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, fastattn.MultiheadAttention])
def test_attention_module_itself_is_refused_with_advice(kind):
    with pytest.raises(TypeError, match=r"itself a MultiheadAttention.*make a fastattn.MultiheadAttention"):
        fastattn.replace_attention(kind(E, H))


def test_wrong_arguments_are_refused():
    wrong: Any = {"model": {}, "backend": "gpu"}
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got dict"):
        fastattn.replace_attention(wrong["model"])
    model = layer()
    with pytest.raises(ValueError, match="backend='gpu': expected one of"):
        fastattn.replace_attention(model, backend=wrong["backend"])
    assert type(model.self_attn) is nn.MultiheadAttention


def test_model_without_attention_says_so():
    assert str(fastattn.replace_attention(nn.Linear(2, 2))) == "no nn.MultiheadAttention in this model"
