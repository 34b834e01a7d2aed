"""Faults that users of other attention kernels reported, and where each is tested here: the list, in one place."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

FAULTS = {
    "no arbitrary or padding masks (flash-attention#352, #1179, #1898, #17)": (
        "ops/test_attention_regressions.py::test_attention_masks_of_every_kind_combine"
    ),
    "no gradient of a bias (flash-attention#342, #1219, pytorch#145208)": (
        "ops/test_attention_regressions.py::test_attention_grad_of_a_bias_is_there_in_its_shape",
        "ops/test_attention_regressions.py::test_attention_grad_reaches_a_table_of_relative_positions",
    ),
    "no gradient of sinks (flash-attention#1973)": (
        "ops/test_attention_regressions.py::test_attention_grad_of_sinks_is_there"
    ),
    "silently wrong gradients of block-sparse masks (flash-attention#2623)": (
        "ops/test_attention_regressions.py::test_attention_grad_of_tiles_that_a_mask_spells"
    ),
    "silently wrong gradients under torch.compile (pytorch#158212)": (
        "ops/test_attention_compile.py::test_attention_compiles_without_graph_breaks"
    ),
    "wrong gradients of output gradients that are not contiguous (flash-attention#355)": (
        "ops/test_attention_regressions.py::test_attention_grad_of_output_gradients_that_lie_apart"
    ),
    "NaN gradients of large constant inputs (pytorch#125674)": (
        "ops/test_attention_regressions.py::test_attention_grad_of_inputs_of_a_thousand"
    ),
    "NaN in rows that may see nothing (pytorch#41508)": (
        "ops/test_attention_masking.py::test_attention_row_without_keys_is_zero",
        "modules/test_multihead_attention_contract.py::test_row_without_keys_gives_the_output_bias_and_finite_gradients",
    ),
    "NaN from masked keys and values (pytorch#101967)": (
        "ops/test_attention_masking.py::test_attention_ignores_nan_in_hidden_keys",
        "ops/test_attention_masking.py::test_attention_nan_behind_masks_reaches_no_gradient",
    ),
    "O(H L^2) memory for weights that are averaged (pytorch#98505, RT-DETR#680)": (
        "ops/test_attention_regressions.py::test_attention_averaged_weights_need_no_memory_per_head"
    ),
    "no forward mode (flash-attention#1672, pytorch#154332)": (
        "ops/test_attention_higher_order.py::test_attention_jvp_matches_reference"
    ),
    "no double backward (pytorch#116350)": (
        "ops/test_attention_higher_order.py::test_attention_double_backward_matches_reference"
    ),
    "no backward under vmap (pytorch#176265)": (
        "ops/test_attention_higher_order.py::test_attention_per_sample_gradients"
    ),
    "a compilation for every shape (flash-attention#2635, pytorch#136196)": (
        "kernels/test_cross_compile.py::test_run_time_values_do_not_recompile",
        "ops/test_attention_regressions.py::test_attention_run_time_values_do_not_recompile",
        "ops/test_attention_compile.py::test_attention_compiled_for_dynamic_lengths_compiles_once",
    ),
    "out of shared memory on small GPUs (pytorch#180278, #198224)": (
        "kernels/test_cross_compile.py::test_every_configuration_compiles_without_spills"
    ),
    "deterministic=True that is not (flash-attention#2244)": (
        "ops/test_attention_regressions.py::test_attention_is_deterministic"
    ),
    "silent fallback (transformers#46960)": (
        "ops/test_attention_dispatch.py::test_explain_gives_every_reason_at_once",
        "ops/test_attention_dispatch.py::test_auto_says_once_that_it_fell_back",
    ),
    "alignment rules for masks": "ops/test_attention_regressions.py::test_attention_mask_of_any_alignment",
    "half-filled tiles with very negative LSE (pytorch#196678)": (
        "ops/test_attention_regressions.py::test_attention_grad_with_a_half_filled_tile_and_very_negative_lse"
    ),
    "a single query with negative LSE (cudnn-frontend#1072)": (
        "ops/test_attention_regressions.py::test_attention_of_a_single_query_with_negative_lse"
    ),
    "zero-length sequences (flash-attention#2568, #2421)": (
        "ops/test_attention_regressions.py::test_attention_of_zero_length"
    ),
    "padding past the last sequence (flash-attention#2324)": (
        "ops/test_attention_regressions.py::test_attention_with_padding_past_the_last_sequence"
    ),
    "offsets above 2^31 (pytorch#190857)": (
        "ops/test_attention_regressions.py::test_attention_offsets_above_two_to_the_31"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_has_its_test(fault):
    places = FAULTS[fault]
    for place in (places,) if isinstance(places, str) else places:
        path, _, name = place.partition("::")
        functions = [n.name for n in ast.walk(ast.parse((TESTS / path).read_text())) if isinstance(n, ast.FunctionDef)]
        assert name in functions, f"{path} has no {name}"
