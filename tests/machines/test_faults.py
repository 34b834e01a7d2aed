"""The machines find what they are there for: faults seeded into the kernels, which pass as they are."""

import pytest

from tests import machines
from tests.machines import faults
from tests.machines.cases import CASES, kernels_with

pytestmark = pytest.mark.skipif(
    not machines.EXECUTING, reason=f"faults are sought by {machines.VARIABLE}=ttgir or ptx: this is {machines.NAME}"
)


def _param(name: str):
    fault = faults.FAULTS[name]
    return pytest.param(fault, id=name.replace(" ", "_"), marks=[pytest.mark.machine] if fault.quick else [])


@pytest.mark.machine
@pytest.mark.parametrize("order", range(faults.ORDERS))
@pytest.mark.parametrize("case", CASES)
def test_kernels_as_they_are_pass(case, order):
    with machines.order_of_events(order):
        CASES[case]()


@pytest.mark.parametrize("fault", [_param(name) for name in faults.FAULTS])
def test_machine_finds_fault(fault, record_property):
    expected = fault.ttgir if machines.NAME == "ttgir" else fault.ptx
    if not expected:
        pytest.skip(f"{machines.NAME} cannot see this fault: docs/proof.md says why")
    said = faults.found(fault)
    assert said, f"nothing was found in {faults.ORDERS} orders of events"
    assert said in expected or "any" in expected
    record_property("found", said)


def test_fault_without_its_place_is_refused():
    with (
        pytest.raises(LookupError, match=r"attention/forward.py has 0 times"),
        kernels_with("attention/forward.py", "x y z", ""),
    ):
        pass
