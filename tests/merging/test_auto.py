"""``method: auto``: every line of its table by a real merge, the reason that is given, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merganser.methods.auto as methods_auto
from adapter_examples import adapt_linears, materialise
from merganser.checkpoints import open_checkpoint
from merganser.cli import main
from merganser.collection import collect_statistics
from merganser.errors import RecipeError, UserError
from merganser.merging import make_recipe, merge, reproduce, verify
from merganser.merging.auto import advice_on, situation_of
from merganser.merging.inputs import open_inputs
from merganser.merging.planning import make_plan
from merganser.methods import METHODS
from merganser.methods.auto import AUTO, ROWS, Measured, Published, Row, Situation, choose
from merganser.statistics import FILE_NAME, Statistics, write_statistics
from merganser.tasks.models import load_model, open_model
from merging.conftest import batches

Family = Callable[..., tuple[Path, list[Path]]]
ROOT = Path(__file__).resolve().parents[2]


def only_fisher(folder: Path) -> None:
    """Leave a contributor nothing but its Fisher information."""
    header, found = Statistics.open(folder).header, load_file(folder / FILE_NAME)
    (folder / FILE_NAME).unlink()
    tensors = {name: tensor for name, tensor in found.items() if name.startswith("fisher.")}
    write_statistics(folder / FILE_NAME, header.model_copy(update={"layers": ()}), tensors)


@dataclass(frozen=True)
class Case:
    """What is at hand: files that are made, what is found of them, and what is said of them.

    Attributes:
        make: from a family and a folder to the arguments of :func:`merge`.
        situation: as it is to be found.
        lacks: what is said where the method needs no statistics.
    """

    make: Callable[[Family, Path], dict[str, Any]]
    situation: Situation
    lacks: tuple[str, ...] = ()

    def because(self) -> str:
        """The reason that is to be given."""
        row = choose(self.situation)
        published = {"gram": GRAMS, "kfac": f"{GRAMS} and output gradients", "fisher": "Fisher information"}
        said = [*self.lacks]
        if row.published is not None:
            said = [f"every contributor publishes {published[row.published]}", *([BASE] if row.base else [])]
        said += ["the changes are of low rank"] if row.low_rank else []
        said += (
            [] if row.tasks is None else [{"same": "they have one task", "different": "their tasks differ"}[row.tasks]]
        )
        return f"{', '.join(said[:-1])}{' and ' if len(said) > 1 else ''}{said[-1]}; {row.why}"


GRAMS, HEADS = "Gram matrices", ("classifier.*",)
BASE, NONE = "the base model is known", "no contributor publishes statistics"
ALONE = "adapters without their base are changes of it, and have no statistics"


def family_of(
    *, base: bool = False, heads: bool = False, strip: bool = False, **settings: Any
) -> Callable[[Family, Path], dict[str, Any]]:
    """Two fine-tunes of a tiny encoder, with their base or heads of their own, or nothing but Fisher information."""

    def make(family: Family, _: Path) -> dict[str, Any]:
        start, models = family("bert", 2, **settings)
        for model in models if strip else ():
            only_fisher(model)
        return {"models": models} | ({"base": start} if base else {}) | ({"keep_separate": HEADS} if heads else {})

    return make


def adapters_of(
    *, base: bool, statistics: bool = False, kfac: str | None = None, apart: bool = False
) -> Callable[[Family, Path], dict[str, Any]]:
    """Two LoRA adapters of a tiny language model, there or gone, perhaps with statistics or heads kept apart."""

    def make(family: Family, folder: Path) -> dict[str, Any]:
        start, _ = family("llama", 1, statistics=False)
        models = [adapt_linears(folder / f"adapter-{n}", start, ("q_proj", "down_proj"), seed=n) for n in (1, 2)]
        for number, model in enumerate(models if statistics else ()):
            whole = load_model(open_model(f"{start}+{model}"), "AutoModelForCausalLM")
            opened = open_checkpoint(f"{start}+{model}")
            header, tensors = collect_statistics(whole, opened, batches(number, "llama"), kfac=kfac)
            write_statistics(model / FILE_NAME, header, tensors)
        if not base:
            shutil.rmtree(start)
        return {"models": models} | ({"keep_separate": ["lm_head.weight"]} if apart else {})

    return make


def whole_models_of_adapters(dtype: torch.dtype) -> Callable[[Family, Path], dict[str, Any]]:
    """The same adapters merged into their base, so that nothing but the numbers tells."""

    def make(family: Family, folder: Path) -> dict[str, Any]:
        start, _ = family("qwen2", 1, statistics=False, hidden_size=64, intermediate_size=96)
        models = [adapt_linears(folder / f"adapter-{n}", start, ("q_proj", "down_proj"), seed=n) for n in (1, 2)]
        return {
            "models": [materialise(folder / f"whole-{one.name}", start, one, dtype) for one in models],
            "base": start,
        }

    return make


def language_models(family: Family, _: Path) -> dict[str, Any]:
    """Two fine-tunes of a tiny language model, with their base: nothing says what their tasks are."""
    start, models = family("qwen2", 2, statistics=False)
    return {"models": models, "base": start}


def published(*kinds: Published) -> frozenset[Published]:
    return frozenset(kinds)


BARE: dict[str, Any] = {"statistics": False}
CASES = {
    "grams": Case(family_of(), Situation(published("gram"), tasks="same")),
    "grams and base": Case(family_of(base=True), Situation(published("gram"), base=True, tasks="same"), (BASE,)),
    "grams, tasks": Case(family_of(heads=True), Situation(published("gram"), tasks="different")),
    "grams and base, tasks": Case(
        family_of(base=True, heads=True), Situation(published("gram"), base=True, tasks="different"), (BASE,)
    ),
    "kfac": Case(family_of(kfac="sampled"), Situation(published("gram", "kfac"), tasks="same")),
    "kfac and base": Case(
        family_of(kfac="sampled", base=True), Situation(published("gram", "kfac"), base=True, tasks="same"), (BASE,)
    ),
    "kfac, tasks": Case(family_of(kfac="sampled", heads=True), Situation(published("gram", "kfac"), tasks="different")),
    "kfac and base, tasks": Case(
        family_of(kfac="sampled", base=True, heads=True),
        Situation(published("gram", "kfac"), base=True, tasks="different"),
        (BASE,),
    ),
    "fisher": Case(family_of(fisher="expected", strip=True), Situation(published("fisher"), tasks="same")),
    "base": Case(family_of(base=True, **BARE), Situation(base=True, tasks="same"), (BASE, NONE)),
    "base, tasks": Case(
        family_of(base=True, heads=True, **BARE), Situation(base=True, tasks="different"), (BASE, NONE)
    ),
    "adapters": Case(adapters_of(base=True), Situation(base=True, low_rank=True), (BASE, NONE)),
    "adapters alone": Case(adapters_of(base=False), Situation(base=True, low_rank=True), (ALONE,)),
    "adapters, grams": Case(
        adapters_of(base=True, statistics=True), Situation(published("gram"), base=True, low_rank=True), (BASE,)
    ),
    "adapters, kfac": Case(
        adapters_of(base=True, statistics=True, kfac="sampled"),
        Situation(published("gram", "kfac"), base=True, low_rank=True),
        (BASE,),
    ),
    "adapters, tasks": Case(
        adapters_of(base=True, apart=True), Situation(base=True, tasks="different", low_rank=True), (BASE, NONE)
    ),
    "adapters, kfac, tasks": Case(
        adapters_of(base=True, statistics=True, kfac="sampled", apart=True),
        Situation(published("gram", "kfac"), base=True, tasks="different", low_rank=True),
        (BASE,),
    ),
    "adapters merged in": Case(
        whole_models_of_adapters(torch.float32), Situation(base=True, low_rank=True), (BASE, NONE)
    ),
    "adapters merged in, rounded": Case(
        whole_models_of_adapters(torch.bfloat16), Situation(base=True, low_rank=True), (BASE, NONE)
    ),
    "language models": Case(language_models, Situation(base=True), (BASE, NONE)),
    "nothing": Case(family_of(**BARE), Situation(tasks="same"), (NONE, "no base model is given")),
}
#: A case for each line of the table, and those in which more or less than that is at hand.
TRIED = ["grams", "kfac and base, tasks", "fisher", "base", "adapters", "adapters alone", "nothing"]
TRIED += [next(case for case, one in CASES.items() if choose(one.situation) is row) for row in ROWS]


def test_every_line_has_a_case() -> None:
    assert {id(choose(case.situation)) for case in CASES.values()} == {id(row) for row in ROWS}


@pytest.mark.parametrize("case", dict.fromkeys(TRIED))
def test_a_line_of_the_table(family: Family, tmp_path: Path, case: str) -> None:
    """The same bytes as the method by its name, said in plan, provenance and card, verified and repeated."""
    given, because, row = CASES[case].make(family, tmp_path), CASES[case].because(), choose(CASES[case].situation)
    result = merge(**given, output=tmp_path / "auto")
    named = merge(**given, output=tmp_path / "named", method=row.method, options=dict(row.options))
    weights = [file.relative_to(named) for file in Path(named).rglob("*.safetensors")]
    assert weights and all((result / file).read_bytes() == (named / file).read_bytes() for file in weights)
    assert result.method == row.method and result.choice == because and named.choice is None
    assert result.plan.recipe == named.plan.recipe and result.advice and not named.advice
    record = json.loads((result / "provenance.json").read_text())
    assert record["recipe"]["method"] == row.method and record["recipe"]["options"].items() >= row.options.items()
    assert record["method_chosen_because"] == record["plan"]["choice"] == because
    assert f"`auto` chose it, because {because.split(';')[0]}" in " ".join((result / "README.md").read_text().split())
    assert "`auto`" not in (named / "README.md").read_text()
    assert verify(result).absent == () and reproduce(result) == []


@pytest.mark.parametrize("case", [case for case in CASES if case not in TRIED])
def test_what_is_found(family: Family, tmp_path: Path, case: str) -> None:
    given = CASES[case].make(family, tmp_path)
    people = [str(model) for model in given.pop("models")]
    recipe = make_recipe({"contributors": people, **given})
    assert situation_of(recipe, open_inputs(recipe)) == CASES[case].situation


#: A table that stays as it is, whatever is measured.
TABLE = (
    Row(method="mats", published="kfac", why="it is best", cost="much"),
    Row(
        method="regmean",
        published="gram",
        options={"ridge": 0.1},
        why="it is good",
        cost="some",
        measured=(
            Measured("a suite", "same", 58.0, 60.0, 40.0, "results/README.md"),
            Measured("another", "different", 50.0, 55.0, 44.0, "results/README.md"),
        ),
    ),
    Row(
        method="actmat",
        base=True,
        why="it needs little",
        cost="nothing",
        measured=(Measured("a suite", "same", 57.0, 60.0, 40.0, "results/README.md"),),
    ),
    Row(method="simple", why="nothing else is left", cost="nothing"),
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods_auto, "ROWS", TABLE)


def said(recipe: dict[str, Any]) -> tuple[str, list[str]]:
    """The choice and the advice."""
    made = make_recipe(recipe)
    return make_plan(made).choice or "", [*advice_on(made, open_inputs(made))]


@pytest.mark.usefixtures("table")
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
    assert advice == [
        "nothing has been measured yet of simple on models like these",
        f"with Gram matrices of tuned-1, tuned-2 ({command}) it would be regmean (ridge=0.1): a suite: 58.0, 97% of "
        "what each model reaches on its own test (60.0; the plain average 40.0; results/README.md)",
        f"with Gram matrices and output gradients of tuned-0, tuned-1, tuned-2 ("
        f"{command.replace(',', ' --kfac --overwrite,')}) it would be mats",
        "with the base model (--base MODEL) it would be actmat: a suite: 57.0, 95% of what each model reaches on its "
        "own test (60.0; the plain average 40.0; results/README.md)",
    ]


@pytest.mark.usefixtures("table")
def test_fisher_of_some_and_grams_of_others(family: Family) -> None:
    _, models = family("bert", 2, fisher="expected")
    only_fisher(models[0])
    choice, _ = said({"contributors": [str(model) for model in models]})
    assert choice.startswith("not every contributor publishes Gram matrices (tuned-0 does not) and no base model")
    (models[1] / FILE_NAME).unlink()
    choice, _ = said({"contributors": [str(model) for model in models]})
    assert choice.startswith("no contributor publishes Gram matrices and no base model is given; ")


@pytest.mark.usefixtures("table")
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


@pytest.mark.usefixtures("table")
def test_tasks_are_told_by_labels_and_heads(family: Family) -> None:
    _, models = family("bert", 2, statistics=False)
    people = [str(model) for model in models]

    def tasks(**keys: Any) -> str | None:
        recipe = make_recipe({"contributors": people, **keys})
        return situation_of(recipe, open_inputs(recipe)).tasks

    assert tasks() == "same" and tasks(keep_separate=["classifier.*"]) == "different"
    assert tasks(keep_separate=["*LayerNorm*", "bert.pooler.*"]) == "same"  # which answer for no task
    advice = said({"contributors": people, "keep_separate": ["classifier.*"]})[1]
    assert any("regmean (ridge=0.1): another: 50.0" in line for line in advice)
    for model, names, expected in zip(models, (("yes", "no"), ("true", "false")), ("same", "different"), strict=True):
        config = json.loads((model / "config.json").read_text())
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        (model / "config.json").write_text(json.dumps(config))
        assert tasks(labels="union") == expected  # labels without names take those of the other head, and are merged


def test_statistics_of_gradients_are_advised_where_there_is_a_loss(family: Family) -> None:
    _, models = family("bert", 2, statistics=False)
    people = [str(model) for model in models]

    def commands() -> str:
        return " ".join(line for line in said({"contributors": people})[1] if "merganser collect" in line)

    assert "collect MODEL --data FILE, next" in commands() and "--kfac" in commands()
    config = json.loads((models[0] / "config.json").read_text())
    (models[0] / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    assert "collect MODEL --data FILE, next" in commands() and "--kfac" not in commands()


@pytest.mark.parametrize("extra", [{}, {"keep_separate": ["lm_head.weight"]}])
def test_one_model_is_its_own_merge(family: Family, tmp_path: Path, extra: dict[str, Any]) -> None:
    """However much is at hand: folding an adapter into its base is not to weaken it."""
    given = adapters_of(base=True)(family, tmp_path)
    alone = {**given, "models": given["models"][:1], **extra}
    result, folded = merge(**alone, output=tmp_path / "auto"), merge(**alone, output=tmp_path / "one", method="simple")
    weights = [file.relative_to(folded) for file in Path(folded).rglob("*.safetensors")]
    assert weights and all((result / file).read_bytes() == (folded / file).read_bytes() for file in weights)
    choice, advice = said({"contributors": [str(alone["models"][0])], **extra})
    assert choice == "one model is its own merge" and not advice


@pytest.mark.usefixtures("table")
def test_language_models_have_no_labels(family: Family) -> None:
    _, models = family("llama", 2, statistics=False)
    recipe = make_recipe({"contributors": [str(model) for model in models]})
    assert situation_of(recipe, open_inputs(recipe)).tasks is None
    assert any(
        "regmean (ridge=0.1): a suite: 58.0" in line and "another" in line for line in said(recipe.model_dump())[1]
    )


@pytest.mark.usefixtures("table")
def test_options_are_those_of_the_method_that_is_chosen(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2)
    one = merge(models, tmp_path / "one", options={"alpha": 0.5})
    two = merge(models, tmp_path / "two", method="regmean", options={"alpha": 0.5, "ridge": 0.1})
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match=r"auto chooses regmean for what is here, .* no option 'density'\n") as error:
        merge(models, tmp_path / "none", base=base, options={"density": 0.5})
    method = (error.value.mend or "").rsplit(" ", 1)[1]
    assert "(options of regmean: alpha, " in (error.value.mend or "")
    assert merge(models, tmp_path / "mended", base=base, method=method, options={"density": 0.5}).method == method
    with pytest.raises(RecipeError, match="no option 'nonsense'") as error:
        merge(models, tmp_path / "none", options={"nonsense": 1})
    assert "--method" not in (error.value.mend or "")


@pytest.mark.usefixtures("table")
def test_options_of_the_table_and_of_the_user(family: Family) -> None:
    _, models = family("bert", 2)
    recipe = {"contributors": [str(model) for model in models], "options": {"alpha": 0.7}}
    plan = make_plan(make_recipe(recipe))
    assert (plan.recipe.options["alpha"], plan.recipe.options["ridge"]) == (0.7, 0.1)
    plan = make_plan(make_recipe({**recipe, "options": {"ridge": 0.2}}))
    assert plan.recipe.options["ridge"] == 0.2 and (plan.choice or "").endswith("; it is good")


@pytest.mark.usefixtures("table")
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


@pytest.mark.usefixtures("table")
def test_the_command_says_what_it_chose(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, models = family("bert", 2, statistics=False)
    assert run("merge", *models, "--method", "auto", "--base", base, "-o", tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert "auto chose actmat, because the base model is known and no contributor publishes statistics; " in told
    assert "measured: a suite: 57.0, 95% of what each model reaches on its own test (60.0; the plain average" in told
    assert run("merge", *models, "--method", "actmat", "--base", base, "-o", tmp_path / "named") == 0
    assert "auto" not in capsys.readouterr().err
    assert run("merge", *models, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["method"] == "simple" and plan["choice"] == plan["plan"]["choice"]
    assert any("it would be actmat" in line for line in plan["advice"])


def test_the_command_explains_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods", "auto") == 0
    told = capsys.readouterr().out
    assert all(f"  {row.have}: {row.why}. It costs {row.price}." in told for row in ROWS)
    assert run("methods", "auto", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == [row.method for row in ROWS]
    assert [len(row["measured"]) for row in rows] == [len(row.measured) for row in ROWS]
    assert run("methods", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed[0]["name"] == AUTO and {one["name"] for one in listed} > set(METHODS)
    assert run("methods", "automatic") == 2 and "automatic is called auto here" in capsys.readouterr().err


def test_the_seconds_of_a_merge_are_part_of_its_price() -> None:
    row = Row(method="simple", why="", cost="little", measured=(Measured("it", "same", 1, 1, 1, "", seconds=3.4),))
    assert row.price == "little; the merge took 3 s (it)" and TABLE[1].price == "some"
