"""``python -m benchmarks.measure.tiles``: how many tiles of scores the kernels visit under each mask, as JSON.

The device finds them, by the tile map that attention itself uses; without a GPU, Triton's interpreter does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import AttentionCase, Mask
from benchmarks.families.masks import masks

SEQLEN = 1024
_TILE = (128, 64)  # rows and keys, the forward's under masks at head sizes 64 and 128 on Hopper
_MASKS: tuple[Mask, ...] = ("none", "causal", "padding", "documents", "window", "sparse", "boolean")


def count(case: AttentionCase) -> dict[str, Any]:
    """The tiles of one batch entry and head: all of them, and those that are visited whole and in part."""
    from fastattn.ops.attention.call import make_call
    from fastattn_kernels.common.config import Config
    from fastattn_kernels.common.problem import Problem
    from fastattn_kernels.common.tile_map import TileMap

    query = torch.zeros(case.batch, case.heads, case.seqlen, case.head_dim, device=case.device)
    call = make_call(query, query, query, **masks(case, torch.float32))
    names = ("mask", "key_padding_mask", "query_documents", "key_documents", "prefix", "lower", "upper", "shift")
    problem = Problem(query, query, query, 1.0, **{name: getattr(call, name) for name in names})
    lists = TileMap(problem).of_rows(Config(*_TILE, 8, 3))
    whole, in_part = (int(n) for n in lists[..., :2].sum((1, 2)).double().mean(0).round())
    every = lists.shape[2] * (lists.shape[3] - 2)
    return {"mask": case.mask, "tiles": every, "whole": whole, "in_part": in_part}


def counts() -> list[dict[str, Any]]:
    """:func:`count` of every mask, in a process of its own: only there may Triton interpret.

    Raises:
        RuntimeError: the process failed, as it does without triton; the message holds its last words.
    """
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    interpret = "0" if torch.cuda.is_available() else "1"
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "benchmarks.measure.tiles"]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"tiles could not be counted: {error}") from error
    if result.returncode:
        raise RuntimeError(f"tiles could not be counted: {result.stderr.strip()[-300:]}")
    return json.loads(result.stdout)


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [AttentionCase("attention", 2, 1, SEQLEN, 64, mask=mask, device=device) for mask in _MASKS]
    json.dump([count(case) for case in cases], sys.stdout)
