"""Which machine the environment chooses, and what it may not ask for."""

import pytest

from tests import machines
from tests.machines.marks import quick


@pytest.mark.parametrize("name", machines.ON_A_CPU)
def test_environment_chooses_the_machine(name, monkeypatch):
    monkeypatch.setenv(machines.VARIABLE, name)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert machines._chosen() == name


def test_unknown_machine_is_refused(monkeypatch):
    monkeypatch.setenv(machines.VARIABLE, "abacus")
    with pytest.raises(ValueError, match="FASTATTN_MACHINE=abacus: it takes ttgir, ptx"):
        machines._chosen()


def test_machine_beside_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv(machines.VARIABLE, "ttgir")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET has to be unset or 0"):
        machines._chosen()


def test_quick_cases_are_cases():
    with pytest.raises(ValueError, match=r"chosen=\['c'\]: the cases are \['a', 'b'\]"):
        quick(["a", "b"], "c")
