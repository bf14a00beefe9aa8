"""The report: every number of the rows is on the page, it needs nothing else, results.json has its form."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from merganser.errors import DataError
from merganser.lab.old_report import (
    Report,
    Row,
    Section,
    Table,
    best_scores,
    read_results,
    render_html,
    results_table,
    write_results,
)
from merganser.lab.plots import dot_plot

COLUMNS = {"tweets": "Tweets", "nyt": "NYT editorials"}
ROWS = (
    Row(name="individual: tweets", kind="individual", scores={"tweets": 57.26, "nyt": 41.31}),
    Row(name="individual: nyt", kind="individual", scores={"nyt": 50.04}, note="tested <only> at home"),
    Row(name="Ensemble", kind="ensemble", scores={"tweets": 51.61, "nyt": 48.7}),
    Row(name="Simple", kind="method", scores={"tweets": 47.42, "nyt": 45.93}),
    Row(name="RegMean", kind="method", scores={"tweets": 57.94, "nyt": 44.88}, average=51.41),
)


def report(**changes: object) -> Report:
    section = Section(
        title="How & why",
        paragraphs=("A <paragraph>.",),
        commands=("merganser merge a b -o c",),
        tables=(Table(columns=("Step", "Time"), rows=(("fine-tune", "0:51 min"),), numeric=(1,), code=(0,)),),
    )
    values = {
        "title": "Two & one",
        "columns": COLUMNS,
        "rows": ROWS,
        "metric": "macro-F1 × 100",
        "lead": "Led.",
    }
    return Report(**{**values, "sections": (section,), "footer": "The end.", **changes})  # type: ignore[arg-type]


class Reader(HTMLParser):
    """Collects cells of table rows, tags with attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page_shows_every_number_in_its_place() -> None:
    rows = Reader(render_html(report())).rows
    by_name = {row[0]: row[1:] for row in rows}
    assert by_name["individual: tweets"] == ["57.3", "41.3", "49.3"]
    assert by_name["individual: nyttested <only> at home"] == ["–", "50.0", "50.0"]
    assert by_name["Ensemble"] in (["51.6", "48.7", "50.2"], ["51.6", "48.7", "50.1"])
    assert by_name["Simple"] == ["47.4", "45.9", "46.7"]
    assert by_name["RegMean"] == ["57.9", "44.9", "51.4"]
    assert by_name["fine-tune"] == ["0:51 min"]


def test_text_is_escaped_and_all_of_it_is_there() -> None:
    page = render_html(report())
    for words in (
        "Two &amp; one",
        "How &amp; why",
        "A &lt;paragraph&gt;.",
        "merganser merge a b -o c",
        "Led.",
        "The end.",
    ):
        assert words in page
    assert "<paragraph>" not in page and "<only>" not in page


def test_the_best_merge_of_each_column_is_marked_and_no_specialist() -> None:
    page = render_html(report())
    marked = re.findall(r'class="[^"]*\bbest\b[^"]*">([^<]+)<', page)
    assert marked == ["45.9", "57.9", "51.4"]
    assert best_scores(ROWS, list(COLUMNS)) == {"tweets": 57.94, "nyt": 45.93, "average": 51.41}


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    reader = Reader(render_html(report()))
    assert not reader.open, f"never closed: {reader.open}"
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "image"}
    for name, attributes in reader.tags:
        for key, value in attributes.items():
            if key in ("src", "href", "xlink:href"):
                assert value and value.startswith("#"), f"<{name} {key}={value}>"
    assert "@import" not in render_html(report()) and not re.search(r"url\((?!#)", render_html(report()))


def test_ids_are_unique_and_references_resolve() -> None:
    page = render_html(report())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="|url\()#([^")]+)', page)
    assert references and set(references) <= set(ids)


def test_the_plot_uses_the_pages_colours_names_and_numbers() -> None:
    for wide in (True, False):
        plot = dot_plot(ROWS, COLUMNS, metric="macro-F1 × 100", wide=wide)
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", plot)
        assert {"individual: tweets", "RegMean", "51.4", "NYT editorials", "macro-F1 × 100"} <= set(texts)
        assert set(re.findall(r"#[0-9a-f]{6}", plot)) <= {
            "#000000",
            "#ffffff",
        }  # matplotlib's unused defaults
        assert {"var(--method)", "var(--ensemble)", "var(--individual)"} <= set(
            re.findall(r"var\(--\w+\)", plot)
        )
        assert plot == dot_plot(ROWS, COLUMNS, metric="macro-F1 × 100", wide=wide)


def test_a_row_with_another_score_makes_another_page() -> None:
    changed = (*ROWS[:-1], ROWS[-1].model_copy(update={"average": 33.3}))
    assert "33.3" in render_html(report(rows=changed)) and "33.3" not in render_html(report())


def test_many_columns_and_no_rows_do_not_break_the_page() -> None:
    columns = {f"c{index}": f"Column {index}" for index in range(14)}
    row = Row(name="x", kind="method", scores={name: float(index) for index, name in enumerate(columns)})
    assert "Column 13" in render_html(report(columns=columns, rows=(row,)))
    assert "Two" in render_html(report(rows=()))


def test_results_json(tmp_path: Path) -> None:
    path = write_results(tmp_path / "results.json", ROWS, metric="macro-F1 × 100", seed=1)
    content = json.loads(path.read_text())
    assert set(content) == {"rows", "metric", "seed"}
    assert [set(row) for row in content["rows"]] == [{"name", "kind", "scores", "average"}] * len(ROWS)
    assert {row["kind"] for row in content["rows"]} == {"individual", "ensemble", "method"}
    assert content["rows"][0]["scores"] == {"tweets": 57.26, "nyt": 41.31}
    assert content["rows"][0]["average"] == pytest.approx((57.26 + 41.31) / 2)
    assert [row.model_copy(update={"note": ""}) for row in ROWS] == list(read_results(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"name": "x"}]}', '{"rows": 3}'])
def test_other_files_are_no_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match="not a results file"):
        read_results(tmp_path / "results.json")


def test_the_terminal_table_fits_eighty_columns_and_shows_every_number() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    columns = {name: name for name in (*COLUMNS, "movies", "amazon")}
    longest = Row(name="specialists, each on its own domain", kind="individual", scores={"tweets": 12.34})
    console.print(results_table((*ROWS, longest), columns, metric="macro-F1 × 100"))
    text = console.export_text()
    assert "…" not in text and "own domain" in text
    for number in ("57.3", "41.3", "49.3", "50.0", "51.6", "47.4", "46.7", "57.9", "51.4"):
        assert number in text
