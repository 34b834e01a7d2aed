"""What a call has to say, in lines: the questions first."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu import first_launches, tools
from benchmarks.reporting.document import FAILED, OURS, by_case, timed_of
from benchmarks.reporting.kernels import FAMILY, kernel_findings, kernel_tables
from benchmarks.reporting.text import as_text

_MOST_FAULTS = 15  # that are named; the files have them all

REST = "\nBeyond the questions:\n"  # a line between them and everything else

Facts = dict[str, Any]  # of call.json
Document = dict[str, Any]  # of the first launches, or of a run; empty where there is none


def lines(facts: Facts, launched: Document, document: Document) -> list[str]:
    """Is it right, is it faster than cuDNN, and what else there is."""
    versions = facts["versions"]
    gpu = versions.get("environment", {}).get("gpu") or "no GPU"
    said = [f"Call {facts['call']}, {versions.get('date')}, {gpu}" + (", a dry run" if facts["dry_run"] else ""), ""]
    said += ["Right?", *_right(facts, launched, document), ""]
    said += ["Faster than cuDNN?", *(beside_cudnn(document) or ["  nothing was timed yet"]), *REST.splitlines()]
    said += first_launches.sentences(launched) if launched else []
    said += _of_cache(facts) + _of_parity(facts)
    said += _of_faults(facts)
    said += tools.ncu_sentences(facts.get("ncu", []))
    if document:
        said += kernel_findings(document)
        if left_out := document["left_out"]:
            said.append(f"timings left out for want of time: {len(left_out)}, the first {left_out[0]}")
        for table in kernel_tables(document):
            said += ["", as_text(table)]
    took = ", ".join(f"{name} {part['seconds']} s" for name, part in facts["parts"].items())
    return [*said, "", *_of_versions(versions), took]


def wrong(facts: Facts, launched: Document, document: Document) -> list[str]:
    """What is wrong with this package, each in a sentence."""
    said = [
        f"first launch of {row['variant']}: {row['case']}: {row['status']}: {row['reason']}"
        for row in launched.get("launches", [])
        if row["status"] in first_launches.BARRED
    ]
    said += [
        f"{row['variant']}: {row['case']}: {row['status']}: {row['reason']}"
        for row in document.get("results", [])
        if row["variant"].split("-")[0] == OURS and row["status"] in FAILED
    ]
    parity = facts.get("parity", {"verdict": ""})
    if parity["verdict"].startswith("failed") or parity.get("failed"):
        said.append(f"parity {parity['verdict']}")
    return said + [
        f"{name} broke down: {part['broke_down']}" for name, part in facts["parts"].items() if part["broke_down"]
    ]


def _right(facts: Facts, launched: Document, document: Document) -> list[str]:
    if faults := wrong(facts, launched, document):
        more = [f"  and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        return [*(f"  NO: {fault}" for fault in faults[:_MOST_FAULTS]), *more]
    launches = sum(row["status"] == "ok" for row in launched.get("launches", []))
    rows = sum(row["variant"].split("-")[0] == OURS for row in timed_of(document.get("results", [])))
    if not launches and not rows:
        return ["  nothing of ours was seen to be right or wrong"]
    parity = facts.get("parity", {}).get("verdict", "has not been run in this call")
    return [f"  as far as was seen: {launches} first launches, {rows} results before they were timed; parity {parity}"]


def beside_cudnn(document: Document) -> list[str]:
    """A line for each case of the kernels where both were timed: the fastest of ours beside cuDNN."""
    said = []
    rows = [row for row in timed_of(document.get("results", [])) if row["family"] == FAMILY]
    for case, variants in by_case(rows).items():
        ours = [row for name, row in variants.items() if name.split("-")[0] == OURS]
        cudnn = variants.get("sdpa-cudnn")
        if cudnn is None or not ours:
            continue
        best = min(ours, key=_ms)
        times, rates = (_ms(best), _ms(cudnn)), (best["tflops"] or 0.0, cudnn["tflops"] or 0.0)
        verdict = "yes" if times[0] < times[1] else "no"
        figures = f"{times[0]:.3f} beside {times[1]:.3f} ms, {rates[0]:.0f} beside {rates[1]:.0f} TFLOP/s"
        said.append(f"  {verdict}, {times[1] / times[0]:.2f} times as fast: {case}: {best['variant']} {figures}")
    return said


def _ms(row: dict[str, Any]) -> float:
    return row["wall_ms"]["median"]


def _of_cache(facts: Facts) -> list[str]:
    if "cache" not in facts:
        return []
    archives, made = facts["cache"]["archives"], facts["cache"]["compiled_here"]
    said = []
    for archive in archives:
        said.append(f"{archive['archive']}: {archive['kernels']} kernels, {archive['launchers']} launchers")
        said += [f"  {difference}" for difference in archive["differs"]]
    said = said or ["no archive of compiled kernels"]
    return [*said, f"compiled in this call: {made['kernels']} kernels, {made['launchers']} launchers"]


def _of_parity(facts: Facts) -> list[str]:
    parity = facts.get("parity")
    if parity is None:
        return []
    table = parity.get("table") or {}
    counts = ", ".join(f"{table[name]} {name}" for name in ("passed", "failed", "skipped") if name in table)
    plain = ", in plain Triton" if parity.get("in_plain_triton") else ""
    failed = parity.get("failed", [])[:_MOST_FAULTS]
    return [f"parity {parity['verdict']}{plain}" + (f": {counts}" if counts else ""), *(f"  {name}" for name in failed)]


def _of_faults(facts: Facts) -> list[str]:
    found = facts.get("sanitizer", {"faults": [], "rows": []})
    if found["faults"] and not found["rows"]:
        return [f"{len(found['faults'])} faults were not looked into: compute-sanitizer is not there"]
    return tools.sanitizer_sentences(found["rows"])


def _of_versions(versions: Facts) -> list[str]:
    parts = (versions.get(name, {}) for name in ("environment", "compiler", "tools", "packages"))
    return [", ".join(f"{name} {value}" for name, value in part.items()) for part in parts]
