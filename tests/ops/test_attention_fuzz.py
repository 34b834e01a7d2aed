"""The fuzzer draws, checks and reports; a few of its cases, for what they find. ``make fuzz`` runs it at length."""

import pytest

from tests.ops import fuzz

CASES = 6


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_fuzz_of_a_few_cases_finds_nothing(kind, backend, device, pytestconfig, capsys):
    first = pytestconfig.seed * 1000
    checked, failed = fuzz.fuzz(range(first, first + CASES), [backend], device, kinds=[kind])[kind]
    assert checked == CASES
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_fuzz_draws_the_same_case_from_the_same_seed(kind):
    cases = [fuzz.draw(seed, kind) for seed in range(200)]
    assert cases == [fuzz.draw(seed, kind) for seed in range(200)]
    assert len({case.id for case in cases}) == 200
    for axis in fuzz.KINDS[kind].cases.AXES:
        assert len({str(getattr(case, axis)) for case in cases}) > 1, axis


@pytest.mark.parametrize("kind", fuzz.KINDS)
@pytest.mark.parametrize("what", ["wrong", "crash"])
def test_fuzz_reports_what_fails_as_plain_as_it_can(kind, what, device, monkeypatch):
    """A fault that needs nothing but ALiBi is found, and told with nothing but ALiBi."""
    cases = fuzz.KINDS[kind].cases
    level = {"attention": "batch"}.get(kind, "each")

    def broken(feature, case, backend, device):
        if case.alibi == level:
            raise AssertionError("wrong") if what == "wrong" else RuntimeError("crash")

    monkeypatch.setattr(cases, "check", broken)
    seed = next(seed for seed in range(100) if fuzz.draw(seed, kind).alibi == level)
    lines = []
    assert fuzz.fuzz([seed], ["torch"], device, kinds=[kind], report=lines.append) == {kind: (1, 1)}
    assert what in lines[0] and f"--seed {seed}" in lines[0]
    plain = cases.Case(alibi=level, seed=seed)
    assert f'"what it shows": {fuzz.spelled(plain)},' in lines[1]
    assert eval(fuzz.spelled(plain), {"Case": cases.Case}) == plain
