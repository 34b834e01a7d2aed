"""Every model on every task, as rows and as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.quality.models import deviations, models
from benchmarks.quality.tasks import tasks
from benchmarks.quality.training import Sample, train
from benchmarks.report import print_table

EQUIVARIANCE = "equivariance"

_TIE = 0.02  # accuracies nearer than this are no difference: some two standard errors of the smallest held-out set


def run(quick: bool, seed: int, say: Callable[[str], None], device: str | torch.device = "cpu") -> list[dict[str, Any]]:
    """Train every model on every task, then ask which are equivariant; ``say`` is told how far it is.

    The rows hold plain values: ``task, model, parameters, steps, seconds, accuracy, curve``, with ``deviation`` in
    place of the last four where the task is ``"equivariance"``, which nobody is trained for.
    """
    rows = []
    for task in tasks():
        for model in models():
            steps = task.quick_steps if quick else task.steps

            def show(sample: Sample, name: str = f"{task.name}, {model.name}", steps: int = steps) -> None:
                say(f"{name}: step {sample.step} of {steps}, accuracy {sample.accuracy:.3f}")

            rows.append(train(task, model, seed=seed, steps=steps, device=device, show=show).as_json())
    for name, parameters, deviation in deviations(seed):
        rows.append({"task": EQUIVARIANCE, "model": name, "parameters": parameters, "deviation": deviation})
    return rows


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The accuracies side by side, what they cost, and who is equivariant."""
    trained = [row for row in rows if row["task"] != EQUIVARIANCE]
    by_task: dict[str, dict[str, dict[str, Any]]] = {}
    for row in trained:
        by_task.setdefault(row["task"], {})[row["model"]] = row
    names = list(dict.fromkeys(row["model"] for row in trained))
    chances = {task.name: task.chance for task in tasks()}

    accuracies = []
    for task, of_task in by_task.items():
        best = max(row["accuracy"] for row in of_task.values())
        winners = [name for name, row in of_task.items() if row["accuracy"] > best - _TIE]
        shown = [f"{of_task[name]['accuracy']:.3f}" if name in of_task else "" for name in names]
        accuracies.append((task, f"{chances[task]:.3f}", *shown, ", ".join(winners)))
    print_table("accuracy on sequences not trained on", ("task", "chance", *names, "best"), accuracies)

    costs = [
        (row["task"], row["model"], f"{row['parameters'] / 1e3:.1f}k", str(row["steps"]), f"{row['seconds']:.1f}")
        for row in trained
    ]
    header = ("task", "model", "parameters", "steps", "seconds")
    print_table(
        "what it took, at the same width, parameters, sequences and step budget; who has solved it stops", header, costs
    )

    lines = [(row["model"], f"{row['deviation']:.1e}") for row in rows if row["task"] == EQUIVARIANCE]
    print_table("untrained: does the result follow a permutation of the inputs?", ("layers", "deviation"), lines)
