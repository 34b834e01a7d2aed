"""docs/transformers.md is true: its code runs, and its tables are what the families give."""

import re

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import fastattn
from fastattn.integrations.transformers import Registration
from tests.integrations.transformers import table
from tests.integrations.transformers.families import FAMILIES
from tests.integrations.transformers.harness import model_of, watching

TEXT = table.PAGE.read_text()


def test_code_of_the_page_runs(tmp_path, monkeypatch):
    made = []
    before = Registration.__init__
    monkeypatch.setattr(Registration, "__init__", lambda self, name: (before(self, name), made.append(self))[0])
    model_of("Llama").save_pretrained(tmp_path)
    code = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)[0]  # the next one runs with those of all pages
    assert code.count('"model-folder"') == 1
    space = {}
    try:
        with fastattn.use_backend("torch"), watching() as watch:
            exec(code.replace('"model-folder"', repr(str(tmp_path))), space)
        assert len(watch.calls) == 2 * 8
        with fastattn.use_backend("torch"):
            space["model"].set_attn_implementation("eager")
            expected = space["model"].generate(torch.tensor([[1, 15, 22, 40]]), max_new_tokens=8)
        assert torch.equal(space["tokens"], expected)
    finally:
        made[0].undo()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_row_of_the_page_is_what_the_family_gives(family):
    (found,) = (row for row in table.shown(TEXT, "families") if row["family"] == family.name)
    assert {key: cell for key, cell in found.items() if key not in table.MEASURED} == {
        key: cell for key, cell in table.row(family).items() if key not in table.MEASURED
    }, "`make families` writes the table anew"
    assert all(0.2 < float(found[key]) < 2 for key in table.MEASURED)


def test_page_has_no_other_rows():
    assert [row["family"] for row in table.shown(TEXT, "families")] == [family.name for family in FAMILIES]
    assert table.shown(TEXT, "not reached") == table.not_reached()


def test_tables_are_read_as_they_are_written():
    rows = [{"a": "1", "b": ""}, {"a": "2", "b": "`x`, y"}]
    page = "Before.\n<!-- t -->\nold\n<!-- /t -->\nAfter.\n"
    made = table.written(page, "t", rows)
    assert table.shown(made, "t") == rows
    assert made.startswith("Before.\n") and made.endswith("\nAfter.\n") and "old" not in made
