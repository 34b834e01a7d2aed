"""What launchers hand to kernels in tuples keeps its constants in every triton: see ``arguments.Rules``."""

import pytest
import torch
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction, KernelInterface

from benchmarks.laboratory.cases import LOADS, hopper_cases, table_jobs
from benchmarks.laboratory.launch_case import launch
from fastattn_kernels.common.arguments import Rules

# all passes of a case, whichever tiles a heavier load has
CASES = {
    case["name"]: {name: value for name, value in case.items() if name != "unless_under"}
    for _, cases in table_jobs()
    for case in cases
}
# Softcap and ALiBi alone, and a gradient of weights alone: what triton 3.6 once did not compile.
for name, features in (("softcap and slopes", ("softcap", "slopes")), ("weights", ("weights",))):
    CASES[name] = {"name": name, "dtype": "bfloat16", "head_dim": 64, **dict.fromkeys(("causal", *features), True)}
    CASES[name]["passes"] = ["fwd", "dkdv", "dq", "weights"]


def loses_constants(argument):
    """Whether triton 3.6 may take a constant for None in a tuple of kernel arguments, inside a loop: where tuples stand
    in it, it has to end in a constant, None or a function, or to hold nothing but tensors in front of them, and nothing
    behind."""
    if not isinstance(argument, tuple) or not any(isinstance(item, tuple) for item in argument):
        return False
    first = next(i for i, item in enumerate(argument) if isinstance(item, tuple))
    in_order = all(isinstance(item, torch.Tensor) for item in argument[:first]) and all(
        isinstance(item, tuple) for item in argument[first:]
    )
    ends_in_constant = argument[-1] is None or isinstance(argument[-1], KernelInterface)
    return not (ends_in_constant or in_order) or any(map(loses_constants, argument))


@pytest.fixture
def launched(monkeypatch):
    """The arguments of every kernel that is launched, none of which runs; by the kernel's name."""
    found: list[tuple[str, tuple[object, ...]]] = []

    def interpret(self, *args, **kwargs):
        found.append((self.fn.__name__, (*args, *kwargs.values())))

    def run(self, *args, grid, warmup, **kwargs):
        found.append((self.fn.__name__, (*args, *kwargs.values())))

    monkeypatch.setattr(GridExecutor, "__call__", interpret)
    monkeypatch.setattr(JITFunction, "run", run)
    return found


@pytest.mark.parametrize("name", CASES)
def test_tuples_of_kernel_arguments_keep_their_constants(name, launched):
    launch(CASES[name])
    assert launched
    for kernel, arguments in launched:
        for position, argument in enumerate(arguments):
            assert not loses_constants(argument), f"{kernel}, argument {position}: {argument}"


def test_launches_that_are_looked_at_have_tuples_in_tuples(launched):
    """Of plain kernels and of Gluon's: else the test above looks at nothing."""
    launch({"dtype": "bfloat16", "head_dim": 64, **LOADS["heavy"]})
    launch(hopper_cases(64, ["fwd"], ["masked"])[0])
    deep = {
        kernel
        for kernel, arguments in launched
        for argument in arguments
        if isinstance(argument, tuple) and any(isinstance(item, tuple) for item in argument)
    }
    assert {"_attention_fwd_kernel", "_attention_bwd_dkdv_kernel", "_attention_weights_kernel"} <= deep


def test_tuples_that_lose_constants_are_told():
    """The two that did, each with a tensor and its strides, and what they became."""
    tensor, strides = torch.empty(2, 3), (3, 1)
    assert loses_constants((tensor, strides, 0.5))
    assert loses_constants((None, (tensor, *strides), 30.0))
    assert loses_constants((None, (tensor, *strides)))
    assert loses_constants(((tensor, strides, 0.5), None))
    assert not loses_constants((tensor, *strides, 0.5))
    assert not loses_constants((tensor, strides))
    assert not loses_constants(Rules((tensor, strides), None, (tensor, *strides), softcap=30.0))
