"""What the documentation points to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOME = "https://github.com/merganser/merganser"
PLACES = {"blob": Path.is_file, "tree": Path.is_dir}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_each_of_the_nine_mistakes_names_its_tests() -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d)\. .* \| (.*) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 10))
    for _, tests in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", tests)
        assert named
        for file, function in named:
            assert not function or f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), (file, function)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    own = [match for link in links if (match := re.fullmatch(rf"{HOME}/(blob|tree)/main/(.+)", link))]
    missing += [match[0] for match in own if not PLACES[match[1]](ROOT / match[2])]
    assert not missing


def test_the_readme_has_absolute_links_for_the_package_index() -> None:
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10 and all("://" in link for link in links)
    assert HOME in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
