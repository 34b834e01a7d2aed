"""A small run, made up: every figure is known, every table and picture has something to show."""

import copy
import json
from typing import Any

SIZE = {"batch": 1, "heads": 2, "head_dim": 4, "mask": "none", "weights": False}
NORM = {"kind": "layer", "wide_residual": False, "dropout_p": 0.0}


def spread(median, low=None, high=None):
    """Percentiles a tenth below and a fifth above; by default an interval of two per cent."""
    interval = {"low": 0.98 * median if low is None else low, "high": 1.02 * median if high is None else high}
    return {"median": median, "p20": 0.9 * median, "p80": 1.2 * median, **interval}


def row(case, variant, milliseconds=None, *, ratio=None, best=None, **more) -> dict[str, Any]:
    """``best``: a name and a ratio."""
    time = None if milliseconds is None else spread(milliseconds)
    return {
        "case": case,
        "family": case.split("-")[0],
        "dtype": "float32",
        "backward": "-train" in case or "-backward" in case,
        "device": "cpu",
        "seed": 0,
        "variant": variant,
        "status": "ok",
        "reason": "",
        "error": 1e-7,
        "error_budget": 1e-6,
        "wall_ms": time,
        "process_ms": copy.copy(time),
        "ratio": None if ratio is None else spread(ratio),
        "process_ratio": None if ratio is None else spread(ratio),
        "best": None if best is None else best[0],
        "best_ratio": None if best is None else spread(*best[1:]),
        "rounds": None if time is None else 9,
        "waited": None if time is None else 0.0,
        "others": None if time is None else 0.1,
        "contended": False,
        "warm_ms": None,
        "graph_ms": None,
        "host_ms": None,
        "flops": None,
        "moved_bytes": None,
        "formula": "",
        "tflops": None,
        "tb_per_s": None,
        "floor_ms": None,
        "of_floor": None,
        "of_datasheet": None,
        "peak_mib": None,
        "saved_mib": None,
        **more,
    }


def refused(case, variant, reason, **more):
    return row(case, variant, status="refused", reason=reason, error=None, error_budget=None, **more)


def sequence():
    """A convolution is fastest, a recurrence is at 16 tokens of those that reach all, attention at 64."""
    milliseconds = {"fastattn": (2.0, 4.0), "nn.MultiheadAttention": (4.0, 8.0), "nn.LSTM": (1.0, 6.0)}
    milliseconds |= {"causal-conv": (0.5, 0.5)}
    of_peer = milliseconds["nn.MultiheadAttention"]
    for index, seqlen in enumerate((16, 64)):
        for way in ("eval", "train"):
            size = {**SIZE, "batch": 64 // seqlen, "seqlen": seqlen, "mask": "causal"}
            case = f"sequence-b{size['batch']}-l{seqlen}-{way}-float32"
            for variant, times in milliseconds.items():
                factor = 3 if way == "train" else 1
                is_peer = times is of_peer
                held = seqlen if is_peer else 1
                ratio = None if is_peer else times[index] / of_peer[index]
                more = {"flops": 1e6 * factor, "peak_mib": 2.0 * held * factor, "formula": f"flops of {variant}"}
                yield row(case, variant, factor * times[index], ratio=ratio, **size, **more)


def module():
    """Faster, level and slower than the fastest other; the case with weights needs a quarter of the memory."""
    size = {**SIZE, "batch": 8, "seqlen": 64}
    for way, factor, best in (("eval", 1, (0.8, 0.7, 0.9)), ("train", 3, (1.0, 0.9, 1.1))):
        case, peer = f"module-b8-h2-l64-d4-{way}-float32", "nn.MultiheadAttention"
        yield row(case, "fastattn", 1.0 * factor, ratio=0.5, best=("qkv+sdpa", *best), **size)
        yield row(case, peer, 2.0 * factor, best=("qkv+sdpa", 1.6), **size)
        yield row(case, "qkv+sdpa", 1.25 * factor, ratio=0.6, best=("fastattn", 1.25), **size)
    for way, saved in (("eval", (None, None)), ("train", (5.0, 20.0))):
        case = f"module-b8-h2-l64-d4-{way}-weights-float32"
        more = {**size, "weights": True}
        yield row(
            case, "fastattn", 3.0, ratio=1.5, best=(peer, 1.5, 1.4, 1.6), peak_mib=10.0, saved_mib=saved[0], **more
        )
        yield row(case, peer, 2.0, best=("fastattn", 0.67), peak_mib=40.0, saved_mib=saved[1], **more)
        yield refused(case, "qkv+sdpa", "returns no weights", **more)


def attention():
    size = {**SIZE, "seqlen": 1024, "mask": "window"}
    case = "attention-b1-h2-l1024-d4-eval-window-float32"
    yield row(case, "fastattn", 1.0, ratio=0.4, best=("sdpa", 0.4), **size)
    yield row(case, "sdpa", 2.5, best=("fastattn", 2.5), **size)


def layer():
    case, size = "layer-b1-h2-l64-d4-eval-float32", {**SIZE, "seqlen": 64}
    yield row(case, "fastattn", 1.0, ratio=1.1, best=("nn.TransformerEncoderLayer", 1.1), **size)
    yield row(case, "nn.TransformerEncoderLayer", 0.9, best=("fastattn", 0.9), **size)


def varlen():
    """A third of the padded batch, and level with each sequence by itself."""
    case, size = "varlen-b8-h2-l64-d4-eval-float32", {"batch": 8, "heads": 2, "longest": 64, "head_dim": 4}
    yield row(case, "fastattn", 1.0, ratio=0.33, best=("sdpa-each", 1.0), causal=False, **size)
    yield row(case, "sdpa-padded", 3.0, best=("fastattn", 3.0), causal=False, **size)
    yield row(case, "sdpa-each", 1.0, ratio=0.33, best=("fastattn", 1.0), causal=False, **size)


def decode():
    case = "decode-b2-h4-k2-s64-d4-p16-float32"
    size = {"batch": 2, "heads": 4, "kv_heads": 2, "held": 64, "head_dim": 4, "page_size": 16}
    for variant, ratio in (("fastattn", 0.7), ("fastattn-paged", 0.8), ("sdpa-gathered", 3.0)):
        yield row(case, variant, ratio, ratio=ratio, best=("sdpa", ratio), **size)
    yield row(case, "sdpa", 1.0, best=("fastattn", 1.4), **size)


def hugging_face():
    """A model that "sdpa" has, and one that it has not."""
    for model, beside in (("llama", "sdpa"), ("gemma2", "eager")):
        for way in ("eval", "train"):
            case = f"hugging_face-{model}-b2-l64-{way}-padded-float32"
            size = {"model": model, "batch": 2, "seqlen": 64, "padded": True}
            has = beside == "sdpa"
            yield row(case, "fastattn", 1.0, ratio=0.9 if has else None, best=(beside, 0.9), peak_mib=20.0, **size)
            yield row(case, "eager", 1.2, ratio=1.3 if has else None, best=("fastattn", 1.2), peak_mib=30.0, **size)
            if has:
                yield row(case, "sdpa", 1.1, best=("fastattn", 1.1), peak_mib=25.0, **size)
            else:
                yield refused(case, "sdpa", "has no softcap", **size)


def functions():
    """FlexAttention evaluates alone, and SDPA has no softcap."""
    for example in ("t5_bias", "softcap"):
        for way, times in (("eval", (1.0, 2.0, 3.0)), ("train", (4.0, 8.0, None))):
            case = f"functions-{example}-b2-h2-l64-d4-{way}-float32"
            size = {"example": example, "batch": 2, "heads": 2, "seqlen": 64, "head_dim": 4}
            for variant, time in zip(("fastattn", "sdpa", "flex"), times):
                if time is None or (example, variant) == ("softcap", "sdpa"):
                    yield refused(case, variant, "cannot", **size)
                else:
                    yield row(case, variant, time, best=("fastattn", 2.0), **size)


def norm():
    rate = {"tb_per_s": 0.03, "floor_ms": 0.75, "of_floor": 0.75, "moved_bytes": 10, "formula": "bytes 16 M N"}
    for rows, size in ((512, 64), (8, 4096)):
        for way in ("forward", "backward"):
            case, more = f"norm-layer-m{rows}-n{size}-{way}-float32", {**NORM, "rows": rows, "size": size}
            yield row(case, "fastattn", 1.0, ratio=0.5, best=("eager", 0.5), **rate, **more)
            yield row(case, "eager", 2.0, best=("fastattn", 2.0), **rate, **more)
            yield refused(case, "quack", "needs a | pipe", **more)


def theory():
    shared = {"flops_per_token": 164096, "parameters": 66048, "layers": 1, "sequential_steps": 1}
    shared |= {"complexity_per_layer": "n^2 d", "sequential_per_layer": "1", "path_in_symbols": "1"}
    reaches = {"fastattn": 64, "nn.MultiheadAttention": 64, "nn.LSTM": 64, "causal-conv": 3}
    return [
        {**shared, "variant": name, "reach": reach, "longest_path": 1 if reach == 64 else None}
        for name, reach in reaches.items()
    ]


def quality():
    accuracies = {"recall 8 pairs": (0.99, 0.25, 0.1), "parity 32 bits": (0.6, 1.0, 0.58)}
    for task, found in accuracies.items():
        for model, accuracy in zip(("attention", "gru", "conv x2"), found):
            curve = {"step": [0, 25], "accuracy": [0.1, accuracy], "loss": [2.0, 1.0], "seconds": [0.1, 0.2]}
            shared = {"task": task, "model": model, "parameters": 100_000, "chance": 0.5 if "parity" in task else 0.03}
            yield {**shared, "steps": 25, "seconds": 1.25, "accuracy": accuracy, "curve": curve}
    yield {"task": "equivariance", "model": "attention", "parameters": 1, "deviation": 3e-16}


def document(results=None, **more):
    """Of everything, or of these rows alone."""
    alone = results is not None
    rows = results if alone else [*sequence(), *attention(), *norm(), *layer(), *module()]
    facts = {"torch": "2.13.0", "processor": "a processor", "cores": 2, "threads": 1, "load": 0.5}
    facts |= {"commit": "0123456789abcdef", "modified": False}
    rates = {"copy_tb_per_s": 0.04, "matmul_tflops": {"float32": 0.1}, "datasheet": None}
    return {
        "schema": 3,
        "state": "complete",
        "settings": {"quick": True, "device": "cpu", "dtype": None, "threads": 1, "seconds": 0.3, "only": ""},
        "environment": facts,
        "ceilings": {} if alone else rates,
        "results": rows,
        "tiles": [] if alone else [{"mask": "causal", "tiles": 128, "whole": 56, "in_part": 16}],
        "theory": {} if alone else {"sequence-b1-l64-eval-float32": theory()},
        "quality": [] if alone else list(quality()),
        "left_out": [],
        "seconds": 12.0,
        **more,
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path
