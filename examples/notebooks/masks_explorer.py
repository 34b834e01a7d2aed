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
# # Who may see whom
#
# `fastattn.attention` has an argument for most masks, and all of them combine. With keys and queries of
# zeros all scores are equal, so that the weights show the mask alone: a query spreads its weight evenly over the keys
# that it may see. Hover over a map: it names the query, the key and the weight; white is exactly nothing.

# %%
from typing import Any

import plotly.graph_objects as go
import torch

import fastattn

LENGTH, HEADS = 24, 4


# %%
def weights(**words: Any) -> torch.Tensor:
    """``[HEADS, LENGTH, LENGTH]``: the weights of a call with these arguments, of equal scores."""
    zeros = torch.zeros(1, HEADS, LENGTH, 8)
    found = fastattn.attention(zeros, zeros, zeros, need_weights=True, average_attn_weights=False, **words)
    return found[1][0]


def explorer(maps: dict[str, torch.Tensor], title: str) -> go.Figure:
    """One map ``[L, S]`` at a time, chosen by a slider. Each row is as bright as its share of its largest weight."""
    shown = {name: (of_one / of_one.amax(-1, keepdim=True).clamp_min(1e-12)).tolist() for name, of_one in maps.items()}
    hover = "query %{y}<br>key %{x}<br>weight %{customdata:.3f}<extra></extra>"
    first = next(iter(maps))
    figure = go.Figure(
        go.Heatmap(
            z=shown[first],
            customdata=maps[first].tolist(),
            zmin=0,
            zmax=1,
            colorscale=[[0, "white"], [1, "#0072B2"]],
            showscale=False,
            xgap=1,
            ygap=1,
            hovertemplate=hover,
        )
    )
    steps = [
        {"method": "restyle", "label": name, "args": [{"z": [shown[name]], "customdata": [maps[name].tolist()]}]}
        for name in maps
    ]
    figure.update_layout(
        title=title,
        width=640,
        height=680,
        plot_bgcolor="#dddddd",
        yaxis={"autorange": "reversed", "title": "query"},
        xaxis={"title": "key", "side": "top"},
        sliders=[{"steps": steps, "currentvalue": {"prefix": "shown: "}}],
    )
    return figure


# %% [markdown]
# ## Masks by arguments
#
# A window lets a query see a number of keys to either side; a prefix is seen by everybody; documents keep packed texts
# apart; padding hides keys of a sequence. The last one is a function, as in FlexAttention.

# %%
documents = torch.tensor([[0] * 7 + [1] * 12 + [2] * 5])
padding = torch.arange(LENGTH)[None] >= 18
masks = {
    "nothing": {},
    "is_causal": {"is_causal": True},
    "window=(4, 4)": {"window": (4, 4)},
    "window=(6, 0)": {"window": (6, 0)},
    "window=(6, 0), prefix=3": {"window": (6, 0), "prefix": 3},
    "is_causal, prefix=6": {"is_causal": True, "prefix": 6},
    "document_ids": {"document_ids": documents},
    "document_ids, is_causal": {"document_ids": documents, "is_causal": True},
    "document_ids, window=(3, 0)": {"document_ids": documents, "window": (3, 0)},
    "key_padding_mask, is_causal": {"key_padding_mask": padding, "is_causal": True},
    "mask_mod, every third": {"mask_mod": lambda b, h, i, j: (j <= i) & ((i - j) % 3 == 0)},
}
maps = {name: weights(**words)[0] for name, words in masks.items()}
explorer(maps, "Masks")

# %% [markdown]
# What a query sees agrees with what one would write by hand:

# %%
i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
by_hand = {
    "is_causal": j <= i,
    "window=(6, 0), prefix=3": ((j >= i - 6) & (j <= i)) | (j < 3),
    "document_ids, is_causal": (documents[0][:, None] == documents[0]) & (j <= i),
    "key_padding_mask, is_causal": (j <= i) & (j < 18),
}
for name, visible in by_hand.items():
    assert torch.equal(maps[name] > 0, visible.expand(LENGTH, LENGTH)), name
    print(f"{name}: {int(visible.sum())} of {LENGTH * LENGTH} pairs are visible")

# %% [markdown]
# ## Distances
#
# ALiBi subtracts from each score a slope times the distance, with a slope for each head: the steeper, the nearer a head
# looks. The table of a learned bias, or any function of a score and its place, does the same by `attn_mask` or
# `score_mod`, with gradients.

# %%
slopes = 2.0 ** -torch.arange(0.0, HEADS)
of_heads = weights(alibi_slopes=slopes, is_causal=True)
same = weights(score_mod=lambda score, b, h, i, j: score - slopes[h] * (i - j).abs(), is_causal=True)
torch.testing.assert_close(of_heads, same)
explorer({f"slope {slope:g}": one for slope, one in zip(slopes.tolist(), of_heads)}, "ALiBi, causal")

# %% [markdown]
# ## Sinks
#
# A sink is one more score in the softmax of each row, without a value: what it takes, the keys do not get. So a head
# can look at nothing, and rows sum to less than 1.

# %%
sums = {sink: weights(sinks=torch.full((HEADS,), sink), is_causal=True)[0].sum(-1) for sink in (-4.0, 0.0, 2.0, 4.0)}
figure = go.Figure([go.Scatter(y=total.tolist(), name=f"sink {sink:g}") for sink, total in sums.items()])
figure.update_layout(
    width=640, height=400, xaxis_title="query", yaxis_title="sum of its weights", yaxis_range=[0, 1.05]
)
figure
