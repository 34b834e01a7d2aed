"""Processes that run functions of a test together, over gloo: started once for many of them."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What a rank does: it gets the group of all, and returns what JSON can write.
Task = Callable[[dist.ProcessGroup], Any]


def run_on_ranks(
    world: int, tasks: Sequence[Task], *, lost: Sequence[int] = (), seconds: float = 120.0, interprets: bool = False
) -> list[Any]:
    """For each of ``world`` processes what the tasks return, by their names; of one that raises, its traceback.

    The ranks that are ``lost`` do not end by themselves, and give None; ``seconds`` is the time-out of the group, and
    of all of it. If a process ``interprets``, the kernels run in it, in Triton's interpreter.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = str(int(interprets))  # read once, when triton is imported
        try:
            arguments = (world, tasks, folder, seconds)
            started = [context.Process(target=_work, args=(rank, *arguments)) for rank in range(world)]
            for process in started:
                process.start()
        finally:
            os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)
        deadline = time.monotonic() + seconds
        for rank, process in enumerate(started):
            if rank not in lost:
                process.join(max(0.0, deadline - time.monotonic()))
        for process in started:
            process.kill()
            process.join()
        said = [Path(folder) / f"{rank}.json" for rank in range(world)]
        return [json.loads(path.read_text()) if path.exists() else None for path in said]


def _work(rank: int, world: int, tasks: Sequence[Task], folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    group = dist.group.WORLD
    assert group is not None
    found: dict[str, Any] = {}
    try:
        for task in tasks:
            found[task.__name__] = task(group)
    except Exception:
        found["raised"] = traceback.format_exc()
    text = Path(folder, f"{rank}.json")
    text.with_suffix(".part").write_text(json.dumps(found))
    text.with_suffix(".part").rename(text)
    os._exit(0)  # a rank that waits for others which are gone would not end by itself
