"""Merges of files that are alike ask nothing of transformers, and say and write the same as if they had."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from architectures.tiny import TINY
from conftest import make_model
from merganser.errors import CheckpointError, RecipeError
from merganser.merging import make_recipe, merge, verify
from merganser.merging.inputs import open_inputs
from merganser.merging.mergekit.methods import METHODS as MERGEKIT
from merganser.merging.plan import Plan
from merganser.merging.planning import make_plan, plan_of
from merganser.merging.rules import options_of_contributors
from merganser.methods import METHODS

ALIKE = [name for name, method in METHODS.items() if name == "simple" or not method.needs.structure]
#: Runs commands, one after the other, and says after each whether transformers was imported.
RUN = """
import json, sys
from merganser import cli

for arguments in json.loads(sys.argv[1]):
    try:
        cli.main(arguments)
    except SystemExit as end:
        status = end.code
    print(json.dumps([arguments, status, "transformers" in sys.modules]))
"""


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and three fine-tunes, whose head is not tied to the embedding."""
    folder = tmp_path_factory.mktemp("llamas")
    for seed in range(4):
        make_model("llama", seed, tie_word_embeddings=False).save_pretrained(folder / str(seed))
    return folder / "0", [folder / str(seed) for seed in range(1, 4)]


def given(name: str, llamas: tuple[Path, list[Path]]) -> dict[str, Any]:
    """What a method merges: as many models as it takes, and a base where it reads one."""
    (base, models), needs = llamas, METHODS[name].needs
    return {
        "contributors": [{"model": str(model)} for model in models[: needs.models or 2]],
        "method": name,
        **({"base": str(base)} if needs.base else {}),
    }


def by_flags(llamas: tuple[Path, list[Path]], place: Path) -> Iterator[list[str]]:
    for name in ALIKE:
        values = given(name, llamas)
        models = [one["model"] for one in values["contributors"]]
        base = ["--base", values["base"]] if "base" in values else []
        yield ["merge", *models, *base, "--method", name, "-o", str(place / f"{name}-by-flags")]


def by_recipe(llamas: tuple[Path, list[Path]], place: Path) -> Iterator[list[str]]:
    """Options of single contributors, and rules by name: another method, another option, a tensor that is taken."""
    for name in ALIKE:
        values = given(name, llamas)
        if "density" in options_of_contributors(METHODS[name].options_type):
            values["contributors"][0]["options"] = {"density": 0.7}
        values["rules"] = [
            {"tensors": ["*norm*"], "method": "simple"},
            {"tensors": ["lm_head.*"], "take": llamas[1][0].name},
        ]
        file = place / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        yield ["merge", str(file), "-o", str(place / f"{name}-by-recipe")]


def by_configuration_of_mergekit(llamas: tuple[Path, list[Path]], place: Path) -> Iterator[list[str]]:
    base, models = llamas
    for name, method in MERGEKIT.items():
        if METHODS[method.ours].needs.structure and method.ours != "simple":
            continue
        parameters = {"weight": 0.5, "density": 0.5, "t": 0.5}
        known = {key: value for key, value in parameters.items() if key in method.parameters}
        count = 1 if method.base == "first" else METHODS[method.ours].needs.models or 2
        values: dict[str, Any] = {"models": [{"model": str(one)} for one in models[:count]], "merge_method": name}
        if method.base != "input":
            values["base_model"] = str(base)
        file = place / f"mergekit-{name}.yaml"
        file.write_text(yaml.safe_dump({**values, "parameters": known, "dtype": "bfloat16"}))
        yield ["merge", str(file), "-o", str(place / f"{name}-of-mergekit")]


def test_transformers_is_not_imported(llamas: tuple[Path, list[Path]], tmp_path: Path) -> None:
    ways = (by_flags, by_recipe, by_configuration_of_mergekit)
    merges = [command for way in ways for command in way(llamas, tmp_path)]
    assert len(merges) > 3 * len(ALIKE) - 10
    last = merges[0][-1]
    commands = [*merges, ["verify", last], ["verify", last, "--deep", "all"], ["reproduce", last]]
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(commands)], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(commands), done.stderr
    for arguments, status, imported in found:
        assert (status, imported) == (0, False), arguments


def without_layers(plan: Plan) -> Plan:
    steps = []
    for step in plan.steps:
        facts = tuple(replace(fact, layer=None, bias_of=None) for fact in step.unit.facts)
        steps.append(replace(step, unit=replace(step.unit, facts=facts)))
    return replace(plan, steps=tuple(steps))


def plans(values: dict[str, Any]) -> tuple[Plan, Plan]:
    """The plan as it is made, and the one for which the model was asked in any case."""
    recipe = make_recipe(values)
    inputs = open_inputs(recipe)
    return plan_of(recipe, inputs), plan_of(recipe, inputs, ask_model=True)


def is_asked(plan: Plan) -> bool:
    return any(fact.layer is not None for step in plan.steps for fact in step.unit.facts)


@pytest.mark.parametrize("name", ALIKE)
def test_the_plan_is_the_same(llamas: tuple[Path, list[Path]], name: str) -> None:
    found, asked = plans({**given(name, llamas), "require_coverage": 1.0})
    assert is_asked(asked) and not is_asked(found)
    assert without_layers(asked) == found  # sources, options, coefficients, notes, outputs
    assert asked.coverage.share == found.coverage.share == 1 and not found.coverage.others


def test_the_bytes_are_the_same(
    llamas: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = llamas
    options: dict[str, Any] = {"method": "dare_ties", "base": base, "options": {"density": 0.5}}
    found = merge(models, tmp_path / "found", **options)
    monkeypatch.setattr("merganser.merging.planning.treats_all_alike", lambda *_: False)
    asked = merge(models, tmp_path / "asked", **options)
    assert is_asked(asked.plan) and not is_asked(found.plan)
    names = [path.name for path in sorted((tmp_path / "found").iterdir()) if path.name != "provenance.json"]
    assert "model.safetensors" in names and "README.md" in names
    for name in names:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "asked" / name).read_bytes(), name


def test_a_record_that_tells_the_layers_is_checked_with_them(
    llamas: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = llamas
    with monkeypatch.context() as patched:
        patched.setattr("merganser.merging.planning.treats_all_alike", lambda *_: False)
        merge(models, tmp_path / "out", method="ties", base=base)
    assert verify(tmp_path / "out", deep="all").tensors == 21


def changed(folder: Path, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model with another configuration."""
    place.mkdir()
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (place / "config.json").write_text(json.dumps(values))
    (place / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return place


def test_who_wrote_a_configuration_makes_no_difference(
    llamas: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr("merganser.merging.configuration.check_config", never)
    said = {"transformers_version": "4.40.0", "_name_or_path": "elsewhere", "torch_dtype": "bfloat16"}
    other = changed(llamas[1][1], tmp_path / "other", lambda values: values.update(said))
    values = given("ties", llamas)
    values["contributors"][1] = {"model": str(other)}
    assert not is_asked(make_plan(make_recipe(values)))


def test_another_configuration_is_looked_at(llamas: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = llamas
    values = {**given("ties", llamas), "contributors": [{"model": str(models[0])}]}
    true = changed(base, tmp_path / "true", lambda values: values.update(attention_bias=1))  # for Python 1 is True
    with pytest.raises(CheckpointError, match="attention_bias"):
        make_plan(make_recipe({**values, "base": str(true)}))
    taller = changed(base, tmp_path / "taller", lambda values: values.update(vocab_size=50))
    with pytest.raises(CheckpointError, match="does not fit its tensors"):
        make_plan(make_recipe({**values, "base": str(taller)}))
    more = changed(base, tmp_path / "more", lambda values: values.update(rms_norm_eps=0.1))
    with pytest.raises(CheckpointError, match="compute different functions"):
        make_plan(make_recipe({**values, "base": str(more)}))


@pytest.mark.parametrize("tied", [True, False])
def test_copies_of_tied_tensors_are_found(llamas: tuple[Path, list[Path]], tmp_path: Path, tied: bool) -> None:
    """Copies are stored once; what is stored twice and differs is told by its numbers, whatever is said of ties."""
    folders = []
    for seed, folder in enumerate([llamas[0], *llamas[1][:2]]):
        place = changed(folder, tmp_path / str(seed), lambda values: values.update(tie_word_embeddings=True))
        if tied:
            tensors = load_file(place / "model.safetensors")
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            save_file(tensors, place / "model.safetensors", {"format": "pt"})
        folders.append(str(place))
    values = {"contributors": folders[1:], "base": folders[0], "method": "dare_linear", "options": {"density": 0.5}}
    found, asked = plans(values)
    assert is_asked(found) == tied
    assert without_layers(found) == without_layers(asked)
    assert ("lm_head.weight" in found.specs) != tied


def test_buffers_and_stacks_are_asked_for(tmp_path: Path) -> None:
    """A buffer is averaged, though a method adds task vectors up; experts that lie behind each other are apart."""
    for name, apart in (("Glm4MoeForCausalLM", "buffer"), ("GptOssForCausalLM", "stack")):
        folders = [str(TINY[name].save(tmp_path / f"{name}-{seed}", seed)) for seed in range(3)]
        recipe = {"contributors": folders[1:], "base": folders[0], "method": "task_arithmetic"}
        plan = make_plan(make_recipe(recipe))
        assert is_asked(plan)
        assert any(step.reason is not None if apart == "buffer" else step.stack for step in plan.steps)


def test_what_is_excluded_counts_as_not_reached(llamas: tuple[Path, list[Path]]) -> None:
    for name in ("simple", "ties"):
        values = {**given(name, llamas), "exclude": ["*q_proj*"]}
        assert 0 < make_plan(make_recipe(values)).coverage.share < 1
        with pytest.raises(RecipeError, match="reaches only"):
            make_plan(make_recipe({**values, "require_coverage": 1.0}))


def test_roles_and_depth_are_asked_for(llamas: tuple[Path, list[Path]]) -> None:
    values = given("ties", llamas)
    assert is_asked(make_plan(make_recipe({**values, "rules": [{"role": ["mlp"], "options": {"density": 0.5}}]})))
    assert is_asked(make_plan(make_recipe({**values, "options": {"density": [0.1, 0.5]}})))
