"""Tables of the documentation that say what the code says of itself: methods, and what ``auto`` chooses.

After a change that is meant, write them anew: PYTHONPATH=tests python tests/methods/test_documented.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from merganser.methods import METHODS
from merganser.methods.auto import markdown_table
from merganser.methods.description import describe

DOCS = Path(__file__).resolve().parents[2] / "docs"


def table() -> str:
    """All methods as Markdown."""
    lines = ["| `--method` | formula | needs | options (default) | reference |", "|---|---|---|---|---|"]
    for method in METHODS.values():
        found = describe(method)
        options = ", ".join(f"`{one.name}` ({json.dumps(one.default)})" for one in found.options)
        cells = [f"`{found.name}`", found.formula, "; ".join(found.needs), options, found.reference]
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


#: Page → what its table is called in the comments around it, and what makes it.
TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "methods.md": ("methods", table),
    "choosing.md": ("choices", markdown_table),
}


def parts(page: str) -> tuple[str, str, str]:
    """The page before the table, the table, and the page behind it, comments included."""
    name = TABLES[page][0]
    start, end = f"<!-- {name}: written by tests/methods/test_documented.py -->\n", f"<!-- end of {name} -->\n"
    before, rest = (DOCS / page).read_text(encoding="utf-8").split(start)
    found, after = rest.split(end)
    return before + start, found, end + after


@pytest.mark.parametrize("page", TABLES)
def test_the_table_is_up_to_date(page: str) -> None:
    assert parts(page)[1] == TABLES[page][1]()


@pytest.mark.parametrize("name", METHODS)
def test_a_page_of_its_family_explains_it(name: str) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "methods").glob("*.md")))
    assert f"`{name}`" in pages


if __name__ == "__main__":
    for page, (_, make) in TABLES.items():
        before, _, after = parts(page)
        (DOCS / page).write_text(before + make() + after, encoding="utf-8")
