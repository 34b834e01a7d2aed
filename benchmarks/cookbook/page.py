"""docs/cookbook.md: ``python -m benchmarks cookbook`` writes its examples from the functions that are measured."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from benchmarks.cookbook.examples import EXAMPLES, Example

PAGE = Path(__file__).parents[2] / "docs" / "cookbook.md"
_EXAMPLES = re.compile(r"(<!-- examples -->\n).*(<!-- /examples -->)", re.DOTALL)
_BLOCKS = re.compile(r"```python\n(.*?)```", re.DOTALL)


def code(example: Example) -> str:
    """An example's function and its call, behind the imports and tensors of the page's first block."""
    return f"{inspect.getsource(example.factory)}\n\n{example.call.strip()}\n"


def picture(example: Example) -> str:
    """The picture of a mask, which docs/tools/draw_masks.py draws by running the code above it; of scores none."""
    is_mask = "mask_mod=" in example.call
    return f"\n![who sees whom: {example.title.lower()}](pictures/{example.name}.svg)\n" if is_mask else ""


def written(text: str) -> str:
    """The page with its examples made anew."""
    made = "".join(
        f"\n## {example.title}\n\n{example.otherwise}\n\n```python\n{code(example)}```\n{picture(example)}"
        for example in EXAMPLES
    )
    return _EXAMPLES.sub(lambda found: f"{found[1]}{made}\n{found[2]}", text)


def blocks(text: str) -> list[str]:
    """The code of a page: the first block is what every other one follows."""
    return _BLOCKS.findall(text)


def main() -> int:
    """Write the page."""
    text = PAGE.read_text()
    made = written(text)
    PAGE.write_text(made)
    print(f"{PAGE}: {'as it was' if made == text else 'written anew'}")
    return 0
