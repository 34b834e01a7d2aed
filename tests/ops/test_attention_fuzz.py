"""The fuzzer draws, checks and reports; a few of its cases, for what they find. ``make fuzz`` runs it at length."""

import dataclasses

import pytest

from tests.ops import attention_cases, fuzz
from tests.ops.attention_cases import Case

CASES = 6


def test_fuzz_of_a_few_cases_finds_nothing(backend, device, pytestconfig, capsys):
    first = pytestconfig.seed * 1000
    checked, failed = fuzz.fuzz(range(first, first + CASES), [backend], device)
    assert checked == CASES
    assert not failed, capsys.readouterr().out


def test_fuzz_draws_the_same_case_from_the_same_seed():
    cases = [fuzz.draw(seed) for seed in range(200)]
    assert cases == [fuzz.draw(seed) for seed in range(200)]
    assert len(set(cases)) == 200
    for axis in attention_cases.AXES:
        assert len({getattr(case, axis) for case in cases}) > 1, axis


@pytest.mark.parametrize("kind", ["wrong", "crash"])
def test_fuzz_reports_what_fails_as_plain_as_it_can(kind, device, monkeypatch):
    """A fault that needs nothing but ALiBi is found, and told with nothing but ALiBi."""

    def broken(feature, case, backend, device):
        if case.alibi != "none":
            raise AssertionError("wrong") if kind == "wrong" else RuntimeError("crash")

    monkeypatch.setattr(fuzz, "check", broken)
    seed = next(seed for seed in range(100) if fuzz.draw(seed).alibi == "batch")
    lines = []
    assert fuzz.fuzz([seed], ["torch"], device, report=lines.append) == (1, 1)
    assert kind in lines[0] and f"--seed {seed}" in lines[0]
    plain = dataclasses.replace(Case(alibi="batch"), seed=seed)
    assert f'"what it shows": {fuzz.spelled(plain)},' in lines[1]
    assert eval(fuzz.spelled(plain)) == plain
