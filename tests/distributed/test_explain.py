"""What ``fastattn.distributed.explain`` says of a call, and that it is what ``"auto"`` does; on groups that are not
there, of one process that takes itself for the first of many ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastattn import distributed
from fastattn.distributed import call
from fastattn.distributed.layout import places_in

DOCUMENTS = {"document_ids": torch.zeros(1, 256, dtype=torch.int64, device="meta")}


@pytest.fixture
def ranks(request):
    """A group of as many ranks, or a mesh of two dimensions, that only seems to be there."""
    shape = request.param if isinstance(request.param, tuple) else (request.param,)
    world = torch.Size(shape).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    yield dist.group.WORLD if len(shape) == 1 else dist.init_device_mesh("cpu", shape)
    dist.destroy_process_group()


def shards(heads: int, kv_heads: int, keys: int = 256, **words: Any) -> list[Tensor]:
    """Query, key and value of a rank, without numbers."""
    places: Any = ((heads, 256), (kv_heads, keys), (kv_heads, keys))
    return [torch.empty(1, h, n, 64, device="meta", **words) for h, n in places]


CALLS = [
    (4, (8, 8), {}, "ulysses", "the fastest that fits into memory, by the communication model of nodes of 8 x H100"),
    (1, (8, 8), {}, "allgather", "there is no other to choose"),
    ((2, 4), (8, 8), {}, "2d", "there is no other to choose"),
    (4, (8, 8), {"document_ids": True}, "ulysses", "the ranks can share the heads"),
    (4, (6, 6), {"document_ids": True}, "allgather", "a rank has 256 keys, fewer than 4096"),
    (4, (6, 6), {"keys": 4096}, "ring", "a rank has 4096 keys, 4096 or more"),
    (4, (8, 8), {"alibi_slopes": True, "balance": "stripe"}, "ulysses", "there is no other to choose"),
    (4, (8, 8), {"method": "ring"}, "ring", "asked for; 'auto' would be ulysses: the fastest that fits"),
    (4, (8, 8), {"method": "ulysses"}, "ulysses", "asked for; 'auto' would be the same: the fastest that fits"),
    # ranks that do not fill nodes of eight
    (12, (8, 8), {}, "allgather", "the fastest that fits into memory, by the communication model of nodes of 4 ranks"),
]


@pytest.mark.parametrize(("ranks", "heads", "words", "method", "reason"), CALLS, indirect=["ranks"])
def test_method_and_reason_are_those_of_auto(ranks, heads, words, method, reason):
    words = dict(words)
    tensors = shards(*heads, keys=words.pop("keys", 256))
    if words.get("document_ids"):
        words |= DOCUMENTS
    if words.get("alibi_slopes"):
        words["alibi_slopes"] = torch.ones(heads[0], device="meta")
    said = distributed.explain(*tensors, ranks, **words)
    assert said.method == method
    assert said.reason.startswith(reason)
    assert str(said).startswith(f"{method}: {reason}")
    given = dict(zip(("query", "key", "value"), tensors), **words)
    of_call, rest = ({n: given[n] for n in kind._fields if n in given} for kind in (call.Tensors, call.Words))
    checked = call.check(call.Tensors(**of_call), call.Words(**rest), places_in(ranks))
    assert checked.method == method
    assert said.backend.backend == checked.backend == "torch"


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_every_method_has_an_estimate_or_a_reason(ranks):
    """The fastest first; of a call that is trained with its backward; and in lines, when it is printed."""
    for trains in (False, True):
        said = distributed.explain(*shards(8, 2, requires_grad=trains), ranks, is_causal=True)
        assert sorted([*said.estimates, *said.left_out]) == ["2d", "allgather", "ring", "ulysses"]
        times = [estimate.time_s for estimate in said.estimates.values()]
        assert times == sorted(times)
        assert said.method == next(iter(said.estimates))
        assert all((estimate.backward is not None) == trains for estimate in said.estimates.values())
        assert said.workload is not None
        assert said.workload.length == 4 * 256
        lines = str(said).splitlines()
        form = r"[\d.]+ us, [\d.]+ us of it waiting; [\d.]+ [kM]B sent in \d+ messages, [\d.]+ MB held"
        for line, method in zip(lines[1:4], said.estimates):
            assert re.fullmatch(f"estimate of {method}: {form}", line), line
        assert lines[4:6] == ["not 2d: it takes a mesh of two dimensions", "torch: plain torch in blocks of rows"]


@pytest.mark.parametrize("ranks", [4], indirect=True)
@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        ({**DOCUMENTS, "prefix": 3, "is_causal": True}, "document_ids and a prefix"),
        ({"attn_mask": torch.ones(256, 1024, dtype=torch.bool, device="meta")}, "an attn_mask"),
        ({"mask_mod": lambda batch, head, query, key: query >= key}, "a mask_mod"),
    ],
    ids=["documents", "mask", "function"],
)
def test_what_the_model_does_not_know_is_said(words, unknown, ranks):
    said = distributed.explain(*shards(8, 8), ranks, **words)
    assert said.estimates == {}
    assert said.workload is None
    assert f"no estimates: the communication model does not know {unknown}\n" in str(said)


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_too_much_for_memory_is_said(ranks):
    """Where no method fits, that which holds least."""
    tensors = [torch.empty(1, 8, 2**24, 128, device="meta", dtype=torch.bfloat16) for _ in range(3)]
    said = distributed.explain(*tensors, ranks)
    assert said.reason.startswith("the one that holds least, since none fits into memory")
    assert said.method == min(said.estimates, key=lambda method: said.estimates[method].memory)


@pytest.mark.parametrize("ranks", [8], indirect=True)
def test_page_has_what_eight_ranks_are_told(ranks):
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    (shown,) = re.findall(r"^```console\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    of_page: Any = {"dtype": torch.bfloat16, "device": "meta", "requires_grad": True}
    tensors = [torch.empty(1, heads, 131072, 128, **of_page) for heads in (32, 8, 8)]
    assert str(distributed.explain(*tensors, ranks, balance="zigzag", is_causal=True)).startswith(shown)


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_kernels_that_would_run_are_said(ranks, monkeypatch):
    """With those of one process by heads, with plain Triton's where parts are added up."""
    monkeypatch.setattr(call.on_triton, "refusals", lambda of: [])
    monkeypatch.setattr(call.on_triton, "describe", lambda of: "kernels of one process")
    for method, runs in (("ring", "parts by the kernels in plain Triton"), ("ulysses", "kernels of one process")):
        said = distributed.explain(*shards(8, 8), ranks, method=method, backend="triton")
        assert said.backend.backend == "triton"
        assert runs in said.backend.path
    with pytest.raises(NotImplementedError, match=r"the triton backend refuses this call: dropout_p=0\.5"):
        distributed.explain(*shards(8, 8), ranks, dropout_p=0.5, backend="triton")


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_wrong_call_is_refused_as_the_call_itself(ranks):
    with pytest.raises(ValueError, match="method='ulysses': the 6 query heads are no multiple of the 4 ranks"):
        distributed.explain(*shards(6, 6), ranks, method="ulysses")
    with pytest.raises(TypeError, match="missing a required argument: 'group_or_mesh'"):
        distributed.explain(*shards(6, 6))


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_auto_goes_into_a_graph_for_any_length(ranks):
    """Sizes and bounds are symbols there, of which the communication model knows nothing."""
    graphs = []

    def taken(graph, inputs):
        graphs.append(graph)
        return lambda *arguments: (torch.zeros(()),)

    def attend(query, key, value):
        words: Any = {"is_causal": True, "causal_alignment": "bottom_right", "window": (5, None)}
        return distributed.context_parallel_attention(query, key, value, ranks, **words)

    torch.compile(attend, fullgraph=True, dynamic=True, backend=taken)(*(torch.randn(1, 4, 8, 16) for _ in range(3)))
    assert len(graphs) == 1
