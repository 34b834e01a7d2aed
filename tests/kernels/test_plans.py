"""Plans: the second call of a signature is written down, and later ones do the same to other tensors."""

import gc
import threading
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")

from fastattn_kernels.common import plans as module  # noqa: E402
from fastattn_kernels.common.launch import launch  # noqa: E402
from fastattn_kernels.common.plans import Plans, planned, settings, signature  # noqa: E402
from tests.machines import DEVICE  # noqa: E402

pytestmark = pytest.mark.machine
SIZE, BLOCK = 40, 16


@triton.jit(do_not_specialize=["size"])
def _scaled_sum_kernel(x, y, out_ptr, size, scale, BLOCK: tl.constexpr):
    """``scale * x + y``, where there is a ``y``."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_ptr, stride = x
    found = tl.load(x_ptr + cols * stride, mask=cols < size, other=0.0) * scale
    if y is not None:
        y_ptr, stride_y = y
        found += tl.load(y_ptr + cols * stride_y, mask=cols < size, other=0.0)
    tl.store(out_ptr + cols, found, mask=cols < size)


class Inputs(NamedTuple):
    x: Tensor
    y: Tensor | None


def strided(tensor):
    return None if tensor is None else (tensor, tensor.stride(0))


def summed(inputs, scale):
    """``(3 scale x + y, the sum of 3 x)``: two launches, a workspace between them, and operators of torch."""
    x, size = inputs.x, inputs.x.shape[0]
    out = torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)
    work = torch.zeros(size + 8, device=x.device)
    inner = work[4 : size + 4]
    grid = (triton.cdiv(size, BLOCK),)
    launch(_scaled_sum_kernel, grid, x, strided(x), None, inner, size, 3.0, BLOCK=BLOCK, num_warps=1)
    launch(_scaled_sum_kernel, grid, x, strided(inner), strided(inputs.y), out, size, scale, BLOCK=BLOCK, num_warps=1)
    return out, work.sum()


def check(function, x, y, scale):
    out, total = function(Inputs(x, y), scale)
    expected = 3.0 * scale * x + (0.0 if y is None else y)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(total, (3.0 * x).sum())
    return out


@pytest.fixture
def function():
    return planned(summed)


def draw(size=SIZE, seed=0, step=1, offset=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(offset + size * step, generator=generator)[offset::step].to(DEVICE)


def plans_of(function):
    return function.plans.known()


def test_plan_is_written_at_the_second_call_and_does_the_same_to_other_tensors(function):
    for call in range(5):
        check(function, draw(seed=call), draw(seed=100 + call), 2.0)
        assert len(plans_of(function)) == (call > 0)
    (plan,) = plans_of(function)
    assert plan.launches == 2


NEIGHBOURS: dict[str, dict[str, int]] = {
    "the same again": {},
    "another size": {"size": 33},
    "a size of 1": {"size": 1},
    "a size divisible by 16": {"size": 48},
    "a stride": {"step": 2},
    "a stride divisible by 16": {"step": 16},
    "an address that is not a multiple of 16 bytes": {"offset": 1},
    "a stride and an address": {"step": 3, "offset": 3},
}


def test_neighbours_in_the_key_do_not_share_a_plan(function):
    """Triton compiles another kernel for a stride of 1, for multiples of 16 and for addresses that are none."""
    for round_ in range(3):
        for number, changes in enumerate(NEIGHBOURS.values()):
            x = draw(seed=number + 50 * round_, **changes)
            for y in (None, draw(seed=number + 7, size=x.shape[0], step=2), x):
                for scale in (2.0, 1.0, -0.5):
                    check(function, x, y, scale)
    assert len(plans_of(function)) > 8 * 2 * 3


def test_numbers_that_are_equal_are_told_apart():
    assert len({signature(1), signature(1.0), signature(True), signature("1"), signature(None)}) == 5


def test_two_arguments_that_are_one_tensor_have_no_plan_of_their_own(function):
    """What was one tensor when the plan was written may be two when it runs."""
    for seed in range(3):
        x = draw(seed=seed)
        check(function, x, x, 2.0)
    check(function, draw(seed=8), draw(seed=9), 2.0)
    assert len(plans_of(function)) == 1


def test_plan_holds_no_tensor(function):
    tensors: list[Tensor] = [draw(seed=1), draw(seed=2)]
    for _ in range(3):
        out = check(function, tensors[0], tensors[1], 2.0)
    alive = [weakref.ref(each) for each in (*tensors, out)]
    del tensors, out
    gc.collect()
    assert [each() for each in alive] == [None] * 3


def test_plan_gives_workspaces_back_behind_their_last_use():
    """Else a call would need the memory of all its launches at once. The call that is recorded does the same."""
    freed: list[object] = []

    def chain(x):
        for _ in range(3):
            out = torch.empty_like(x)
            weakref.finalize(out, freed.append, out.data_ptr())
            launch(_scaled_sum_kernel, (3,), x, strided(x), None, out, SIZE, 2.0, BLOCK=BLOCK)
            x = out
        return x

    function = planned(chain)
    for seed in range(3):
        torch.testing.assert_close(function(draw(seed=seed)), 8.0 * draw(seed=seed))
        freed.append("call")
    (plan,) = plans_of(function)
    assert plan.source.count("del ") == 2, plan.source
    first, recorded = freed.index("call"), freed.index("call", freed.index("call") + 1)
    assert first == 3 and recorded - first - 1 == 3, freed


def test_plan_of_a_function_within_a_planned_one_holds_its_launches(function):
    """The inner function's own plan would launch without the recording of the outer one."""
    for seed in range(3):
        check(function, draw(seed=seed), None, 2.0)
    outer = planned(lambda inputs, scale: function(inputs, scale))
    for seed in range(3):
        out, _ = outer(Inputs(draw(seed=seed), None), 2.0)
        torch.testing.assert_close(out, 6.0 * draw(seed=seed))
    (plan,) = plans_of(outer)
    assert plan.launches == 2


class Strided(NamedTuple):
    ptr: Any
    stride: Any


@triton.jit(do_not_specialize=["size"])
def _double_kernel(x, out_ptr, size, BLOCK: tl.constexpr):
    """``2 x``, whose fields are read by their names."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + cols, tl.load(x.ptr + cols * x.stride, mask=cols < size, other=0.0) * 2.0, mask=cols < size)


def test_named_tuples_keep_their_names_in_a_plan():
    """Those of kernels, and those that are returned: a plan made plain tuples of them, whose fields have no names."""

    def doubled(x):
        out = torch.empty(SIZE, device=x.device)
        launch(_double_kernel, (3,), x, Strided(x, x.stride(0)), out, SIZE, BLOCK=BLOCK)
        return Inputs(out, None)

    function = planned(doubled)
    for seed in range(3):
        x = draw(seed=seed, step=2)
        found = function(x)
        assert type(found) is Inputs
        torch.testing.assert_close(found.x, 2.0 * x)
    assert len(plans_of(function)) == 1


@pytest.mark.parametrize("rows", [1, 2])
def test_operator_that_returns_a_list(rows):
    """``unbind`` returns a list of one tensor where there is one row; it was taken for the tensor."""

    def rows_of(x):
        return tuple(each + 1 for each in (x * 2).view(rows, -1).unbind(0))

    function = planned(rows_of)
    for seed in range(3):
        x = draw(seed=seed)
        for found, expected in zip(function(x), (2 * x + 1).view(rows, -1), strict=True):
            torch.testing.assert_close(found, expected)
    assert len(plans_of(function)) == 1


def test_argument_that_is_returned_is_the_caller_s():
    """The recorded call runs on objects of its own, which have no history for autograd."""
    function = planned(lambda x: (x, x * 2))
    for seed in range(3):
        x = draw(seed=seed)
        assert function(x)[0] is x


def test_call_that_looks_at_numbers_has_no_plan():
    def by_number(x):
        return x + 1 if float(x[0]) > 0 else x - 1

    function = planned(by_number)
    for value in (1.0, 1.0, 1.0, -1.0):
        x = torch.full((3,), value, device=DEVICE)
        assert torch.equal(function(x), x + value)
    assert plans_of(function) == []


def test_call_that_reads_a_tensor_from_elsewhere_has_no_plan():
    elsewhere = draw()

    def adds(x):
        out = torch.empty_like(x)
        launch(_scaled_sum_kernel, (3,), x, strided(x), strided(elsewhere), out, SIZE, 1.0, BLOCK=BLOCK)
        return out

    function = planned(adds)
    for seed in range(3):
        torch.testing.assert_close(function(draw(seed=seed)), draw(seed=seed) + elsewhere)
    assert plans_of(function) == []


def test_random_numbers_are_drawn_anew():
    function = planned(lambda x: torch.rand_like(x) + x)
    x = torch.zeros(8, device=DEVICE)
    found = {tuple(function(x).tolist()) for _ in range(4)}
    assert len(found) == 4
    assert len(plans_of(function)) == 1


def test_error_leaves_nothing_behind(function):
    def fails(x):
        torch.empty_like(x)
        raise ValueError("no")

    failing = planned(fails)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            failing(draw())
    assert plans_of(failing) == []
    test_plan_is_written_at_the_second_call_and_does_the_same_to_other_tensors(function)


def test_old_plans_are_forgotten(function, monkeypatch):
    monkeypatch.setattr(module, "MOST_PLANS", 3)
    for size in (5, 6, 7, 8):
        for seed in range(2):
            check(function, draw(size, seed), None, 2.0)
    assert len(function.plans) == 3
    check(function, draw(5), None, 2.0)
    assert len(function.plans) == 3


def test_threads_share_plans():
    """Of operators of torch alone: Triton's interpreter is not safe with threads."""
    function = planned(lambda x, factor: torch.zeros_like(x) + x * factor)
    errors = []

    def work(number):
        for call in range(50):
            x = draw(seed=number * 100 + call, size=SIZE + call % 3)
            if not torch.equal(function(x, 2.0), 2.0 * x):
                errors.append((number, call))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(plans_of(function)) == 3


def test_signature_without_a_plan_is_not_recorded_again(monkeypatch):
    function = planned(lambda x: x + float(x[0]))
    recorded = []
    record = module.record
    monkeypatch.setattr(module, "record", lambda *arguments: recorded.append(arguments) or record(*arguments))
    for seed in range(4):
        x = draw(seed=seed)
        assert torch.equal(function(x), x + float(x[0]))
    assert len(recorded) == 1


def test_switch_of_the_process_is_in_the_key(function):
    before = settings()
    torch.use_deterministic_algorithms(True)
    try:
        assert settings() != before
    finally:
        torch.use_deterministic_algorithms(False)
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision != "tf32" else "ieee"
    try:
        assert settings() != before
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    assert settings() == before


def test_profiler_that_listens_to_triton_hears_every_launch(function, monkeypatch):
    """Triton tells hooks of launches; a plan would pass them by."""
    for seed in range(2):
        check(function, draw(seed=seed), None, 2.0)
    (plan,) = plans_of(function)

    def passed_by(*tensors):
        raise AssertionError("the plan ran")

    for key in function.plans._plans:
        function.plans._plans[key] = plan._replace(run=passed_by)
    monkeypatch.setattr(module, "is_listened_to", lambda: True)
    check(function, draw(seed=3), None, 2.0)
    monkeypatch.setattr(module, "is_listened_to", lambda: False)
    with pytest.raises(AssertionError, match="the plan ran"):
        check(function, draw(seed=3), None, 2.0)


def test_hooks_of_triton_are_noticed():
    from triton import knobs

    assert not module.is_listened_to()
    heard: Any = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        assert module.is_listened_to()
    finally:
        knobs.runtime.launch_enter_hook.remove(heard.append)


def test_plans_class_is_its_own_function():
    plans = Plans(lambda x: x + 1)
    x = draw()
    for _ in range(3):
        assert torch.equal(plans(signature(x), (x,), [x]), x + 1)
