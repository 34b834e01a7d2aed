"""``fuse(model, also=...)``: classes of other packages that the caller vouches for, and what is checked of them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

import fastattn

E = 16


@pytest.fixture(autouse=True)
def on_torch():
    """Which backend computes is not the question here."""
    with fastattn.use_backend("torch"):
        yield


class LayerNormFp32(nn.LayerNorm):
    """As packages of vision models have it: in float32 whatever comes."""

    def forward(self, input):
        weight, bias = (None if t is None else t.float() for t in (self.weight, self.bias))
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class FastNorm(nn.LayerNorm):
    """A switch of its own, which stays on the module."""

    def __init__(self, size):
        super().__init__(size, eps=1e-6)
        self._fast_norm = True

    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of feature maps: no layer norm of the last axis."""

    def forward(self, input):
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RootMeanSquare(nn.Module):
    """As language models have it: torch's formula, and none of its names but ``weight``."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = eps

    def forward(self, hidden):
        return self.weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon))


class OnePlusWeight(RootMeanSquare):
    """Another formula under the same names."""

    def forward(self, hidden):
        return super().forward(hidden) * (1 + self.weight) / self.weight


class Attention(nn.MultiheadAttention):
    """Gives what torch's gives, and counts."""

    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


class SharpAttention(nn.MultiheadAttention):
    """Doubles its scores."""

    def forward(self, query, *args, **kwargs):
        return super().forward(query * 2, *args, **kwargs)


class Layer(nn.TransformerEncoderLayer):
    """Says something on the way."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)


class DoublingLayer(nn.TransformerEncoderLayer):
    """What a layer of this class computes is in a method that forward calls."""

    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


def layer(kind):
    torch.manual_seed(0)
    return kind(E, 2, 32, batch_first=True)


CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "LayerNormFp32": (lambda: LayerNormFp32(E), nn.LayerNorm, fastattn.AddLayerNorm),
    "FastNorm": (lambda: FastNorm(E), nn.LayerNorm, fastattn.AddLayerNorm),
    "no affine": (lambda: LayerNormFp32(E, elementwise_affine=False), nn.LayerNorm, fastattn.AddLayerNorm),
    "RootMeanSquare": (lambda: RootMeanSquare(E), nn.RMSNorm, fastattn.AddRMSNorm),
    "Attention": (lambda: Attention(E, 2, dropout=0.1), nn.MultiheadAttention, fastattn.MultiheadAttention),
    "Layer": (lambda: layer(Layer), nn.TransformerEncoderLayer, fastattn.TransformerEncoderLayer),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_class_that_the_caller_vouches_for_is_replaced_and_restored(name, dtype):
    """The class changes and nothing else: not the parameters, the mode, random numbers, nor attributes of theirs."""
    make, kind, ours = CLASSES[name]
    module = make().to(dtype)
    theirs, model = type(module), nn.Sequential(module).train()
    x = torch.randn(2, 3, E).to(dtype)
    arguments = (x, x, x) if kind is nn.MultiheadAttention else (x,)
    attributes, parameters = copy.deepcopy(set(vars(module))), list(module.parameters())
    random_state = torch.get_rng_state()
    report = fastattn.fuse(model, also={theirs: kind})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert report.replaced["0"] is type(module) is ours
    assert module.training and all(part.training for part in module.modules())
    assert all(have is had for have, had in zip(module.parameters(), parameters, strict=True))
    output = module.eval()(*arguments)
    report.undo()
    assert type(module) is theirs
    assert set(vars(module)) == attributes | {"calls"} if theirs is Attention else set(vars(module)) == attributes
    # ours keeps scores in float32, so that in 16 bits the two are a rounding of the largest element apart
    expected = module(*arguments)
    atol = torch.finfo(dtype).eps * max(t.abs().max().item() for t in tree_leaves(expected))
    torch.testing.assert_close(output, expected, rtol=torch.finfo(dtype).eps * 10, atol=atol)


def test_hooks_are_not_called_by_the_check():
    seen, norm = [], LayerNormFp32(E)
    norm.register_forward_hook(lambda *_: seen.append("hook"))
    fastattn.fuse(norm, also={LayerNormFp32: nn.LayerNorm})
    assert seen == []
    norm(torch.randn(2, E))
    assert seen == ["hook"]


def test_a_norm_that_is_no_subclass_trains_as_before():
    """Names are mapped, gradients reach the same parameters."""
    norm, x = RootMeanSquare(E), torch.randn(3, E)
    results = []
    for fused in (False, True):
        if fused:
            fastattn.fuse(norm, also={RootMeanSquare: nn.RMSNorm})
        norm.zero_grad()
        output = norm(x)
        output.sin().sum().backward()
        assert norm.weight.grad is not None
        results.append([output.detach(), norm.weight.grad.clone()])
    torch.testing.assert_close(results[1], results[0])


def test_a_layer_with_a_vouched_norm_becomes_ours():
    """The layer needs norms that are ours, and those of this class are now."""
    model = layer(nn.TransformerEncoderLayer)
    model.norm1, model.norm2 = LayerNormFp32(E), LayerNormFp32(E)
    x = torch.randn(2, 5, E)
    expected = model.eval()(x)
    assert "its norm1 stays a" in fastattn.fuse(copy.deepcopy(model)).left_alone[""]
    assert fastattn.fuse(model, also={LayerNormFp32: nn.LayerNorm}).left_alone == {}
    torch.testing.assert_close(model(x), expected)


def test_the_report_says_how_to_say_it():
    """Somebody who reads why a norm stayed should not have to look for the way to have it replaced."""
    report = fastattn.fuse(nn.Sequential(LayerNormFp32(E)))
    reason = report.left_alone["0"]
    assert "overrides forward" in reason and "fuse(model, also={LayerNormFp32: nn.LayerNorm})" in reason
    assert reason in str(report)


def test_only_the_class_itself_is_meant():
    """What a subclass of it adds is not known either."""

    class Louder(RootMeanSquare):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model = nn.ModuleList([RootMeanSquare(E), Louder(E)])
    report = fastattn.fuse(model, also={RootMeanSquare: nn.RMSNorm})
    assert report.replaced.keys() == {"0"}
    assert "subclass of one in also" in report.left_alone["1"]


WRONG_CLAIMS: dict[str, tuple[Any, Any]] = {
    "permutes": (lambda: LayerNorm2d(E), nn.LayerNorm),
    "1 + weight": (lambda: OnePlusWeight(E), nn.RMSNorm),
    "mean": (lambda: FastNorm(E), nn.RMSNorm),
    "scores": (lambda: SharpAttention(E, 2), nn.MultiheadAttention),
    "method": (lambda: layer(DoublingLayer), nn.TransformerEncoderLayer),
}


@pytest.mark.parametrize("name", WRONG_CLAIMS)
def test_a_class_that_computes_something_else_is_refused(name):
    """A wrong claim would be a silently wrong model: a few numbers show it, and the model stays as it was."""
    make, kind = WRONG_CLAIMS[name]
    model = nn.ModuleList([nn.LayerNorm(E), make()])
    theirs, before = type(model[1]), set(vars(model[1]))
    with pytest.raises(ValueError, match=rf"also: 1, a .*{theirs.__name__}, is no nn\.{kind.__name__}"):
        fastattn.fuse(model, also={theirs: kind})
    assert [type(module) for module in model] == [nn.LayerNorm, theirs]
    assert set(vars(model[1])) == before and model[1].training


def test_another_epsilon_is_seen():
    """Rows around one do not show an epsilon; some of the numbers of the check are small."""
    norm = RootMeanSquare(E, eps=1e-3)
    vars(norm)["eps"] = 1e-6  # says one thing, computes another
    with pytest.raises(ValueError, match="away"):
        fastattn.fuse(norm, also={RootMeanSquare: nn.RMSNorm})


def test_a_module_on_meta_is_checked_by_its_names():
    norm = RootMeanSquare(E).to("meta")
    assert fastattn.fuse(norm, also={RootMeanSquare: nn.RMSNorm}).replaced == {"": fastattn.AddRMSNorm}
    assert norm.normalized_shape == (E,) and norm.eps == 1e-6


class Nameless(nn.Module):
    def forward(self, x):
        return x


class Occupied(nn.LayerNorm):
    def __init__(self, size):
        super().__init__(size)
        self.backend = "theirs"


WRONG: dict[str, tuple[Any, Any, str]] = {
    "no dict": (nn.LayerNorm(E), [LayerNormFp32], "also: expected a dict of classes, got list"),
    "no class": (nn.LayerNorm(E), {"norm": nn.LayerNorm}, "also: 'norm': expected a subclass of nn.Module"),
    "no module": (nn.LayerNorm(E), {int: nn.LayerNorm}, "also: <class 'int'>: expected a subclass of nn.Module"),
    "torch's": (nn.LayerNorm(E), {nn.LayerNorm: nn.RMSNorm}, "LayerNorm is replaced anyway"),
    "other value": (nn.LayerNorm(E), {LayerNormFp32: nn.Linear}, "LayerNormFp32: expected it to map to one of nn"),
    "no subclass": (
        nn.LayerNorm(E),
        {RootMeanSquare: nn.MultiheadAttention},
        "RootMeanSquare is no subclass of nn.Mul",
    ),
    "no attributes": (Nameless(), {Nameless: nn.RMSNorm}, "Nameless, has no attribute normalized_shape"),
    "no bias": (RootMeanSquare(E), {RootMeanSquare: nn.LayerNorm}, "RootMeanSquare, has no attribute bias"),
    "occupied": (Occupied(E), {Occupied: nn.LayerNorm}, "Occupied, has an attribute backend, which means something"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_item_is_named(name):
    model, also, words = WRONG[name]
    before = type(model)
    with pytest.raises(TypeError) as raised:
        fastattn.fuse(model, also=also)
    assert words in str(raised.value)
    assert type(model) is before


def test_norms_of_a_language_model():
    """Those of transformers inherit from nn.Module alone."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=50)).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        with fastattn.fuse(model, also={LlamaRMSNorm: nn.RMSNorm}) as report:
            assert len(report.replaced) == 5
            torch.testing.assert_close(model(tokens).logits, expected)
        assert torch.equal(model(tokens).logits, expected)
