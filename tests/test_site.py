"""The site's pages and the README: their code runs, their commands exist, and what is said about messages is true."""

import ast
import contextlib
import doctest
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastattn
from fastattn import distributed

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [path.relative_to(ROOT).as_posix() for path in PATHS]
# Of a block: why it is not run, its language, its text.
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
PRINTS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: str) -> list[re.Match[str]]:
    return list(BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")))


# ------------------------------------------------------------------------------------------------------- code, commands


@pytest.mark.parametrize("page", [page for page in PAGES if any(b["language"] == "python" for b in blocks(page))])
def test_code_of_a_page_runs(page):
    """One block after the other, as a reader would type them; a block of text is what the code before it printed."""
    space, printed = {}, ""
    with fastattn.use_backend("torch"):
        for block in blocks(page):
            if block["language"] == "python" and not block["why"]:
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    exec(compile(block["text"], page, "exec"), space)
                printed = said.getvalue()
            elif block["language"] == "text":
                assert doctest.OutputChecker().check_output(block["text"], printed, PRINTS), printed


def test_few_blocks_are_not_run_and_they_say_why():
    reasons = [block["why"] for page in PAGES for block in blocks(page) if block["why"]]
    assert all(len(reason) > 10 for reason in reasons)
    assert len(reasons) <= 3


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist(page):
    """The targets of make, and the modules that Python runs."""
    text = (ROOT / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"`([^`\n]+)`", text) + [b["text"] for b in blocks(page) if not b["language"]])
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|[ ;&])make ([a-z][a-z-]*)", code, re.M)) <= targets
    for module in set(re.findall(r"python3? -m ([\w.]+)", code)):
        assert importlib.util.find_spec(module), module


def test_every_page_is_in_the_navigation():
    named = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in PATHS[2:]]
    assert sorted(named) == sorted([*pages, "contributing.md", "changelog.md", "examples/index.md"])


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md")))
    names = {f"{module.__name__}.{name}" for module in (fastattn, distributed) for name in module.__all__}
    assert names <= set(re.findall(r"^::: (\S+)$", text, re.M))


def test_results_of_public_names_are_no_types():
    """mkdocstrings takes what stands before a colon in the first line of ``Returns:`` for the type of the result."""
    public = [getattr(fastattn, name) for name in fastattn.__all__]
    methods = [m for of in public if isinstance(of, type) for name, m in vars(of).items() if not name.startswith("_")]
    found = [line for of in (*public, *methods) for line in re.findall(r"Returns:\n *(.+)", of.__doc__ or "")]
    assert len(found) > 15
    assert [line for line in found if ":" in re.sub(r":\w+:`", "`", line)] == []


# ------------------------------------------------------------------------------------------------------------- pictures


def drawn_by(tool: str, folder: Path) -> dict[str, str]:
    """The pictures that a script of docs/tools draws, by their names."""
    spec = importlib.util.spec_from_file_location(tool, ROOT / "docs" / "tools" / f"{tool}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {path.name: path.read_text() for path in module.write(folder)}


def test_pictures_are_those_of_their_code(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = drawn_by("draw_masks", tmp_path) | drawn_by("draw_methods", tmp_path)
    committed = {path.name: path.read_text() for path in (ROOT / "docs" / "pictures").iterdir()}
    assert drawn.keys() == committed.keys()
    assert drawn == committed, "`python docs/tools/draw_masks.py` or `draw_methods.py` draws them anew"


# ------------------------------------------------------------------------------------------------------------- messages

# What raises for whoever writes an operator, or is caught by whoever calls it.
INTERNAL = ("ops/common/operator.py", "ops/common/row_operator.py", "ops/common/short_way.py")
# Messages of which nothing but the filled-in parts tells one from another; the page describes them.
GENERAL = ("{}: expected {}", "{}={}: expected {} {}", "{} has shape {}: expected {}")


def template(node: ast.expr) -> str | None:
    """A message of the source with ``{}`` for what is filled in; None where the node is no text."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "fastattn").rglob("*.py")):
        yield path.relative_to(ROOT / "fastattn").as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def messages_of_the_page() -> dict[str, re.Pattern[str]]:
    """As they stand there, and as patterns that hold wherever the page has ``...``."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    text = text[text.index("## Tensors that do not fit") :]
    found = re.findall(r"^\| `([^`]+)`", text, re.M)
    return {said: re.compile(".*".join(re.escape(part) for part in said.split("..."))) for said in found}


def test_messages_of_the_page_are_those_of_the_source():
    texts = [said for _, tree in parsed() for node in ast.walk(tree) if isinstance(node, ast.expr)
             and (said := template(node)) is not None]  # fmt: skip
    assert [said for said, form in messages_of_the_page().items() if not any(map(form.match, texts))] == []


def test_page_has_every_message_that_the_package_raises():
    forms, missing = messages_of_the_page().values(), []
    for name, tree in parsed():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                said = template(node.exc.args[0])
                if said is None or said in GENERAL or name in INTERNAL:
                    continue
                if not any(form.match(said) for form in forms):
                    missing.append(f"{name}:{node.lineno}: {said}")
    assert missing == []


# -------------------------------------------------------------------------------------------------------------- lecture


def test_every_system_of_the_lecture_has_code_test_and_picture():
    text = (ROOT / "docs" / "lecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (S\d+) \| (.+\.svg\).+) \|$", text, flags=re.MULTILINE)
    assert [name for name, _ in rows] == [f"S{i}" for i in range(1, 11)]
    for name, row in rows:
        _, picture, code, test = row.split(" | ")
        assert ".py)" in code and "tests/" in test and "results/" in picture, name
