"""What the site has from outside of docs: a few pages, the examples, the reports of committed runs (an mkdocs hook).

The pages are written to be read in a checkout as well, where a link may lead to any file. On the site such a link
becomes one to the file's copy or, if there is none, the file's path.
"""

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
_logger = logging.getLogger("mkdocs.hooks.site_files")
_RESULTS = "benchmarks/results/"
_NUMBERS = ("results/", "kernel_resources")  # pages of figures, among which a search finds too much
# Of a link or a picture: the text, the target without its anchor, the anchor.
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#:]+)(#[^()\s]*)?\)")


def _added() -> Iterator[tuple[str, str]]:
    """Of each file that the site has from outside of docs: its path in the repository, and on the site."""
    yield "CONTRIBUTING.md", "contributing.md"
    yield "CHANGELOG.md", "changelog.md"
    yield "examples/README.md", "examples/index.md"
    for path in sorted((ROOT / "examples").rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".png":
            yield name, name
        elif path.suffix == ".py":
            yield name, f"{name.removesuffix('.py')}.md"
    for path in sorted((ROOT / _RESULTS).rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in (".md", ".svg") and not name.startswith(f"{_RESULTS}local/"):
            yield name, name.removeprefix("benchmarks/")


def _page_of_code(path: Path) -> str:
    """An example as a page, without a navigation beside it, so that its lines are not cut off."""
    up = posixpath.relpath("examples/index.md", path.relative_to(ROOT).parent.as_posix())
    code = path.read_text(encoding="utf-8")
    return (
        f"---\nhide: [navigation, toc]\n---\n\n# {path.name}\n\n"
        f"One of the [examples]({up}), `{path.relative_to(ROOT).as_posix()}`:\n\n```python\n{code}```\n"
    )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside of docs."""
    for name, on_site in _added():
        path = ROOT / name
        if path.suffix == ".py":
            files.append(File.generated(config, on_site, content=_page_of_code(path)))
        else:
            files.append(File.generated(config, on_site, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links by where a file lies in the repository into links by where it lies on the site."""
    added = dict(_added())
    on_site = page.file.src_uri
    if on_site.startswith(_NUMBERS):
        page.meta["search"] = {"exclude": True}
    in_repository = {to: name for name, to in added.items()}.get(on_site, f"docs/{on_site}")
    if in_repository.endswith(".py"):
        return markdown  # code has no links

    def turned(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        name = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), target))
        path = name.removeprefix("docs/") if name.startswith("docs/") else added.get(name)
        if path is not None:
            return f"[{text}]({posixpath.relpath(path, posixpath.dirname(on_site) or '.')}{anchor})"
        if not (ROOT / name).exists():
            return link[0]  # mkdocs says that it leads nowhere
        return text if text.strip("`") == name else f"{text} (`{name}`)"

    return _LINK.sub(turned, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Say where the page would load something from another host, which fails a strict build."""
    for tag in re.findall(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""", output):
        _logger.warning("%s loads from another host: %s", page.file.src_uri, tag)
    return output
