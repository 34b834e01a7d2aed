"""What is said of the kernels: the best of ours beside each peer, and the best configuration by length."""

import pytest

from benchmarks.reporting.kernels import best_table, kernel_findings, kernel_tables, ratio_table
from tests.benchmarks.documents import document, module, refused, row

SIZE = {"batch": 1, "heads": 16, "head_dim": 128, "mask": "causal", "weights": False}
PEERS = {"sdpa": 3.0, "sdpa-cudnn": 2.0}


def case(seqlen, milliseconds, *, way="forward", **more):
    """Rows of one case by variant."""
    size = {**SIZE, "seqlen": seqlen, **more}
    name = f"kernels-b1-h16-l{seqlen}-d{size['head_dim']}-{way}-{size['mask']}-bfloat16"
    for variant, time in milliseconds.items():
        yield row(name, variant, time, tflops=100.0, of_datasheet=0.5, **size)


@pytest.fixture
def run():
    """Ahead and behind forward; in the backward ahead in one pass alone."""
    forward = {"fastattn": 2.6, "fastattn-gluon-n128-s2": 1.6, "fastattn-triton": 2.5}
    rows = [*case(2048, forward | PEERS), *case(4096, {"fastattn": 2.21, "fastattn-triton": 2.2} | PEERS)]
    rows += case(4096, {"fastattn-triton": 8.0, "sdpa-cudnn": 2.0}, mask="bias")
    backward = {"fastattn": 5.0, "fastattn-triton-pair": 5.0, "fastattn-gluon-one-pass": 1.0}
    rows += case(2048, backward | PEERS, way="backward")
    rows.append(refused("kernels-b1-h16-l2048-d128-forward-causal-bfloat16", "flex", "no", seqlen=2048, **SIZE))
    return document([*rows, *module()])


def lines_of(table):
    """Each line as a dictionary, with the heading that it stands under."""
    heading, found = "", []
    for line in table.lines:
        if any(line[1:]):
            found.append({"way": heading} | {name: cell.strip() for name, cell in zip(table.header, line)})
        else:
            heading = line[0]
    return found


def test_ratio_table_has_the_best_of_ours_beside_each_peer(run):
    table = ratio_table(run)
    first, second, biased, backward, one_pass = lines_of(table)
    assert first == {
        "way": "forward",
        "case": "D128 causal L2048",
        "its / ours": "1.25",
        "fastest peer": "sdpa-cudnn",
        "best of ours": "gluon-n128-s2",
        "ms": "1.6",
        "rate": "100 TF/s",
        "of datasheet": "0.50",
        "fastattn": "2.6",
        "over best": "1.62",
        "sdpa": "3",
        "sdpa-cudnn": "2",
    }
    assert (second["its / ours"], second["best of ours"], second["over best"]) == ("0.91", "triton", "1.00")
    assert (biased["its / ours"], biased["sdpa"], biased["over best"]) == ("0.25", "", "")
    assert (backward["way"], backward["best of ours"], backward["its / ours"]) == ("backward", "triton-pair", "0.40")
    assert (one_pass["way"], one_pass["its / ours"]) == ("backward in one pass", "2.00")
    assert [table.lines[i][0].strip() for i in sorted(table.strong)] == ["D128 causal L2048"] * 2


def test_best_table_is_by_way_head_size_mask_and_length(run):
    found = {(line["way"], line["head size"], line["mask"]): line for line in _as_dicts(best_table(run))}
    assert list(found) == [
        ("forward", "D128", "bias"),
        ("forward", "D128", "causal"),
        ("backward", "D128", "causal"),
        ("backward in one pass", "D128", "causal"),
    ]
    assert found["forward", "D128", "causal"]["L 2048"] == "gluon-n128-s2 (1.62)"
    assert found["forward", "D128", "causal"]["L 4096"] == "triton"
    assert found["forward", "D128", "bias"]["L 2048"] == ""


def _as_dicts(table):
    return [dict(zip(table.header, line)) for line in table.lines]


def test_findings_have_a_sentence_for_each_way(run):
    forward, backward, one_pass = kernel_findings(run)
    assert forward == (
        "kernels, forward: in 3 cases the best of ours is ahead of the fastest peer in 1, has at least 90% of its rate "
        "in 1 more, and at worst 0.25 of it (D128 bias L4096, triton beside sdpa-cudnn); what the package picks takes "
        "up to 1.62 times as long as the best of ours (D128 causal L2048, gluon-n128-s2)."
    )
    assert backward.startswith("kernels, backward: in 1 case the best of ours is ahead of the fastest peer in 0")
    assert backward.endswith("what the package picks takes up to 1.00 times as long as the best of ours.")
    assert "in one pass: in 1 case the best of ours is ahead of the fastest peer in 1," in one_pass


def test_what_the_package_picks_stands_for_itself_where_no_configuration_was_timed():
    (line,) = lines_of(ratio_table(document(list(case(512, {"fastattn": 1.0, "sdpa": 2.0})))))
    assert (line["best of ours"], line["its / ours"]) == ("fastattn", "2.00")


def test_run_without_kernels_has_none_of_it():
    assert kernel_tables(document()) == kernel_findings(document()) == []
    alone = document(list(case(512, {"sdpa": 2.0})))
    assert kernel_tables(alone) == kernel_findings(alone) == []


def test_kernels_without_a_peer_have_no_ratio():
    alone = document(list(case(512, {"fastattn": 1.0, "fastattn-triton": 1.0})))
    (line,) = lines_of(ratio_table(alone))
    assert line.get("its / ours", "") == ""
    assert kernel_findings(alone) == []
