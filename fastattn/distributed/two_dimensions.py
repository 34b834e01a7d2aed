"""Context parallelism in two dimensions: heads along one of a mesh, a ring along the other (arXiv:2405.07719).

Heads limit the ranks of an all-to-all, and a ring of all ranks has many steps. Here the ranks of the second dimension,
which are to be close to one another, turn their tokens into heads; those of the first one, each with the tokens of
several ranks and some of the heads, are a ring.
"""

from __future__ import annotations

import dataclasses

from fastattn.distributed import ring, ulysses
from fastattn.distributed.parts import Done, Run
from fastattn.ops.attention.contract import InputGradients, Inputs, Kept, Needs, OutputGradients


def forward(run: Run, inputs: Inputs) -> Done:
    """This rank's rows."""
    of_heads, of_ring = _runs(run)
    done = ring.forward(of_ring, ulysses.of_heads(of_heads, inputs))
    output, lse = ulysses.to_rows(of_heads, [done.output, done.lse])
    return done._replace(output=output, lse=lse)


def backward(run: Run, gradients: OutputGradients, kept: Kept, needs: Needs, inputs: Inputs) -> InputGradients:
    """The gradients of the inputs; of those that all ranks have alike this rank's share."""
    of_heads, of_ring = _runs(run)
    found = ring.backward(of_ring, ulysses.gradients_of_heads(of_heads, gradients), kept, needs, inputs)
    return ulysses.home(of_heads, found, needs)


def _runs(run: Run) -> tuple[Run, Run]:
    """The call along the second dimension, on the tokens of one rank of the first; and along the first one."""
    place = run.heads_for
    assert place is not None
    of_heads = dataclasses.replace(
        run, place=place, balance="none", rows=run.rows // place.world, keys=run.keys // place.world
    )
    return of_heads, dataclasses.replace(run, first_head=ulysses.own_heads(of_heads).start)
