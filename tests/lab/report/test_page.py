"""The page, the Markdown, the CSV and the command: complete, self-contained, and the same each time."""

import csv
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest
from click.testing import CliRunner

from merganser.cli.report import report_command
from merganser.errors import DataError, FileError, UserError
from merganser.lab.report import write_report
from merganser.lab.report.dots import dot_plot, plot_rows
from merganser.lab.report.grid import make_grids
from merganser.lab.report.layouts import average_over_tests, on_tests
from merganser.lab.report.page import render_page
from merganser.lab.report.rows import ResultRow, read_rows
from merganser.lab.report.sections import Section, duration, make_sections
from merganser.lab.report.tables import Line, Table, TableCell
from merganser.lab.report.text import render_csv, render_markdown


class Reader(HTMLParser):
    """Tags with attributes, table rows, ids; checks that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, examples: ModuleType) -> Path:
    rows = [
        *examples.pairs(seeds=(1, 2), heads=("same", "different")),
        *examples.greedy(seeds=(1, 2)),
        *examples.partitions(seeds=(1,)),
        *examples.glue_pairs(seeds=(1,)),
        *examples.all_at_once(),
    ]
    return examples.write_rows(tmp_path_factory.mktemp("results"), rows)


@pytest.fixture(scope="module")
def sections(results: Path) -> list[Section]:
    return make_sections(read_rows(results), "simple")


@pytest.fixture(scope="module")
def page(sections: list[Section]) -> str:
    return render_page(sections)


def test_the_page_shows_every_number_of_every_table(sections: list[Section], page: str) -> None:
    rows = Reader(page).rows
    shown = Counter(tuple(" ".join(cell.split()) for cell in row) for row in rows)
    for section in sections:
        for block in section.blocks:
            for table in block.tables:
                for line in table.lines:
                    cells = [
                        f"{cell.shown}{cell.stars} {cell.deviation}".strip()
                        + (f" n={cell.n}" if cell.partial and cell.value is not None else "")
                        for cell in line.cells
                    ]
                    assert shown[line.title, *cells] >= 1, (table.key, line.title)


def test_the_page_needs_nothing_and_runs_nothing(page: str) -> None:
    reader = Reader(page)
    assert "://" not in page
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "image", "base", "form"}
    for name, attributes in reader.tags:
        assert not [key for key in attributes if key.startswith("on")], name
        for key in ("src", "href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith("#")
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_anchors_lead_somewhere_and_ids_are_unique(page: str) -> None:
    tags = Reader(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {(attributes.get("href") or "#")[1:] for _, attributes in tags} - {""}
    wanted |= {name[1:] for name in re.findall(r"url\(([^)]*)\)", page)}
    wanted |= {attributes["aria-describedby"] for _, attributes in tags if "aria-describedby" in attributes}
    assert wanted <= set(ids)


def test_every_figure_has_a_caption_and_words_for_those_who_do_not_see_it(page: str) -> None:
    tags = Reader(page).tags
    figures = sum(name == "figure" for name, _ in tags)
    drawings = [attributes for name, attributes in tags if name == "svg"]
    # pairs: two for each of two kinds of heads; GLUE pairs: two; greedy: one; all: two domains; partitions: one
    assert figures == sum(name == "figcaption" for name, _ in tags) == 10
    assert len(drawings) == 2 * figures
    assert all(len(attributes["aria-label"] or "") > 40 for attributes in drawings)


def test_best_and_second_are_marked_as_such(page: str, sections: list[Section]) -> None:
    cells = [
        cell
        for section in sections
        for block in section.blocks
        for table in block.tables
        for line in table.lines
        for cell in line.cells
    ]
    assert page.count('<td class="num best') == sum(cell.mark == "best" for cell in cells) > 0
    assert page.count('<td class="num second') == sum(cell.mark == "second" for cell in cells) > 0


def test_provenance_has_every_cell_and_every_hash(page: str, results: Path) -> None:
    for row in read_rows(results):
        assert f"<code>{row.cell}</code>" in page
        for origin in row.provenance.contributors:
            for full in (origin.zoo, origin.weights, origin.statistics):
                assert full is None or f'title="{full}"' in page
        for full in row.provenance.data.values():
            assert f'title="{full}"' in page


def test_text_from_rows_is_escaped(tmp_path: Path, examples: ModuleType) -> None:
    rows = examples.partitions(seeds=(1,))
    for row in rows:
        row["model"] = "<script>alert(1)</script>"
        row["title"] = f"{row['title']} <b> | a_b & c"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sections = make_sections(read_rows(tmp_path / "rows.json"), "simple")
    page = render_page(sections)
    assert "<script" not in page and "Simple <b>" not in page
    Reader(page)
    markdown = render_markdown(sections)
    assert r"Simple \<b\> \| a_b & c" in markdown
    columns = {line.count("|") - line.count(r"\|") for line in markdown.splitlines() if "| rte |" in line}
    assert len(columns) == 1


def test_the_dot_plot_has_every_line_test_and_average(examples: ModuleType) -> None:
    (grid,), _ = make_grids([ResultRow.model_validate(row) for row in examples.all_at_once()])
    figure = dot_plot(grid, "in", "x", "macro-F1 × 100")
    assert figure is not None
    average = average_over_tests(grid, on_tests(grid, "in"))
    for drawn in (figure.wide, figure.narrow):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
        assert {*examples.EMOTION, "average", "macro-F1 × 100"} <= set(texts)
        assert {f"{name} alone" for name in examples.EMOTION} <= set(texts)
        for method in grid.methods:
            assert {method.title, f"{average[method].value:.1f}"} <= set(texts)
        assert {"var(--s0)", "var(--s1)", "var(--s2)", "var(--ink)", "var(--muted)"} <= set(
            re.findall(r"var\(--\w+\)", drawn)
        )
    assert figure == dot_plot(grid, "in", "x", "macro-F1 × 100")


def test_a_row_without_a_test_is_no_line_of_the_dot_plot(examples: ModuleType) -> None:
    rows = examples.all_at_once()
    for row in rows:
        if row["method"] == "fisher":
            del row["scores"]["tec"]
    (grid,), _ = make_grids([ResultRow.model_validate(row) for row in rows])
    titles = [row.title for row in plot_rows(grid, "in")]
    assert "Fisher" not in titles and "RegMean" in titles


def test_an_introduction_is_on_the_page_and_escaped(
    tmp_path: Path, examples: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(examples.all_at_once()))
    sections = make_sections(read_rows(tmp_path / "rows.json"), "simple")
    table = Table("t", "Counts <of>", "Split", ("Texts",), (Line("train", (TableCell(text="1,234"),)),))
    template = (
        '{% extends "report.html.j2" %}{% from "macros.html.j2" import table_of %}{% set title = name %}'
        "{% block lead %}<p>{{ lead }}</p>{% endblock %}"
        '{% block notes %}<h3>How &amp; why</h3><p>{{ text }}</p>{{ table_of(table, "note") }}{% endblock %}'
    )
    load = jinja2.PackageLoader.get_source

    def get_source(self: jinja2.PackageLoader, environment: jinja2.Environment, name: str) -> Any:
        return (template, None, None) if name == "own.html.j2" else load(self, environment, name)

    monkeypatch.setattr(jinja2.PackageLoader, "get_source", get_source)
    page = render_page(sections, "own.html.j2", name="Two & one", lead="Led.", text="A <paragraph>.", table=table)
    reader = Reader(page)
    for words in ("<h1>Two &amp; one</h1>", "Led.", "How &amp; why", "A &lt;paragraph&gt;.", "Counts &lt;of&gt;"):
        assert words in page
    assert ["train", "1,234"] in reader.rows
    assert page.index("Led.") < page.index("<table") < page.index("How &amp; why") < page.index("Provenance</h3>")


def test_markdown_tables_have_every_number(sections: list[Section]) -> None:
    markdown = render_markdown(sections)
    (pairs,) = [section for section in sections if section.title == "emotion-pairs"]
    summary = pairs.blocks[0].tables[0]
    line = next(line for line in summary.lines if line.title == "RegMean")
    best = line.cells[0]
    assert f"| Merged into one model | RegMean | **{best.shown}**" in markdown
    for table_lines in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        widths = {text.count("|") for text in table_lines.splitlines()}
        assert len(widths) == 1, table_lines


def test_the_csv_has_unrounded_numbers_and_their_cells(sections: list[Section], examples: ModuleType) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(sections))))
    (found,) = [
        row
        for row in rows
        if (row["experiment"], row["table"], row["row"], row["column"])
        == ("emotion-greedy", "greedy-in", "RegMean", "4")
    ]
    raw = [r for r in examples.greedy(seeds=(1, 2)) if r["title"] == "RegMean" and len(r["contributors"]) == 4]
    assert float(found["mean"]) == pytest.approx(50 * sum(r["average"]["in"] for r in raw), rel=1e-12)
    assert sorted(found["cells"].split()) == sorted(r["cell"] for r in raw)
    assert (found["units"], found["seeds"], found["mark"]) == ("2", "2", "best")


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, examples: ModuleType) -> None:
    rows = examples.pairs(seeds=(1, 2), heads=("same",))
    pages = []
    for name, listed in (("a.json", rows), ("b.json", rows[::-1])):
        (tmp_path / name).write_text(json.dumps(listed))
        sections = make_sections(read_rows(tmp_path / name), "simple")
        pages.append((render_page(sections), render_markdown(sections), render_csv(sections)))
    assert pages[0] == pages[1]


def test_an_incomplete_grid_is_the_first_thing_said(tmp_path: Path, examples: ModuleType) -> None:
    rows = [r for r in examples.greedy(seeds=(1, 2)) if not (r["title"] == "Fisher" and r["seed"] == 2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    page = render_page(make_sections(read_rows(tmp_path / "rows.json"), "simple"))
    assert page.index("Not complete.") < page.index("<table")
    assert "Fisher has 4 of 8 cells" in page


def test_the_command_writes_and_prints(results: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / "new" / name for name in ("report.html", "tables.md", "numbers.csv")]
    arguments = [str(results / "emotion-greedy"), "-o", str(outputs[0])]
    arguments += ["--markdown", str(outputs[1]), "--csv", str(outputs[2])]
    done = CliRunner().invoke(report_command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-3:] == [str(path) for path in outputs]
    assert "RegMean" in done.stdout and "Out-of-domain" in done.stdout
    assert outputs[0].read_text().startswith("<!doctype html>")
    assert outputs[1].read_text().startswith("# emotion-greedy")
    assert outputs[2].read_text().startswith("experiment,")
    assert {path.name for path in outputs[0].parent.iterdir()} == {path.name for path in outputs}
    before = [path.read_bytes() for path in outputs]
    with pytest.raises(FileError, match=r"numbers.csv: the output exists"):
        CliRunner().invoke(report_command, arguments, catch_exceptions=False)
    assert CliRunner().invoke(report_command, [*arguments, "--overwrite"], catch_exceptions=False).exit_code == 0
    assert [path.read_bytes() for path in outputs] == before


FORMS = {"html": "p.html", "markdown": "t.md", "latex": "t.tex", "csv": "n.csv", "rows": "r.jsonl"}


def test_nothing_but_an_earlier_report_is_replaced(tmp_path: Path, examples: ModuleType) -> None:
    folder = examples.write_rows(tmp_path / "results", examples.partitions(seeds=(1,)))
    for form, name in FORMS.items():
        path = tmp_path / name
        for text in ("my,thesis\n", "", '{"text": "my thesis"}\n'):
            if form == "rows" and not text:
                continue  # an empty file is one without rows
            path.write_text(text)
            with pytest.raises(FileError, match="is not replaced"):
                write_report(folder, {form: path}, overwrite=True)
            assert path.read_text() == text
        path.write_bytes(b"\xff\x00")
        with pytest.raises(FileError, match="is not replaced"):
            write_report(folder, {form: path}, overwrite=True)
        path.unlink()
        write_report(folder, {form: path})
        first = path.read_bytes()
        if form in ("csv", "rows"):
            with pytest.raises(FileError, match="the output exists"):
                write_report(folder, {form: path})
        write_report(folder, {form: path}, overwrite=form in ("csv", "rows"))
        assert path.read_bytes() == first
        if form not in ("csv", "rows"):
            path.write_bytes(first.replace(b"RegMean", b"My method", 1))
            with pytest.raises(FileError, match="was edited since"):
                write_report(folder, {form: path}, overwrite=True)


def test_all_outputs_of_a_report_are_checked_before_the_first_is_written(tmp_path: Path, examples: ModuleType) -> None:
    rows = tmp_path / "results" / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("".join(json.dumps(row) + "\n" for row in examples.partitions(seeds=(1,))))
    kept = rows.read_bytes()
    (tmp_path / "thesis.tex").write_text("mine")
    for wrong in (
        {"html": tmp_path / "a.html", "latex": tmp_path / "thesis.tex"},
        {"html": tmp_path / "a.html", "rows": rows},
        {"html": tmp_path / "a.html", "csv": tmp_path / "x" / ".." / "a.html"},
        {"html": tmp_path / "a.html", "csv": rows / "numbers.csv"},
    ):
        for results in (rows, rows.parent):
            with pytest.raises(UserError):
                write_report(results, wrong, overwrite=True)
            assert not (tmp_path / "a.html").exists() and rows.read_bytes() == kept


def test_where_the_report_goes_by_default_and_by_ending(results: Path, tmp_path: Path, examples: ModuleType) -> None:
    folder = examples.write_rows(tmp_path / "results", examples.partitions(seeds=(1,)))
    CliRunner().invoke(report_command, [str(folder)], catch_exceptions=False)
    assert (folder / "report.html").is_file()
    done = CliRunner().invoke(report_command, [str(folder), "-o", str(tmp_path / "t.md")], catch_exceptions=False)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "t.md")
    with pytest.raises(UserError, match=r"\.html, \.md, \.tex, \.csv or \.jsonl"):
        CliRunner().invoke(report_command, [str(folder), "-o", "x.pdf"], catch_exceptions=False)
    with pytest.raises(DataError, match="no such file"):
        CliRunner().invoke(report_command, [str(tmp_path / "absent")], catch_exceptions=False)


def test_durations() -> None:
    assert [duration(s) for s in (3.2, 61.0, 150, 60 * 125)] == ["3.2 s", "61 s", "2 min", "2 h 05 min"]
