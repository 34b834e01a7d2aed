"""Which kernels run a call of attention: Gluon's, written for Hopper, where they can, else plain Triton's.

Both have one contract: a backward of either kind takes what a forward of either kind left, the rows' statistics.
"""

import functools
import logging
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from fastattn_kernels.attention import backward, forward
from fastattn_kernels.attention.backward_one_pass import launch_attention_bwd_one_pass, one_pass_refusals
from fastattn_kernels.attention.hopper.config import is_of_keys
from fastattn_kernels.common.arguments import OnlyIf
from fastattn_kernels.common.delta import Delta, tensor_of
from fastattn_kernels.common.device import Target, target_of
from fastattn_kernels.common.gradients import Gradients, WeightsGradient
from fastattn_kernels.common.problem import Problem
from fastattn_kernels.common.tile_map import TileMap

Kernels = Literal["auto", "gluon", "triton"]
Direction = Literal["forward", "backward"]

_HOPPER = Target("cuda", 90)
_logger = logging.getLogger("fastattn")
# The operations of a forward from which on Gluon's kernels are worth their launches. 2 GFLOP take an H200 about 4 us,
# of which they may save one. Where something is hidden, plain Triton's forward is one launch and Gluon's are two; and
# plain Triton needs no tensor maps, each of which takes the host about 3 us. An estimate from host times and a model,
# not from a GPU.
fewest_operations = 2**31
# For each kind of problem whose Gluon kernels this triton could not compile, what it said.
not_compiling: dict[tuple[object, ...], str] = {}


def gluon_refusals(
    direction: Direction, problem: Problem, d_weights: WeightsGradient | None = None, deterministic: bool = True
) -> list[str]:
    """Why the Gluon kernels cannot run a problem; empty where they can.

    Args:
        direction: of the kernels.
        problem: what they are to run.
        d_weights: the gradient of returned weights that goes into the backward.
        deterministic: whether the backward is to be.
    """
    target = target_of(problem.query.device)
    if target != _HOPPER:
        return [f"they are for cuda:90, and this is {target.backend}:{target.arch}"]
    if problem.packed is not None:
        return ["packed sequences are not in the Gluon kernels"]
    gluon = gluon_kernels(direction)
    if isinstance(gluon, str):
        return [gluon]
    if not_compiling and (said := not_compiling.get(_kind(direction, problem, deterministic))) is not None:
        return [f"triton {triton.__version__} does not compile them: {said}"]
    reasons = gluon.refusals(problem)
    if d_weights is not None:
        reasons.append("the gradient of weights is not in the Hopper kernels")
    return reasons


def reasons_for_plain(problem: Problem) -> list[str]:
    """Why plain Triton is better for a problem that Gluon's kernels could run; empty where it is not."""
    (batch, heads, seqlen_q, head_dim), seqlen_k = problem.query.shape, problem.key.shape[2]
    operations = 2 * batch * heads * seqlen_q * seqlen_k * (head_dim + problem.value.shape[3])
    if operations >= fewest_operations:
        return []
    least = fewest_operations / 1e9
    return [f"the call is small: {operations / 1e9:.3g} GFLOP of the {least:.3g} that make up for more launches"]


class GluonKernels(NamedTuple):
    """The Gluon kernels of a direction."""

    refusals: Callable[[Problem], list[str]]
    launch: Callable[..., None]


@functools.cache
def gluon_kernels(direction: Direction) -> GluonKernels | str:
    """The Gluon kernels of a direction, or why there are none. Imported late: on most devices they are not needed."""
    try:
        if direction == "forward":
            from fastattn_kernels.attention.hopper.forward import launch_attention_fwd as launch
            from fastattn_kernels.attention.hopper.problem import refusals
        else:
            from fastattn_kernels.attention.hopper.backward import launch_attention_bwd as launch
            from fastattn_kernels.attention.hopper.backward import refusals
    except (ImportError, AttributeError) as error:
        return f"triton {triton.__version__} has another Gluon: {error}"
    return GluonKernels(refusals, launch)


def _kind(direction: Direction, problem: Problem, deterministic: bool) -> tuple[object, ...]:
    """What the kernels of a problem depend on: two problems of one kind compile both, or neither does."""
    present = tuple(value is None for value in (*problem.rules(), problem.lower, problem.upper, problem.sinks))
    bias = problem.bias
    of_bias = None if bias is None else (bias.dtype, is_of_keys(bias))
    sizes = problem.query.dtype, problem.query.shape[3], problem.value.shape[3]
    return direction, deterministic, *sizes, of_bias, present


def describe(problem: Problem, kernels: Kernels = "auto", d_weights: WeightsGradient | None = None) -> str:
    """Which kernels would run a problem's forward and backward, and why not those in Gluon."""
    said = []
    for direction in get_args(Direction):
        of_backward = d_weights if direction == "backward" else None
        refused = gluon_refusals(direction, problem, of_backward)
        if kernels == "auto":
            refused = refused or reasons_for_plain(problem)
        reasons = "; ".join(refused)
        if kernels == "triton":
            said.append(f"{direction} in plain Triton, as asked for")
        elif refused and kernels == "gluon":
            said.append(f"{direction} refused: Gluon is asked for ({reasons})")
        elif refused:
            said.append(f"{direction} in plain Triton (not in Gluon: {reasons})")
        else:
            said.append(f"{direction} in Gluon")
    return ", ".join(said)


def launch_attention_fwd(
    problem: Problem,
    output: Tensor,
    lse: Tensor,
    statistics: Tensor,
    tile_map: TileMap | None = None,
    kernels: Kernels = "auto",
) -> None:
    """:func:`fastattn_kernels.attention.forward.launch_attention_fwd` by the kernels that are chosen.

    Raises:
        NotImplementedError: Gluon is asked for by name and refuses; the message lists its reasons.
    """
    arguments = problem, output, lse, statistics, tile_map
    gluon = _gluon("forward", kernels, problem)
    if gluon is None or not _compiles("forward", kernels, problem, True, lambda: gluon.launch(*arguments)):
        forward.launch_attention_fwd(*arguments)


def launch_attention_bwd(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor | Delta,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    tile_map: TileMap | None = None,
    kernels: Kernels = "auto",
    deterministic: bool = True,
) -> None:
    """:func:`fastattn_kernels.attention.backward.launch_attention_bwd` by the kernels that are chosen.

    In one pass, which adds up dQ in no fixed order, where that is allowed (``deterministic=False``) and they can.

    Where only the device knows whether ``d_weights`` is zeros, both backwards are launched, without it and with it, the
    latter in plain Triton: one of them finds nothing to do, or (in Gluon or in one pass) is overwritten.

    Raises:
        NotImplementedError: as :func:`launch_attention_fwd`.
    """
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if problem.query.shape[1] == 0:  # no heads to give the keys a gradient
        gradients.d_key.zero_()
        gradients.d_value.zero_()
        return
    saved = problem, d_output, statistics, delta
    if d_weights is None or d_weights.used is None or kernels == "gluon":
        _launch_bwd(*saved, d_weights, gradients, tile_map, kernels, deterministic)
    else:
        saved = problem, d_output, statistics, tensor_of(delta)
        unless_used = d_weights.only_if_used(False)
        _launch_bwd(*saved, None, gradients, tile_map, kernels, deterministic, unless_used)
        backward.launch_attention_bwd(*saved, d_weights, gradients, tile_map, only_if=d_weights.only_if_used())


def _launch_bwd(
    problem: Problem,
    d_output: Tensor,
    statistics: Tensor,
    delta: Tensor | Delta,
    d_weights: WeightsGradient | None,
    gradients: Gradients,
    tile_map: TileMap | None,
    kernels: Kernels,
    deterministic: bool,
    only_if: OnlyIf | None = None,
) -> None:
    """:func:`launch_attention_bwd` of a gradient of weights that is known to be zeros or not. Gluon's kernels and those
    in one pass take no condition: they run whatever ``only_if`` says."""
    saved = problem, d_output, statistics, delta
    gluon = _gluon("backward", kernels, problem, d_weights, deterministic)
    if gluon is not None:
        computed = problem, d_output, statistics, tensor_of(delta)
        launch = functools.partial(gluon.launch, *computed, gradients, tile_map, deterministic=deterministic)
        if _compiles("backward", kernels, problem, deterministic, launch):
            return
    needs_alibi_slopes = gradients.d_alibi_slopes is not None
    if deterministic or one_pass_refusals(problem, needs_alibi_slopes=needs_alibi_slopes):
        backward.launch_attention_bwd(*saved, d_weights, gradients, tile_map, only_if=only_if)
    else:
        launch_attention_bwd_one_pass(*saved, d_weights, gradients, tile_map)


def _gluon(
    direction: Direction,
    kernels: Kernels,
    problem: Problem,
    d_weights: WeightsGradient | None = None,
    deterministic: bool = True,
) -> GluonKernels | None:
    """The Gluon kernels, unless others are to run the problem."""
    if kernels == "triton":
        return None
    refused = gluon_refusals(direction, problem, d_weights, deterministic)
    if kernels == "auto":
        refused = refused or reasons_for_plain(problem)
    if refused and kernels == "gluon":
        raise NotImplementedError(f"the Gluon kernels refuse this {direction}: {'; '.join(refused)}")
    found = None if refused else gluon_kernels(direction)
    return None if isinstance(found, str) else found


def _compiles(
    direction: Direction, kernels: Kernels, problem: Problem, deterministic: bool, launch: Callable[[], None]
) -> bool:
    """Launch, and return True; return False, behind a warning in the log, where this triton cannot compile the kernel
    and nobody asked for Gluon by name."""
    try:
        launch()
    except Exception as error:
        if kernels == "gluon" or not _is_of_the_compiler(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        not_compiling[_kind(direction, problem, deterministic)] = said
        _logger.warning("attention's %s: plain Triton runs, since Gluon's kernel does not compile: %s", direction, said)
        return False
    return True


# Words of the RuntimeErrors that MLIR's passes and LLVM's translation raise.
_OF_THE_COMPILER = ("PassManager", "failed to translate")


def _is_of_the_compiler(error: Exception) -> bool:
    """Whether an exception of a launch comes from compiling, before anything ran."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_THE_COMPILER)
    return isinstance(error, TritonError) or said
