"""Both of torch's ONNX exporters take models made ours, and what they write is right at other sizes.

The older one traces, the newer one exports: neither knows this package's operators, so none may be in the graph.
"""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import fastattn
from fastattn.testing import random_tensor

onnx: Any = pytest.importorskip("onnx", reason="onnx is not installed")
evaluator: Any = pytest.importorskip("onnx.reference", reason="onnx is not installed").ReferenceEvaluator

E, HEADS = 16, 2


class Net(nn.Module):
    """A pre-norm block that gives its weights, as attention does by default."""

    def __init__(self, masks: str, need_weights: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), nn.MultiheadAttention(E, HEADS, batch_first=True)
        self.masks, self.need_weights = masks, need_weights

    def forward(self, x, padding):
        masks = {}
        if "padding" in self.masks:
            masks["key_padding_mask"] = padding
        if "float" in self.masks:
            masks["key_padding_mask"] = torch.zeros_like(padding, dtype=x.dtype).masked_fill(padding, -torch.inf)
        if "causal" in self.masks:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            masks |= {"attn_mask": future, "is_causal": True}
        y = self.norm(x)
        output, weights = self.attention(y, y, y, need_weights=self.need_weights, **masks)
        # padding is an input of every graph
        return (x + output * ~padding[..., None],) if weights is None else (x + output * ~padding[..., None], weights)


def inputs(batch, length):
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, -1] = True
    return random_tensor(batch, length, E, seed=batch), padding


def written_by_the_older(model, arguments):
    buffer: Any = io.BytesIO()
    names = ["x", "padding"]
    axes = {name: {0: "batch", 1: "length"} for name in names}
    torch.onnx.export(model, arguments, buffer, dynamo=False, input_names=names, dynamic_axes=axes, opset_version=17)
    return onnx.load_from_string(buffer.getvalue())


def written_by_the_newer(model, arguments):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=512)
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    program: Any = torch.onnx.export(
        model, arguments, dynamo=True, input_names=["x", "padding"], dynamic_shapes=shapes, verbose=False
    )
    return program.model_proto


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("exporter", [written_by_the_older, written_by_the_newer], ids=["older", "newer"])
@pytest.mark.parametrize(
    ("masks", "need_weights"),
    [("none", True), ("padding", True), ("float", True), ("padding causal", True), ("causal", False), ("float", False)],
)
def test_onnx_gives_what_the_model_gives_at_other_sizes(masks, need_weights, exporter):
    torch.manual_seed(0)
    model = Net(masks, need_weights).eval()
    expected = copy.deepcopy(model)
    fastattn.fuse(model)
    with torch.no_grad():
        runtime = evaluator(exporter(model, inputs(3, 6)))
        for sizes in ((3, 6), (2, 9)):
            given = inputs(*sizes)
            found = runtime.run(None, {"x": given[0].numpy(), "padding": given[1].numpy()})
            for ours, wanted in zip(found, expected(*given), strict=True):
                torch.testing.assert_close(torch.from_numpy(ours), wanted, rtol=1e-4, atol=1e-5)
