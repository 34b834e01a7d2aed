"""The pages are true about what there is: links lead somewhere, and files and names that they speak of exist."""

import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATHS = [*sorted(ROOT.glob("*.md")), ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [path.relative_to(ROOT).as_posix() for path in PATHS]
# A page may leave out the folder in which a package lies.
FOLDERS = (ROOT, ROOT / "fastattn", ROOT / "kernels")
# Folders that commands write into, and pages that a command writes where it is asked to.
WRITTEN = (".venv/", "build/", "dist/", "DIR/", "/tmp/", "docs/kernel_resources_pairs.md")
OF_A_FILE = re.compile(r"[\w.-]+(/[\w.-]+)+/?|[\w-]+\.py")
OF_A_NAME = re.compile(r"(fastattn|fastattn_kernels)(\.\w+)+")


def words(page: str) -> Iterator[str]:
    """The words of all code in a page, in lines and in blocks, without the arguments of a call."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block, line in re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, flags=re.DOTALL):
        yield from (re.sub(r"[(=].*", "", word).rstrip(",:") for word in (block or line).split())


def names_a_file(word: str) -> bool:
    """Whether a word is the path of a file or folder, or a Python file's name, and not of one that is yet to come."""
    return bool(OF_A_FILE.fullmatch(word)) and not word.startswith(WRITTEN)


def is_there(word: str) -> bool:
    """Whether there is such a file. A name without a folder may be in any; one that begins with ``_`` may
    be the end of a name, as ``_errors.py`` is."""
    if "/" in word:
        return any((folder / word).exists() for folder in FOLDERS)
    pattern = f"*{word}" if word.startswith("_") else word
    return any(next((ROOT / top).rglob(pattern), None) for top in ("fastattn", "kernels", "benchmarks", "tests"))


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    assert [word for word in words(page) if names_a_file(word) and not is_there(word)] == []


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_that_a_page_speaks_of_exist(page):
    named = {word for word in words(page) if OF_A_NAME.fullmatch(word)}
    if any(word.startswith("fastattn_kernels") for word in named):
        pytest.importorskip("triton", reason="triton is not installed")
    missing = []
    for word in sorted(named):
        try:
            pkgutil.resolve_name(word)
        except (ImportError, AttributeError):
            missing.append(word)
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
    assert links or page != "README.md"
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("word", "exists"),
    [
        ("fastattn/ops/attention/api.py", True),
        ("ops/attention/api.py", True),
        ("fastattn_kernels/attention/hopper/", True),
        ("launch.py", True),
        ("ops/attention.py", False),
        ("attention_bwd.py", False),
    ],
)
def test_file_that_is_gone_is_missed(word, exists):
    assert names_a_file(word)
    assert is_there(word) == exists
