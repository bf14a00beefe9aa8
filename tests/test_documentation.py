"""What the documentation points to is there: files, headings, commands with their options, keys of recipes, imports."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from merganser.cli import cli
from merganser.lab.benchmark.config import MethodsFile
from merganser.merging import Recipe, make_recipe
from merganser.merging.moe.config import make_config

ROOT = Path(__file__).parents[1]
HOME = "https://github.com/merganser/merganser"
PLACES = {"blob": Path.is_file, "tree": Path.is_dir}
PAGES = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "benchmarks/README.md", "results/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCKS = [
    pytest.param(language, text, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (language, text) in enumerate(
        re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    )
]


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


def slugs(page: Path) -> list[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+\.md#[^)]+|#[^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = ROOT / file.removeprefix(f"{HOME}/blob/main/") if "://" in file else page.parent / file
        assert anchor in slugs(target if file else page), link


def code(page: Path) -> Iterator[str]:
    """Lines of code without their comments, and code within sentences."""
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        if fenced or line.startswith("    "):
            yield re.split(r"\s#|\s{3,}", line.strip())[0]
        else:
            yield from re.findall(r"`([^`]+)`", line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for text in code(page):
        for said in re.findall(r"\bmerganser ((?!-)[a-z].*)", text):
            words, command = said.split(), cli
            while isinstance(command, click.Group) and words and re.fullmatch(r"[a-z][a-z|-]*", words[0]):
                names = words.pop(0).split("|")
                found = [command.get_command(click.Context(command), name) for name in names]
                assert None not in found, said
                command = found[0]
            known = {"--help", *(option for parameter in command.params for option in parameter.opts)}
            known |= {option for parameter in command.params for option in parameter.secondary_opts}
            given = re.findall(r"(?<!\S)[\[(]*(--?[a-z][\w-]*)", " ".join(words))
            assert set(given) <= known, said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_their_options_and_targets_of_make_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for text in code(page):
        for file, rest in re.findall(r"\bpython ([\w/]+\.py)(.*)", text):
            script = (ROOT / file).read_text(encoding="utf-8")
            assert all(f'"{option}"' in script for option in re.findall(r"--[a-z][\w-]*", rest)), text
        assert set(re.findall(r"\bmake ([a-z][\w-]*)", text)) <= set(targets), text


@pytest.mark.parametrize(("language", "text"), BLOCKS)
def test_examples_can_be_read(language: str, text: str) -> None:
    """Recipes, mixtures of experts and methods of a benchmark are valid, and what Python imports is there."""
    if language == "yaml":
        values = yaml.safe_load(text)
        if "experts" in values:
            make_config(values)
        elif "methods" in values:
            MethodsFile.model_validate(values)
        else:
            make_recipe({"contributors": ["chat-model", "b"], "method": "simple", **values})
    elif language == "python":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                home = importlib.import_module(node.module)
                for one in node.names:
                    assert hasattr(home, one.name) or importlib.util.find_spec(f"{node.module}.{one.name}"), one.name
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "merganser":
                assert hasattr(importlib.import_module("merganser"), node.attr)
    else:
        raise AssertionError(f"{language} is not checked")


def test_the_page_of_recipes_names_every_key() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    missing = [key for key in Recipe.model_fields if not re.search(rf"\b{key}\b", text)]
    assert not missing


def test_every_command_is_named_somewhere() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [name for name in cli.list_commands(click.Context(cli)) if f"merganser {name}" not in text]
