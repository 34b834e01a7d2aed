"""``lecture``: the systems that the package grew out of, each learning what the lecture says that it learns."""

from __future__ import annotations

from benchmarks.lecture.experiment import Experiment


def experiments() -> dict[str, Experiment]:
    """All of them by name, in the lecture's order."""
    from benchmarks.lecture import captions, dates, digits, language, properties  # they import torch, which takes long

    modules = (dates, captions, properties, digits, language)
    return {module.EXPERIMENT.name: module.EXPERIMENT for module in modules}
