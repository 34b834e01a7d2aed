"""The family of transformers' models: its inputs, that the variants agree, and that a wrong model has no speed."""

import dataclasses

import pytest
import torch

import fastattn
from benchmarks.families import all_cases, families, quick_cases
from benchmarks.run_case import run_case
from benchmarks.variants import Variant

pytest.importorskip("transformers", reason="transformers is not installed")

from benchmarks.families import hugging_face

CASE = hugging_face.ModelCase("hugging_face", "llama")


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


def statuses(family, case):
    return {row.variant: row.status for row in run_case(family, case.tiny(), seconds=0.0)}


@pytest.mark.parametrize("backward", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("model", ["llama", "t5", "clip"])
def test_variants_agree_with_float64(model, backward):
    case = dataclasses.replace(CASE, model=model, backward=backward)
    assert statuses(hugging_face.FAMILY, case) == dict.fromkeys(("fastattn", "sdpa", "eager"), "ok")


@pytest.mark.parametrize("model", ["gemma2", "gpt_oss"])
def test_sdpa_is_left_out_where_it_computes_something_else(model):
    found = statuses(hugging_face.FAMILY, dataclasses.replace(CASE, model=model))
    assert found == {"fastattn": "ok", "sdpa": "refused", "eager": "ok"}


def test_gate_stops_a_model_that_ignores_its_mask():
    right = hugging_face.FAMILY.variant("fastattn")

    def build(case, dtype):
        return right.build(dataclasses.replace(case, padded=False), dtype)

    family = dataclasses.replace(hugging_face.FAMILY, variants=(right, Variant("off", build)), peer="fastattn")
    assert statuses(family, CASE) == {"fastattn": "ok", "off": "wrong"}


def test_dropout_is_off_and_padding_is_where_it_is_said():
    case = dataclasses.replace(CASE.tiny(), model="bert", backward=True)
    model = hugging_face._model(case, "fastattn", torch.float32)
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    inputs = hugging_face._inputs(CASE, torch.float32)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [256, 256 - hugging_face.PADDING]
    assert set(hugging_face._inputs(dataclasses.replace(CASE, padded=False), torch.float32)) == {"input_ids", "labels"}


def test_family_is_registered_and_not_quick():
    assert families()["hugging_face"] is hugging_face.FAMILY
    assert not any(case.family == "hugging_face" for case in quick_cases())
    mine = [case for case in all_cases() if isinstance(case, hugging_face.ModelCase)]
    assert len(mine) == 2 * len(hugging_face.models(64)) + 2 == len({case.name for case in mine})
