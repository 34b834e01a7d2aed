"""What `make clients` runs, on a model that needs no other package; and that the committed page is of these clients."""

import re
from importlib import metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.integrations import _routing
from tests.clients import CLIENTS, page, parity
from tests.clients import __main__ as command
from tests.clients.cases import Client, make
from tests.clients.runs import calls_of_sdpa, train
from tests.compat import ROOT

EVERY_WAY = (parity.PATCHED, parity.FUSED, parity.BOTH)


class Attention(nn.Module):
    """As vision packages have it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transposed(nn.LayerNorm):
    """Not torch's."""

    def forward(self, input):
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class Model(nn.Module):
    """Attention of its own and torch's, norms of torch and another."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), Attention()
        self.other, self.multihead = Transposed(5), nn.MultiheadAttention(16, 2, batch_first=True)
        self.unused = nn.LayerNorm(16)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return self.multihead(self.other(x), x, x, need_weights=False)[0]


TOY = Client("tests", "toy", Model, lambda generator: {"x": torch.randn(2, 5, 16, generator=generator)},
             unlike={f"{__name__}:Transposed": nn.LayerNorm})  # fmt: skip


def test_client_is_served_and_counted():
    found = parity.examine(TOY, "torch", EVERY_WAY)
    assert found.calls == {"Attention": 1, "MultiheadAttention": 1}
    assert found.fused == {"LayerNorm": 2, "MultiheadAttention": 1}
    assert found.left.keys() == {"Attention", "Transposed"}
    assert found.left["Attention"] == (1, "calls SDPA")
    assert "overrides forward" in found.left["Transposed"][1]
    assert found.ratio <= parity.LIMIT


def test_client_is_served_by_the_kernels():
    assert parity.examine(TOY, "triton", (parity.BOTH,)).ratio <= parity.LIMIT


def off_by(part: float) -> Any:
    ours = fastattn.scaled_dot_product_attention
    return lambda *arguments, **words: ours(*arguments, **words) * (1 + part)


def test_client_whose_attention_is_wrong_in_the_last_digits_fails(monkeypatch):
    monkeypatch.setattr(_routing, "scaled_dot_product_attention", off_by(1e-5))
    with pytest.raises(AssertionError, match=r"patched, float32: its error is [\d.]+ times the original's"):
        parity.examine(TOY, "torch", (parity.PATCHED,))


def test_client_with_one_wrong_element_fails():
    """The largest error counts, not the RMS alone."""
    model = make(TOY)
    draws = [TOY.inputs(torch.Generator().manual_seed(i)) for i in range(parity.TRAINED)]
    peer = train(model, draws)
    truth = train(model.double(), [{"x": draw["x"].double()} for draw in draws])
    found = {name: tensor.clone() for name, tensor in peer.items()}
    assert max(parity.ratios(found, peer, truth).values()) <= 1
    found["d_attention.qkv.weight"][3, 7, 7] *= 1.001
    assert parity.ratios(found, peer, truth)["d_attention.qkv.weight"] > parity.LIMIT
    found["d_attention.qkv.weight"][3, 7, 7] = torch.nan
    assert parity.ratios(found, peer, truth)["d_attention.qkv.weight"] > parity.LIMIT


def test_client_whose_calls_go_to_torch_fails(monkeypatch):
    def refuse(*arguments, **words):
        raise NotImplementedError("not today")

    monkeypatch.setattr(_routing, "scaled_dot_product_attention", refuse)
    with pytest.raises(AssertionError, match=r"24 expected: 0 calls on fastattn.*\n.*not today"):
        parity.examine(TOY, "torch", (parity.PATCHED,))


class Noisy(Model):
    """Other noise in another dtype."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_client_that_draws_at_random_is_no_measure():
    with pytest.raises(AssertionError, match="from float64"):
        parity.examine(TOY._replace(make=Noisy), "torch", (parity.FUSED,))


def test_client_that_no_longer_calls_sdpa_fails():
    with pytest.raises(AssertionError, match="scaled_dot_product_attention was called"):
        parity.examine(TOY._replace(attends=False), "torch", (parity.PATCHED,))


def test_calls_are_counted_by_who_calls():
    assert calls_of_sdpa(make(TOY), TOY.inputs(torch.Generator().manual_seed(0)), train).total() == 2


@pytest.fixture
def run(monkeypatch, tmp_path):
    """``python -m tests.clients`` of the toy alone, and the page that it writes."""
    written = tmp_path / "clients.md"
    written.write_text(page.PAGE.read_text())
    monkeypatch.setattr(page, "PAGE", written)
    monkeypatch.setattr(command, "prepare", lambda: None)
    monkeypatch.setattr(command, "CLIENTS", (TOY,))
    monkeypatch.setattr(command, "INSTALLED", ("torch",))
    return command.main


def test_run_writes_its_row_and_leaves_the_rest(run, monkeypatch):
    times = page.rows(page.TIMES)
    monkeypatch.setattr(command, "compare", lambda client: tuple(page.COLUMNS[page.PARITY]))
    assert run([]) == 0
    assert page.rows(page.PARITY) == [{column: column for column in page.COLUMNS[page.PARITY]}]
    assert page.rows(page.TIMES) == times
    assert page.read(page.VERSIONS) == f"torch {metadata.version('torch')}.\n"


def test_run_that_fails_says_so_and_writes_nothing(run, monkeypatch, capsys):
    before = page.PAGE.read_text()
    monkeypatch.setattr(_routing, "scaled_dot_product_attention", off_by(1e-5))
    assert run([]) == 1
    assert "toy | FAILED" in (said := capsys.readouterr().out)
    assert "times the original's" in said and "0 passed, 1 failed" in said
    assert run(["no such model"]) == 1
    assert page.PAGE.read_text() == before


def test_times_of_a_client_are_over_the_originals(run):
    assert run(["--times", "--seconds", "0.01"]) == 0
    (row,) = page.rows(page.TIMES)
    assert tuple(row) == page.COLUMNS[page.TIMES] and row["model"] == "toy"


def test_committed_page_is_of_these_clients():
    """`make clients` writes it anew, and `make clients TIMES=1` its times."""
    named = [(client.package, client.name) for client in CLIENTS]
    assert len(set(named)) == len(named)
    for part in (page.PARITY, page.TIMES):
        rows = page.rows(part)
        assert [(row["package"], row["model"]) for row in rows] == named
        assert all(tuple(row) == page.COLUMNS[part] for row in rows)


def test_committed_page_has_no_failures():
    for row, client in zip(page.rows(page.PARITY), CLIENTS):
        assert (row["calls of SDPA"] != page.NOTHING) == client.attends, row
        assert row["calls of SDPA"] != page.NOTHING or row["fused"] != page.NOTHING, row
        assert row["calls of SDPA"].endswith("by registry") == client.registry, row
        for backend in ("torch", "kernels"):
            assert 0.5 <= float(row[backend]) <= parity.LIMIT, row
    for row in page.rows(page.TIMES):
        for column in page.COLUMNS[page.TIMES][2:]:
            assert re.fullmatch(r"[\d.]+ \[[\d.]+ [\d.]+\]( \(contended\))?", row[column]), row


def test_committed_page_is_of_the_locked_versions():
    locked = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints-clients.txt").read_text(), re.MULTILINE))
    found = dict(item.split() for item in page.read(page.VERSIONS).strip().rstrip(".").split(", "))
    assert found.keys() == {"torch", "triton", *(client.package for client in CLIENTS)}
    plain = {name.replace("_", "-"): version.partition("+")[0] for name, version in found.items()}
    assert plain.items() <= locked.items()
