"""The table in docs/methods.md says what the methods say of themselves. After a change that is meant, write it anew:

PYTHONPATH=tests python tests/methods/test_documented.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merganser.methods import METHODS
from merganser.methods.description import describe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
START, END = "<!-- methods: written by tests/methods/test_documented.py -->\n", "<!-- end of methods -->\n"


def table() -> str:
    """All methods as Markdown."""
    lines = ["| `--method` | formula | needs | options (default) | reference |", "|---|---|---|---|---|"]
    for method in METHODS.values():
        found = describe(method)
        options = ", ".join(f"`{one.name}` ({json.dumps(one.default)})" for one in found.options)
        cells = [f"`{found.name}`", found.formula, "; ".join(found.needs), options, found.reference]
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def parts() -> tuple[str, str, str]:
    """The page before the table, the table, and the page behind it."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    found, after = rest.split(END)
    return before, found, after


def test_the_table_is_up_to_date() -> None:
    assert parts()[1] == table()


@pytest.mark.parametrize("name", METHODS)
def test_a_page_of_its_family_explains_it(name: str) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted(PAGE.with_suffix("").glob("*.md")))
    assert f"`{name}`" in pages


if __name__ == "__main__":
    before, _, after = parts()
    PAGE.write_text(f"{before}{START}{table()}{END}{after}", encoding="utf-8")
