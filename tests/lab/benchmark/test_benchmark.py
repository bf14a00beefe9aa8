"""A whole tiny benchmark: both stages, the choice between them, going on where it was stopped, its page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from lab.grid.conftest import write_suite
from lab.report.conftest import examples as examples
from merganser.cli import cli
from merganser.engines import Job, Outcome, SerialEngine
from merganser.errors import Problems, UserError
from merganser.lab.benchmark.board import read_board
from merganser.lab.benchmark.choice import CandidateFigures, Choice, ChosenMethod, read_choice, write_choice
from merganser.lab.benchmark.config import METHODS_FILE, Benchmark, Entry, load_benchmark, read_methods, situation_of
from merganser.lab.benchmark.page import lead, write_leaderboard
from merganser.lab.benchmark.run import run_benchmark
from merganser.lab.benchmark.tables import board_tables
from merganser.lab.grid.cells import expand
from merganser.lab.grid.config import ModelArgs
from merganser.lab.report.rows import read_rows
from merganser.methods import METHODS
from merganser.methods.auto import Published, Situation, Tasks, choose

METHODS_TEXT = {
    "methods": [
        "simple",
        {"method": "task_arithmetic", "grid": {"scale": [0.4, 1.0]}},
        {"method": "regmean", "family": "ours", "grid": [{}, {"alpha": 1.0}]},
        "slerp",
    ]
}
Make = Callable[..., Benchmark]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pretrained: Callable[..., Path]) -> Path:
    """Two suites of tiny corpora, a file of methods, and a zoo that all tests of this file fill."""
    folder = tmp_path_factory.mktemp("benchmark")
    root = write_suite(folder / "emotion_splits")
    values: dict[str, Any] = {
        "suite": {"name": "emotion", "root": str(root)},
        "pretrained": {"model": "{base}", "title": "tiny"},
        "training": {"epochs": 2, "learning_rate": 5e-3, "max_length": 16},
        "statistics": {"examples": 16, "fisher_examples": 8},
        "layout": "all",
        "seeds": [1, 2],
    }
    first = {**values, "name": "first", "contributors": ["one", "two"], "tests": {"out_of_domain": ["far"]}}
    second = {**values, "name": "second", "contributors": ["one", "two", "three"], "seeds": [1]}
    for name, content in (("first", first), ("second", second), ("methods", METHODS_TEXT)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (folder / "base.txt").write_text(str(pretrained("distilbert")))
    return folder


@pytest.fixture(scope="module")
def make(place: Path) -> Make:
    """The benchmark of the two suites."""

    def load(**changes: Any) -> Benchmark:
        files = [place / "first.yaml", place / "second.yaml"]
        options = {"templates": {"base": (place / "base.txt").read_text()}, **changes}
        return load_benchmark(files, [place / "methods.yaml"], **options)

    return load


@pytest.fixture(scope="module")
def done(make: Make, place: Path) -> Path:
    """Results of a whole benchmark."""
    result = run_benchmark(make(), results=place / "results", zoo=place / "zoo")
    assert result.failures == () and result.done == result.cells
    return place / "results"


class Stopping(SerialEngine):
    """Dies after some jobs, as a killed process does."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def run(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
        for outcome in super().run(jobs, function):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield outcome


def test_candidates_are_scored_on_development_data_alone_and_the_chosen_on_tests(done: Path) -> None:
    dev, test, choice = read_rows(done / "dev"), read_rows(done / "test"), read_choice(done)
    assert {row.split for row in dev} == {"dev"} and {row.split for row in test} == {"test"}
    assert all(name.endswith("[dev]") for row in dev for name in row.provenance.data)
    assert all(score.domain == "in" for row in dev for score in row.scores.values())
    assert {row.seed for row in dev} == {1} and {row.seed for row in test if row.experiment == "first"} == {1, 2}
    # A method with one candidate has nothing to choose.
    candidates = {c.name for method in choice.methods for c in method.candidates if len(method.candidates) > 1}
    assert {row.method for row in dev if row.kind == "merge"} == candidates
    chosen = {method.chosen.name for method in choice.methods}
    assert {row.method for row in test if row.kind == "merge"} == chosen
    # SLERP merges two models, and so is of the first suite alone.
    assert {row.experiment for row in test if row.method == "SLERP"} == {"first"}


def test_the_choice_is_that_of_the_rows(done: Path) -> None:
    """The best mean over suites of merged / individual, by numpy."""
    dev, choice = read_rows(done / "dev"), read_choice(done)

    def mean(suite: str, method: str) -> float:
        found = [
            s.value for row in dev if row.experiment == suite and row.method == method for s in row.scores.values()
        ]
        return float(np.mean(np.array(found, np.float64)))

    single = [method for method in choice.methods if len(method.candidates) == 1]
    assert [method.method for method in single] == ["simple", "slerp"]
    assert all(method.chosen.recovery == {} and method.chosen.mean is None for method in single)
    for method in (method for method in choice.methods if method not in single):
        for candidate in method.candidates:
            shares = {name: mean(name, candidate.name) / mean(name, "individual") for name in ("first", "second")}
            assert candidate.recovery == pytest.approx(shares)
            assert candidate.mean == pytest.approx(np.mean(list(shares.values())))
        assert method.chosen.mean == max(candidate.mean or 0 for candidate in method.candidates)
    regmean = next(method for method in choice.methods if method.method == "regmean")
    assert regmean.family == "ours" and regmean.statistics == "gram" and not regmean.base


def test_the_best_on_tests_is_not_what_is_chosen(done: Path, make: Make, tmp_path: Path) -> None:
    """Development data say one thing and tests the other: development data decide."""
    place = make_liars(done, tmp_path)
    chosen = run_benchmark(make(), results=place, zoo=done.parent / "zoo").choice
    task = next(method for method in chosen.methods if method.method == "task_arithmetic")
    assert task.chosen.options == {"scale": 1.0}


def make_liars(done: Path, tmp_path: Path) -> Path:
    """A copy of results in which scale 1.0 is perfect on development data and useless on tests."""
    for file in done.rglob("cells/*.json"):
        row = json.loads(file.read_text())
        if row["method"].startswith("Task arithmetic"):
            good = row["method"].endswith("(scale 1.0)") == (row["split"] == "dev")
            for score in row["scores"].values():
                score["value"] = float(good)
        copy = tmp_path / "liars" / file.relative_to(done)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(row))
    for file in done.rglob("experiment.json"):
        (tmp_path / "liars" / file.relative_to(done)).write_text(file.read_text())
    return tmp_path / "liars"


def test_killed_it_goes_on_to_the_same_rows(done: Path, make: Make, tmp_path: Path) -> None:
    for after in (3, 12):
        with pytest.raises(KeyboardInterrupt):
            run_benchmark(make(), results=tmp_path, zoo=done.parent / "zoo", engine=Stopping(after))
    run_benchmark(make(), results=tmp_path, zoo=done.parent / "zoo")
    for stage in ("dev", "test"):
        one, other = ({row.cell: row.scores for row in read_rows(folder / stage)} for folder in (done, tmp_path))
        assert one == other
    assert (tmp_path / "choice.json").read_text() == (done / "choice.json").read_text()
    assert run_benchmark(make(), results=tmp_path, zoo=done.parent / "zoo").done == 0


def test_methods_come_one_after_the_other(done: Path, make: Make, tmp_path: Path) -> None:
    zoo = done.parent / "zoo"
    first = run_benchmark(make(only=["simple", "SLERP"], seeds=[1]), results=tmp_path, zoo=zoo)
    assert [method.method for method in first.choice.methods] == ["simple", "slerp"]
    second = run_benchmark(make(only=["task_arithmetic"]), results=tmp_path, zoo=zoo)
    assert [method.method for method in second.choice.methods] == ["simple", "task_arithmetic", "slerp"]
    # Two candidates on two suites, beside two and three models; the chosen one on both, with two seeds of the first,
    # whose models are new.
    assert second.done == 2 * 2 + (2 + 3) + (2 + 1) + 2
    assert len(read_board(tmp_path).methods) == 3


def test_rows_say_what_a_merge_costs(done: Path) -> None:
    for row in read_rows(done / "test"):
        assert (row.merged is not None) == (row.kind == "merge")
        if row.merged is None:
            continue
        known = METHODS[row.merged.method]
        assert set(row.merged.options) == set(known.options_type.model_fields)
        assert 0 < row.merged.seconds < row.provenance.seconds
        assert row.merged.base == known.needs.base and row.merged.statistics == known.needs.statistics
        sizes = row.merged.statistics_bytes
        assert len(sizes) == len(row.contributors)
        if row.merged.method == "regmean":
            files = {f.stat().st_size for f in (done.parent / "zoo").rglob("statistics/gram-*.safetensors")}
            assert set(sizes) <= files
        else:
            assert set(sizes) == {0}


def test_the_page_has_every_number_of_the_rows(done: Path, tmp_path: Path) -> None:
    outputs = {"html": tmp_path / "page.html", "markdown": tmp_path / "page.md", "rows": tmp_path / "rows.jsonl"}
    write_leaderboard(done, outputs)
    page, text = re.sub("<[^>]+>", " ", outputs["html"].read_text()), outputs["markdown"].read_text()
    board = read_board(done)
    ids = re.findall(r'\bid="([^"]+)"', outputs["html"].read_text())
    assert len(set(ids)) == len(ids)
    for row in board.rows:
        assert row.cell in page
        assert all(f"{100 * (score.value or 0):.1f}" in page for score in row.scores.values())
    for standing in board.order:
        numbers = [*standing.scores.values(), *(100 * share for share in standing.recoveries.values())]
        assert all(f"{number:.1f}" in page and f"{number:.1f}" in text for number in numbers)
    for method in read_choice(done).methods:
        for candidate in method.candidates:
            mean = "–" if candidate.mean is None else f"{100 * candidate.mean:.1f}"
            assert mean in page and mean in text
    assert read_rows(outputs["rows"]) == board.rows
    # The published form, rows.jsonl of each stage, gives the same page.
    published = tmp_path / "published"
    for stage in ("dev", "test"):
        (published / stage).mkdir(parents=True)
        (published / stage / "rows.jsonl").write_text(
            "".join(json.dumps(json.loads(f.read_text())) + "\n" for f in sorted((done / stage).rglob("cells/*.json")))
        )
    (published / "choice.json").write_text((done / "choice.json").read_text())
    write_leaderboard(published, {"markdown": tmp_path / "again.md"})
    assert (tmp_path / "again.md").read_text() == outputs["markdown"].read_text()
    # Rows of a version that knew another method are shown, too.
    choice = (published / "choice.json").read_text()
    (published / "choice.json").write_text(choice.replace('"method": "regmean"', '"method": "unheard_of"'))
    write_leaderboard(published, {"markdown": tmp_path / "other.md"})
    assert "not known here" in (tmp_path / "other.md").read_text()


def test_the_main_table_by_hand(done: Path) -> None:
    rows, tables = read_rows(done / "test"), {table.key: table for table in board_tables(read_board(done))}
    line = next(line for line in tables["leaderboard"].lines if line.title == "RegMean")
    assert [cell.shown for cell in line.cells[:2]] == ["ours", "Gram matrices"]
    means = []
    for suite in ("first", "second"):
        found = [
            s.value for row in rows if row.experiment == suite and row.method.startswith("RegMean")
            for s in row.scores.values() if s.domain == "in"
        ]  # fmt: skip
        means.append(100 * float(np.mean(np.array(found, np.float64))))
    assert [cell.value for cell in line.cells[2:5]] == pytest.approx([*means, np.mean(means)])


def test_the_command_line(done: Path, place: Path, tmp_path: Path) -> None:
    words = ["benchmark", *(str(place / f"{name}.yaml") for name in ("first", "second"))]
    words += ["--methods", str(place / "methods.yaml"), "--templates", f"base={(place / 'base.txt').read_text()}"]
    words += ["--zoo", str(place / "zoo"), "--results", str(done)]
    dry = CliRunner().invoke(cli, [*words, "--dry-run", "--json"], catch_exceptions=False)
    stages = json.loads(dry.stdout)["stages"]
    assert list(stages) == ["first (dev)", "second (dev)", "first (test)", "second (test)"]
    assert all(stage["cells"]["all"] == stage["cells"]["there"] > 0 for stage in stages.values())
    shown = CliRunner().invoke(cli, [*words, "--dry-run"], catch_exceptions=False)
    assert shown.exit_code == 0 and "first (dev)" in shown.stdout
    ran = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert ran.exit_code == 0 and "RegMean" in ran.stdout and "0 cells done" in ran.stderr
    page = tmp_path / "page.html"
    report = CliRunner().invoke(cli, ["report", str(done), "-o", str(page)], catch_exceptions=False)
    assert report.exit_code == 0 and "Leaderboard" in page.read_text()
    wrong = CliRunner().invoke(cli, ["report", str(done), "-o", str(tmp_path / "page.tex")])
    assert isinstance(wrong.exception, UserError) and not (tmp_path / "page.tex").exists()


def test_mistakes_are_found_before_work_all_at_once(place: Path, make: Make, tmp_path: Path) -> None:
    base = {"base": (place / "base.txt").read_text()}
    with pytest.raises(UserError, match="did you mean 'ties'"):
        load_benchmark([place / "first.yaml"], [write(tmp_path, [{"method": "tise"}])], templates=base)
    with pytest.raises(UserError, match="denstiy"):
        load_benchmark([place / "first.yaml"], [write(tmp_path, [{"method": "ties", "grid": {"denstiy": [1]}}])])
    with pytest.raises(UserError, match="'Ensemble' is what tables call a comparator"):
        load_benchmark([place / "first.yaml"], [write(tmp_path, [{"method": "simple", "title": "Ensemble"}])])
    with pytest.raises(UserError, match="two methods are called 'Simple'"):
        load_benchmark([place / "first.yaml"], [write(tmp_path, ["simple", "simple"])], templates=base)
    with pytest.raises(UserError, match="applies to any"):
        load_benchmark([place / "second.yaml"], [write(tmp_path, ["slerp"])], templates=base)
    with pytest.raises(UserError, match="no suite has"):
        make(templates={**base, "bsae": "x"})
    with pytest.raises(UserError, match="none of the seeds 7"):
        make(seeds=[7])
    with pytest.raises(UserError, match="did you mean 'simple'"):
        make(only=["simpel"])
    for name in ("first", "second"):
        values = yaml.safe_load((place / f"{name}.yaml").read_text())
        values["suite"]["root"] = str(tmp_path / f"nowhere-{name}")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    lost = load_benchmark([tmp_path / "first.yaml", tmp_path / "second.yaml"], ["leaderboard/methods"], templates=base)
    with pytest.raises(Problems, match="nowhere-second") as caught:
        run_benchmark(lost, results=tmp_path / "r", zoo=tmp_path / "z")
    assert len(caught.value.problems) == 2 and not (tmp_path / "r").exists()


def write(folder: Path, methods: list[Any]) -> Path:
    (folder / "wrong.yaml").write_text(yaml.safe_dump({"methods": methods}))
    return folder / "wrong.yaml"


def test_the_methods_that_come_with_merganser_have_their_published_defaults_among_their_candidates() -> None:
    entries = read_methods(METHODS_FILE)
    assert len({entry.title for entry in entries}) == len(entries) >= 20
    for entry in (entry for entry in entries if entry.method != "auto"):
        kind = METHODS[entry.method].options_type
        tried = [one.options for other in entries if other.method == entry.method for one in other.candidates]
        assert kind() in [kind(**options) for options in tried], entry.title
        assert len(entry.candidates) <= 5


def test_candidates_that_mean_the_same_are_one() -> None:
    entry = Entry.model_validate({"method": "ties", "grid": [{}, {"density": [0.2, 0.5], "scale": 1}, {"scale": 1.0}]})
    assert [candidate.title for candidate in entry.candidates] == ["TIES", "TIES (density 0.5, scale 1)"]


def test_every_layout_has_its_place_on_the_page(examples: ModuleType, tmp_path: Path) -> None:
    """Pairs of two kinds of heads, greedy sequences, parts, separate heads, all at once."""
    rows = [*examples.pairs(seeds=(1,)), *examples.greedy((1,)), *examples.partitions(), *examples.all_at_once()]
    rows += [row for row in examples.glue_pairs() if row["chosen"] is None]
    examples.write_rows(tmp_path / "test", rows)
    experiments = tuple(sorted({row["experiment"] for row in rows}))
    methods = tuple(
        ChosenMethod(
            title=title, method=name, family="published", base=False, statistics=METHODS[name].needs.statistics, best=0,
            candidates=(CandidateFigures(name=name, options={}, recovery={}, mean=None),),
        )
        for name, title in examples.MERGES.items()
    )  # fmt: skip
    write_choice(Choice(suites=experiments, seeds={}, methods=methods), tmp_path)
    board = read_board(tmp_path)
    names = [suite.name for suite in board.inside]
    assert names == [
        "emotion-all", "emotion-greedy", "emotion-pairs, same heads", "emotion-pairs, different heads", "glue-pairs",
        "glue-partitions",
    ]  # fmt: skip
    assert [suite.name for suite in board.outside] == names[:4]
    # By hand: a pair's tests each by the model whose own test it is.
    own = [row for row in rows if row["experiment"] == "glue-pairs"]
    alone = {(r["contributors"][0], r["seed"]): r["scores"] for r in own if r["kind"] == "individual"}
    merged = [row for row in own if row["method"] == "fisher"]
    by_hand = [100 * alone[test, row["seed"]][test]["value"] for row in merged for test in row["scores"]]
    (suite,) = (suite for suite in board.inside if suite.name == "glue-pairs")
    assert suite.mean("individual") == pytest.approx(np.mean(by_hand))
    (parts,) = (suite for suite in board.inside if suite.name == "glue-partitions")
    halves = [
        100 * s["value"]
        for r in rows
        if r["kind"] == "individual" and "/" in r["contributors"][0]
        for s in r["scores"].values()
    ]
    assert parts.mean("individual") == pytest.approx(np.mean(halves))
    outputs = {"html": tmp_path / "page.html", "markdown": tmp_path / "page.md", "csv": tmp_path / "page.csv"}
    first = write_leaderboard(tmp_path, outputs)[0]
    assert first.columns[2:8] == tuple(names)  # which begin with nothing that they share
    assert {line.title for line in first.lines} >= {"Individual", "Multi-task", "Simple", "Fisher", "RegMean"}
    assert [line.cells[-1].text for line in first.lines].count("reference") == 1
    asked = write_leaderboard(tmp_path, {"markdown": tmp_path / "asked.md"}, against="Simple")[0]
    assert next(line for line in asked.lines if line.title == "Simple").cells[-1].text == "reference"
    with pytest.raises(UserError, match="did you mean 'fisher'"):
        write_leaderboard(tmp_path, {"markdown": tmp_path / "no.md"}, against="fischer")


def test_suites_are_called_without_what_all_begin_with(done: Path, tmp_path: Path) -> None:
    for file in done.rglob("cells/*.json"):
        text = file.read_text().replace('"first"', '"board-first"').replace('"second"', '"board-second"')
        copy = tmp_path / str(file.relative_to(done)).replace("first", "board-first").replace("second", "board-second")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    choice = (done / "choice.json").read_text()
    (tmp_path / "choice.json").write_text(choice.replace("first", "board-first").replace("second", "board-second"))
    assert board_tables(read_board(tmp_path))[0].columns[2:4] == ("first", "second")


def test_seeds_that_are_kept_have_the_heads_that_they_have_among_all(make: Make) -> None:
    """With different heads a contributor's seed comes from all seeds of the suite, not from those of the run."""
    suite = make().suites[0].model_copy(update={"heads": ("different",), "seeds": (1, 2, 3)})
    wanted = [cell for cell in expand(suite) if cell.kind == "merge" and cell.seed == 1]
    kept = make().development(suite, make().entries)
    assert kept is not None and kept.keep_seeds == (1,)
    found = {cell.contributors for cell in expand(kept) if cell.kind == "merge"}
    assert found == {cell.contributors for cell in wanted} and {spec.seed for spec in wanted[0].contributors} == {1, 2}


def test_auto_is_on_each_suite_what_its_table_has_there(make: Make, place: Path, tmp_path: Path) -> None:
    lines: list[Any] = [
        {"method": "auto", "title": "Without", "family": "ours"},
        {"method": "auto", "title": "With", "family": "ours", "published": ["gram"]},
    ]
    separate = tmp_path / "separate.yaml"
    separate.write_text(yaml.safe_dump({"extends": [str(place / "second.yaml")], "name": "third", "heads": "separate"}))
    files = [place / "first.yaml", separate]
    benchmark = load_benchmark(files, [write(tmp_path, lines)], templates={"base": (place / "base.txt").read_text()})
    kinds: dict[str, Tasks] = {"first": "same", "third": "different"}
    for suite in benchmark.suites:
        chosen = benchmark.test(suite, {"Without": "Without", "With": "With"})
        assert chosen is not None
        models = len(suite.contributors)
        for method, published in zip(
            chosen.methods, [frozenset[Published](), frozenset[Published](["gram"])], strict=True
        ):
            situation = Situation(published=published, base=True, tasks=kinds[suite.name], models=models)
            row = choose(situation)
            assert (method.method, method.options) == (row.method, row.options)
        assert benchmark.development(suite, benchmark.entries) is None


def test_a_tie_for_first_place_is_said() -> None:
    def told(*averages: float) -> str:
        order = [SimpleNamespace(method=str(n), average=one, recovery=None) for n, one in enumerate(averages)]
        suite = SimpleNamespace(grid=SimpleNamespace(gaps=list))
        return lead(SimpleNamespace(order=order, title=str, inside=[suite], references={}))  # type: ignore[arg-type]

    assert told(0.5, 0.4) == "0 comes first of 2 methods: 0.5 points on average over one suite."
    assert told(0.5, 0.5, 0.4).startswith("0 and 1 tie for first place of 3 methods: 0.5 points")


def test_missing_cells_are_said_at_the_top(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "less")
    assert "missing" not in lead(read_board(tmp_path / "less"))
    rows = [row for row in read_rows(done / "test" / "first") if (row.method, row.seed) == ("SLERP", 2)]
    for row in rows:
        (tmp_path / "less" / "test" / "first" / "cells" / f"{row.cell}.json").unlink()
    said = lead(read_board(tmp_path / "less"))
    assert "some are missing. first: SLERP has 1 of 2 cells." in said and "(seed 2)" in said


def test_kronecker_factors_bring_gram_matrices(place: Path) -> None:
    (suite,) = load_benchmark([place / "first.yaml"], templates={"base": (place / "base.txt").read_text()}).suites
    assert situation_of(suite, ["kfac"]) == situation_of(suite, ["gram", "kfac"]) != situation_of(suite, ["gram"])
    lora = {"training": {"lora": {"rank": 2}}}
    adapted = {name: ModelArgs.model_validate(lora) for name in suite.contributors}
    assert situation_of(suite.model_copy(update={"contributors": adapted})).low_rank
    one = {**suite.contributors, next(iter(adapted)): next(iter(adapted.values()))}
    assert not situation_of(suite.model_copy(update={"contributors": one})).low_rank


def test_why_a_method_is_left_out(place: Path, tmp_path: Path) -> None:
    templates = {"base": (place / "base.txt").read_text()}
    file = write(tmp_path, [{"method": "slerp"}, {"method": "model_stock"}, {"method": "simple"}])
    (suite,) = load_benchmark([place / "first.yaml"], [file], templates=templates).suites
    three = suite.model_copy(update={"layout": "all", "contributors": {name: ModelArgs() for name in "abc"}})
    found = {entry.method: entry.obstacle(three) for entry in read_methods(file)}
    slerp = "it merges exactly 2 models, and the suite merges 3"
    assert found == {"slerp": slerp, "model_stock": None, "simple": None}


@pytest.mark.parametrize("more", [{"grid": {"ridge": [1.0]}}, {"method": "simple", "published": ["gram"]}])
def test_auto_has_no_grid_and_others_say_themselves_what_they_need(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"leave (grid|it) out"):
        read_methods(write(tmp_path, [{"method": "auto", **more}]))
