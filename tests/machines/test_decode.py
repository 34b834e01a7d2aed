"""The kernel over a cache with tiles so small that its pipelined loop has many turns, contiguous and in pages.

The tiles that it has on a GPU hold most of the small caches of ``tests/kernels/test_attention_decode.py`` in one.
"""

from typing import Any

import pytest
import torch

from tests import machines
from tests.kernels import test_attention_decode as checks

pytestmark = [
    pytest.mark.machine,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not machines.EXECUTING, reason=f"the interpreter's tiles are small: this is {machines.NAME}"),
]
CASES: dict[str, dict[str, Any]] = {
    "whole": {"dtype": torch.bfloat16},
    "small pages": {"dtype": torch.bfloat16, "page_size": 16, "rotary": "interleaved", "length": 3},
    "large pages, in shares": {"dtype": torch.float16, "page_size": 256, "splits": 2},
    "bias and window": {"page_size": 48, "length": 3, "lower": -30, "bias": "hs"},
}


@pytest.mark.parametrize("name", CASES)
def test_many_turns_of_the_pipeline_match_the_reference(name, device, seed, monkeypatch):
    from fastattn_kernels.common.config import Config

    monkeypatch.setattr(checks.forward, "decode_config", lambda *_: Config(16, 16, 4, 3))
    checks.check(checks.Case(**CASES[name]), seed, device)
