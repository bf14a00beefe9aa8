"""``method: auto``: every line of its table by a real merge, the reason that is given, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import merganser.methods.auto as methods_auto
from adapter_examples import adapt_linears
from merganser.cli import main
from merganser.errors import RecipeError, UserError
from merganser.merging import make_recipe, merge, reproduce, verify
from merganser.merging.auto import advice_on, situation_of
from merganser.merging.inputs import open_inputs
from merganser.merging.planning import make_plan
from merganser.methods import METHODS
from merganser.methods.auto import AUTO, ROWS, Measured, Row, Situation, choose
from merganser.statistics import FILE_NAME, Statistics, write_statistics

Family = Callable[..., tuple[Path, list[Path]]]
ROOT = Path(__file__).resolve().parents[2]


def only_fisher(folder: Path) -> None:
    """Leave a contributor nothing but its Fisher information."""
    header, found = Statistics.open(folder).header, load_file(folder / FILE_NAME)
    (folder / FILE_NAME).unlink()
    tensors = {name: tensor for name, tensor in found.items() if name.startswith("fisher.")}
    write_statistics(folder / FILE_NAME, header.model_copy(update={"layers": ()}), tensors)


def with_statistics(place: Family, _: Path) -> dict[str, Any]:
    _, models = place("bert", 3)
    return {"models": models}


def with_fisher(place: Family, _: Path) -> dict[str, Any]:
    _, models = place("bert", 2, fisher="expected")
    for model in models:
        only_fisher(model)
    return {"models": models}


def with_base(place: Family, _: Path) -> dict[str, Any]:
    base, models = place("bert", 2, statistics=False)
    return {"models": models, "base": base}


def with_adapters(place: Family, folder: Path) -> dict[str, Any]:
    base, _ = place("qwen2", 1, statistics=False)
    return {"models": [adapt_linears(folder / f"adapter-{n}", base, ("q_proj", "down_proj"), seed=n) for n in (1, 2)]}


def with_adapters_alone(place: Family, folder: Path) -> dict[str, Any]:
    found = with_adapters(place, folder)
    shutil.rmtree(folder / "base")
    return found


def with_nothing(place: Family, _: Path) -> dict[str, Any]:
    _, models = place("bert", 2, statistics=False)
    return {"models": models}


BASE, NONE = "the base model is known", "no contributor publishes statistics"
#: What is at hand → the number of the line of the table, and what is said to be the reason.
CASES: dict[str, tuple[Callable[[Family, Path], dict[str, Any]], int, str]] = {
    "statistics": (with_statistics, 0, "every contributor publishes Gram matrices; "),
    "fisher": (with_fisher, 1, "every contributor publishes Fisher information; "),
    "adapters": (with_adapters, 2, f"{BASE} and {NONE}; "),
    "alone": (with_adapters_alone, 2, "adapters without their base are changes of it, and have no statistics; "),
    "base": (with_base, 3, f"{BASE} and {NONE}; "),
    "nothing": (with_nothing, 4, f"{NONE} and no base model is given; "),
}  # fmt: skip


def test_every_line_has_its_case() -> None:
    assert {number for _, number, _ in CASES.values()} == set(range(len(ROWS)))


@pytest.mark.parametrize("case", CASES)
def test_a_line_of_the_table(family: Family, tmp_path: Path, case: str) -> None:
    """The same bytes as the method by its name, said in plan, provenance and card, verified and repeated."""
    make, number, because = CASES[case]
    given, row = make(family, tmp_path), ROWS[number]
    result = merge(**given, output=tmp_path / "auto")
    named = merge(**given, output=tmp_path / "named", method=row.method, options=dict(row.options))
    weights = next(Path(named).glob("*model.safetensors")).name
    assert (result / weights).read_bytes() == (named / weights).read_bytes()
    assert result.method == row.method and result.choice == because + row.why and named.choice is None
    assert result.plan.recipe == named.plan.recipe and not named.advice
    record = json.loads((result / "provenance.json").read_text())
    assert record["recipe"]["method"] == row.method
    assert record["method_chosen_because"] == record["plan"]["choice"] == because + row.why
    assert f"`auto` chose it, because {because.split(';')[0]}" in " ".join((result / "README.md").read_text().split())
    assert "`auto`" not in (named / "README.md").read_text()
    assert verify(result).absent == () and reproduce(result) == []


def said(recipe: dict[str, Any]) -> tuple[str, list[str]]:
    """The choice and the advice."""
    made = make_recipe(recipe)
    return make_plan(made).choice or "", [*advice_on(made, open_inputs(made))]


def test_who_lacks_statistics_is_named(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 3)
    (models[1] / FILE_NAME).unlink()
    people = [str(model) for model in models]
    because, advice = said({"contributors": people, "base": str(base)})
    assert because.startswith(
        "the base model is known and not every contributor publishes statistics (tuned-1 does not); "
    )
    assert reproduce(merge(models, tmp_path / "out", base=base)) == [] and verify(tmp_path / "out").absent == ()
    (models[2] / FILE_NAME).unlink()
    because, advice = said({"contributors": people})
    assert because.startswith(
        "not every contributor publishes statistics (tuned-1, tuned-2 do not) and no base model is given; "
    )
    command = "merganser collect MODEL --data FILE, next to the data"
    assert advice[1].startswith(f"with Gram matrices of tuned-1, tuned-2 ({command}) it would be regmean: ")
    assert advice[2].startswith("with the base model (--base MODEL) it would be actmat: ")


def test_fisher_of_some_and_grams_of_others(family: Family) -> None:
    _, models = family("bert", 2, fisher="expected")
    only_fisher(models[0])
    choice, _ = said({"contributors": [str(model) for model in models]})
    assert choice.startswith("every contributor publishes Fisher information; ")
    (models[1] / FILE_NAME).unlink()
    choice, _ = said({"contributors": [str(model) for model in models]})
    assert choice.startswith("no contributor publishes Gram matrices and no base model is given; ")


@pytest.mark.parametrize(
    ("card", "configuration", "named"),
    [
        ("---\nbase_model: org/base\ntags: [x]\n---\n# Mine\n", {}, "--base org/base"),
        ("---\nbase_model: [org/base]\n---\n", {}, "--base org/base"),
        ("---\nbase_model: [org/a, org/b]\n---\n", {}, "--base MODEL"),  # itself a merge
        ("---\nbase_model: ../../secret\n---\n", {}, "--base MODEL"),
        ("---\nbase_model: [\n---\n", {}, "--base MODEL"),
        ("no metadata", {"_name_or_path": "bert-base-uncased"}, "--base bert-base-uncased"),
        (None, {"_name_or_path": "/home/me/checkpoint-500"}, "--base MODEL"),
    ],
)
def test_the_base_that_cards_name_is_proposed_and_not_read(
    family: Family, card: str | None, configuration: dict[str, Any], named: str
) -> None:
    _, models = family("bert", 2, statistics=False)
    for model in models:
        if card is not None:
            (model / "README.md").write_text(card)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **configuration}))
    recipe = {"contributors": [str(model) for model in models]}
    choice, advice = said(recipe)
    assert choice.startswith("no contributor publishes statistics and no base model is given")
    assert any(f"({named}) it would be actmat" in line for line in advice), advice
    (models[0] / "README.md").write_text("---\nbase_model: another/one\n---\n")
    assert any("(--base MODEL) it would be" in line for line in said(recipe)[1])


def test_tasks_are_told_by_labels_and_heads(family: Family) -> None:
    _, models = family("bert", 2, statistics=False)
    people = [str(model) for model in models]

    def tasks(**keys: Any) -> str | None:
        recipe = make_recipe({"contributors": people, **keys})
        return situation_of(recipe, open_inputs(recipe)).tasks

    assert tasks() == "same" and tasks(keep_separate=["classifier.*"]) == "different"
    advice = said({"contributors": people, "keep_separate": ["classifier.*"]})[1]
    assert advice[0].startswith("measured: GLUE") and "NER" not in advice[0]
    config = json.loads((models[1] / "config.json").read_text())
    config |= {"id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}
    (models[1] / "config.json").write_text(json.dumps(config))
    assert tasks(labels="union") == "different"


def test_language_models_have_no_labels(family: Family) -> None:
    _, models = family("llama", 2, statistics=False)
    recipe = make_recipe({"contributors": [str(model) for model in models]})
    assert situation_of(recipe, open_inputs(recipe)).tasks is None
    assert all(words in said(recipe.model_dump())[1][0] for words in ("measured: NER", "GLUE"))


def test_options_are_those_of_the_method_that_is_chosen(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    one = merge(models, tmp_path / "one", options={"alpha": 0.5})
    two = merge(models, tmp_path / "two", method="regmean", options={"alpha": 0.5})
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match=r"auto chooses regmean for what is here, .* no option 'density'\n") as error:
        merge(models, tmp_path / "none", base=base, options={"density": 0.5})
    method = (error.value.mend or "").rsplit(" ", 1)[1]
    assert "(options of regmean: alpha, " in (error.value.mend or "")
    assert merge(models, tmp_path / "mended", base=base, method=method, options={"density": 0.5}).method == method
    with pytest.raises(RecipeError, match="no option 'nonsense'") as error:
        merge(models, tmp_path / "none", options={"nonsense": 1})
    assert "--method" not in (error.value.mend or "")


def test_options_of_the_table_and_of_the_user(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(method="regmean", published="gram", options={"alpha": 0.3, "ridge": 0.1}, why="so it is", cost="little")
    monkeypatch.setattr(methods_auto, "ROWS", (row, *ROWS))
    _, models = family("bert", 2)
    recipe = {"contributors": [str(model) for model in models], "options": {"alpha": 0.7}}
    plan = make_plan(make_recipe(recipe))
    assert (plan.recipe.options["alpha"], plan.recipe.options["ridge"]) == (0.7, 0.1)
    assert (plan.choice or "").endswith("; so it is") and row.title == "regmean (alpha=0.3, ridge=0.1)"


def test_auto_is_for_the_whole_merge(family: Family) -> None:
    _, models = family("bert", 2)
    people = [str(model) for model in models]
    with pytest.raises(UserError, match=r"rules\.0: auto chooses one method for the whole merge"):
        make_recipe({"contributors": people, "rules": [{"tensors": ["*"], "method": "auto"}]})
    with pytest.raises(UserError, match=r"layers\.0: auto chooses one method for the whole merge"):
        sources = [{"contributor": model.name, "range": [0, 1]} for model in models]
        make_recipe({"contributors": people, "layers": [{"sources": sources, "method": "auto"}]})
    rule = {"tensors": ["classifier.*"], "method": "simple"}
    plan = make_plan(make_recipe({"contributors": people, "rules": [rule]}))
    assert plan.counts["simple"] == 2 and plan.method.name == "regmean" and plan.choice


@pytest.mark.parametrize("name", ["automatic", "best", "Auto", "default"])
def test_names_for_it(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is called auto here"):
        make_recipe({"contributors": ["a", "b"], "method": name})


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_the_command_says_what_it_chose(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, models = family("bert", 2, statistics=False)
    assert run("merge", *models, "--method", "auto", "--base", base, "-o", tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert "auto chose actmat, because the base model is known and no contributor publishes statistics; " in told
    assert "measured: NER, five models of one task: 51.5, 81% of what each model reaches on its own test" in told
    assert run("merge", *models, "--method", "actmat", "--base", base, "-o", tmp_path / "named") == 0
    assert "auto" not in capsys.readouterr().err
    assert run("merge", *models, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["method"] == "simple" and plan["choice"] == plan["plan"]["choice"]
    assert any("it would be actmat" in line for line in plan["advice"])


def test_the_command_explains_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods", "auto") == 0
    told = capsys.readouterr().out
    assert all(f"  {row.have}: {row.why}. It costs {row.cost}." in told for row in ROWS)
    assert run("methods", "auto", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == [row.method for row in ROWS] and rows[0]["measured"][0]["merged"] == 49.7
    assert run("methods", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed[0]["name"] == AUTO and {one["name"] for one in listed} > set(METHODS)
    assert run("methods", "automatic") == 2 and "automatic is called auto here" in capsys.readouterr().err


def test_every_situation_has_a_line_and_every_line_a_situation() -> None:
    kinds = [frozenset(some) for n in range(4) for some in itertools.combinations(("gram", "kfac", "fisher"), n)]
    flags = (True, False)
    everything = [
        Situation(published, base, tasks, adapters, models)  # type: ignore[arg-type]
        for published, base, tasks, adapters, models in itertools.product(
            kinds, flags, ("same", "different", None), flags, (1, 2, 3)
        )
    ]
    assert {id(choose(situation)) for situation in everything} == {id(row) for row in ROWS}
    for row in ROWS:
        method = METHODS[row.method]
        method.options_type.model_validate(row.options)
        assert not method.needs.base or row.base
        assert method.needs.statistics in (None, row.published)
        assert (method.needs.models or 1) == 1 and method.needs.at_least <= row.at_least
        assert not (method.needs.data or method.needs.package)
        for one in row.measured:
            text = (ROOT / one.source).read_text(encoding="utf-8")
            assert all(f"{number:.1f}" in text for number in (one.merged, one.alone, one.average)), one


def test_nothing_worse_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(value: float) -> tuple[Measured, ...]:
        return (Measured("a suite", "same", value, 60.0, 40.0, "results/README.md"),)

    def advised(more: float) -> list[str]:
        better = Row(method="actmat", base=True, why="", cost="", measured=measured(more))
        rest = Row(method="simple", why="", cost="", measured=measured(50.0))
        monkeypatch.setattr(methods_auto, "ROWS", (better, rest))
        situation = Situation(tasks="same")
        return [row.method for _, row in methods_auto.better_rows(situation, [Situation(base=True, tasks="same")])]

    assert advised(51.0) == ["actmat"] and advised(49.0) == []
