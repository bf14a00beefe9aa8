"""Configuration: files merged left to right, templates, the filter, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from merganser.errors import RecipeError, UserError
from merganser.lab.grid.cells import expand
from merganser.lab.grid.loading import fill, load_config, merge_values, number_of, read_values

WHOLE: dict[str, Any] = {
    "name": "trial",
    "suite": {"name": "emotion", "root": "{resources}/emotion_splits"},
    "pretrained": {"model": "base", "title": "Base"},
    "contributors": {"model0": {"set": "isear"}, "model1": {"set": "ssec"}},
    "layout": "pairs",
    "methods": ["simple"],
    "seeds": ["{seed}"],
}


def write(folder: Path, name: str, values: Any) -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def test_merge_is_by_key_for_mappings_and_replaces_the_rest():
    first = {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"k": 1}}
    second = {"a": {"y": [3], "z": 4}, "c": 5}
    assert merge_values(first, second) == {"a": {"x": 1, "y": [3], "z": 4}, "b": 1, "c": 5}
    assert first == {"a": {"x": 1, "y": [1, 2]}, "b": 1, "c": {"k": 1}}


def test_files_are_merged_left_to_right(tmp_path):
    one = write(tmp_path, "one.yaml", {**WHOLE, "training": {"epochs": 1, "learning_rate": 1e-5}})
    two = write(tmp_path, "two.yaml", {"training": {"epochs": 3}, "methods": ["fisher"]})
    config = load_config([one, two], templates={"seed": "7", "resources": "data"})
    assert config.training == {"epochs": 3, "learning_rate": 1e-5}
    assert [method.method for method in config.methods] == ["fisher"]
    assert config.seeds == (7,)
    assert config.suite.root == "data/emotion_splits"
    assert load_config([two, one], templates={"seed": "7", "resources": "x"}).training["epochs"] == 1


def test_extends_stands_to_the_left_and_is_relative_to_the_file(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "base.yaml", {**WHOLE, "seeds": [1], "templates": {"resources": "here"}})
    child = write(tmp_path / "sub", "child.yaml", {"extends": ["../base.yaml"], "seeds": [2]})
    config = load_config([child])
    assert config.seeds == (2,) and config.suite.root == "here/emotion_splits"
    write(tmp_path, "a.yaml", {"extends": "b.yaml"})
    write(tmp_path, "b.yaml", {"extends": "a.yaml"})
    with pytest.raises(RecipeError, match="extends itself"):
        load_config([tmp_path / "a.yaml"])


def test_files_that_many_extend_are_read_once_and_their_number_is_bounded(tmp_path):
    for number in range(40):  # 2^40 readings, were each of them read as often as it is named
        write(tmp_path, f"{number}.yaml", {"extends": [f"{number + 1}.yaml"] * 2, "seeds": [number]})
    write(tmp_path, "40.yaml", {"suite": "emotion", "seeds": [40]})
    assert read_values(tmp_path / "0.yaml") == {"suite": "emotion", "seeds": [0]}
    for number in range(200):
        write(tmp_path, f"{number}.yaml", {"extends": f"{number + 1}.yaml"})
    with pytest.raises(RecipeError, match="extends more than 100 files"):
        read_values(tmp_path / "0.yaml")


@pytest.mark.parametrize("parents", [5, {"a": 1}, [["a.yaml"]], [None], True, ".", "child.yaml", "x" * 300])
def test_extends_that_names_no_file_is_an_error(tmp_path, parents):
    child = write(tmp_path, "child.yaml", {"extends": parents})
    with pytest.raises(RecipeError):
        read_values(child)


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("-3", -3), ("0.5", 0.5), ("1e-5", 1e-5), ("a1", "a1"), ("", ""), (4, 4)]
)
def test_numeric_texts_become_numbers(text, value):
    assert number_of(text) == value and type(number_of(text)) is type(value)


def test_templates_are_filled_everywhere_and_keep_text_text():
    values = {"a": "{x}", "b": ["p/{x}/{y}", 3], "{y}": {"c": "{y}"}}
    assert fill(values, {"x": "2", "y": "why"}, "f") == {"a": 2, "b": ["p/2/why", 3], "why": {"c": "why"}}


def test_a_template_without_a_value_names_key_and_template(tmp_path):
    path = write(tmp_path, "one.yaml", WHOLE)
    with pytest.raises(UserError) as caught:
        load_config([path], templates={"sead": "1"})
    said = str(caught.value)
    assert "suite.root" in said and "{resources}" in said and "--templates resources=" in said
    assert "seeds[0]" in said and "did you mean 'sead'" in said and "one.yaml" in said


def test_a_template_that_no_file_uses_is_an_error_with_the_nearest_name(tmp_path):
    path = write(tmp_path, "one.yaml", {**WHOLE, "templates": {"resources": "r", "seed": 1}})
    assert load_config([path], templates={"seed": "2"}).seeds == (2,)
    with pytest.raises(UserError, match=r"(?s)resource=.* changes nothing.*did you mean 'resources'"):
        load_config([path], templates={"resource": "x"})
    fixed = write(tmp_path, "two.yaml", {**WHOLE, "seeds": [1, 2], "templates": {"resources": "r"}})
    with pytest.raises(UserError, match=r"(?s)seed=.* changes nothing.*Valid: resources"):
        load_config([fixed], templates={"seed": "1"})


def test_a_template_s_value_may_name_another_template(tmp_path):
    values = {**WHOLE, "seeds": [1], "templates": {"resources": "{home}/r", "home": "here"}}
    path = write(tmp_path, "one.yaml", values)
    assert load_config([path]).suite.root == "here/r/emotion_splits"
    assert load_config([path], templates={"home": "there"}).suite.root == "there/r/emotion_splits"


def test_contributors_of_a_later_file_replace_those_of_an_earlier_one(tmp_path):
    one = write(tmp_path, "one.yaml", {**WHOLE, "seeds": [1], "templates": {"resources": "r"}})
    mapping = write(tmp_path, "two.yaml", {"contributors": {"mine": {"set": "smile"}, "model0": {"set": "tec"}}})
    listed = write(tmp_path, "three.yaml", {"contributors": ["smile", "tec"]})
    assert list(load_config([one, mapping]).contributors) == ["mine", "model0"]
    assert load_config([one, mapping]).set_of("model0") == "tec"
    assert list(load_config([one, listed]).contributors) == ["smile", "tec"]
    mixed = write(tmp_path, "four.yaml", {"contributors": ["smile", {"name": "mine", "set": "tec"}]})
    loaded = load_config([one, mixed])
    assert [loaded.set_of(name) for name in loaded.contributors] == ["smile", "tec"] and "mine" in loaded.contributors
    assert list(load_config([listed, one]).contributors) == ["model0", "model1"]


@pytest.mark.parametrize(("text", "value"), [("yes", "yes"), ("no", "no"), ("maybe", "maybe"), ("'no'", "no")])
def test_yes_and_no_of_the_zoo_need_no_quotes(tmp_path, text, value):
    path = write(tmp_path, "one.yaml", {**WHOLE, "seeds": [1], "templates": {"resources": "r"}})
    own = write(tmp_path, "own.yaml", f"default_model_args: {{load_from_zoo: {text}}}\n")
    config = load_config([path, own])
    assert {args.load_from_zoo for args in config.contributors.values()} == {value}


def test_a_filtered_contributor_keeps_its_seeds(tmp_path):
    """PAPER: model i is trained from seed ((g + i − 2) mod n) + 1, i counted among all models."""
    people = {f"model{n}": {"set": f"set{n}"} for n in range(5)}
    values = {**WHOLE, "contributors": people, "heads": ["different"], "seeds": [1, 2, 3, 4, 5]}
    path = write(tmp_path, "one.yaml", {**values, "templates": {"resources": "r"}})
    whole = {cell for cell in expand(load_config([path])) if cell.kind == "merge"}
    for keep in (["model1", "model3"], ["model3", "model1"]):
        some = [cell for cell in expand(load_config([path], keep=keep)) if cell.kind == "merge"]
        assert len(some) == 5 and set(some) <= whole


def test_filter_keeps_contributors_in_the_given_order_and_refuses_unknown_ones(tmp_path):
    path = write(tmp_path, "one.yaml", {**WHOLE, "seeds": [1], "templates": {"resources": "r"}})
    config = load_config([path], keep=["model1", "model0"])
    assert list(config.contributors) == ["model1", "model0"]
    with pytest.raises(RecipeError, match="matches no contributor") as caught:
        load_config([path], keep=["model7", "model0"])
    assert "model0, model1" in str(caught.value)


def test_contributors_inherit_default_model_args(tmp_path):
    extra = {
        "default_model_args": {"load_from_zoo": "yes", "training": {"epochs": 2, "batch_size": 8}},
        "contributors": {"isear": {"training": {"epochs": 9}}, "ssec": {"load_from_zoo": "no"}},
        "seeds": [1],
        "templates": {"resources": "r"},
    }
    config = load_config([write(tmp_path, "one.yaml", {**WHOLE, **extra})])
    assert config.contributors["isear"].training == {"epochs": 9, "batch_size": 8}
    assert config.contributors["isear"].load_from_zoo == "yes"
    assert config.contributors["ssec"].load_from_zoo == "no"
    assert config.set_of("ssec") == "ssec"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methodz": []}, "unknown key 'methodz'.*methods"),
        ({"suite": {"name": "emotions", "root": "r"}}, "unknown suite 'emotions'.*emotion"),
        ({"methods": ["auto"]}, "auto chooses one of the methods"),
        ({"methods": ["regmeen"]}, "unknown method 'regmeen'.*regmean"),
        ({"methods": [{"method": "regmean", "options": {"alfa": 1}}]}, "alfa"),
        ({"methods": ["simple", "simple"]}, "two methods are called 'simple'"),
        ({"methods": [{"method": "simple", "title": "individual"}]}, "'individual' is what tables call a comparator"),
        ({"methods": [{"method": "simple", "title": "Multi-Task"}]}, "'Multi-Task' is what tables call a comparator"),
        ({"layout": "greedy", "order": ["model0"]}, "order must name every contributor"),
        ({"heads": ["different"]}, "at least two seeds"),
        ({"heads": "separate", "comparators": ["ensemble"]}, "ensemble averages outputs of one task.*individual"),
        ({"heads": ["same", "separate"], "comparators": ["ensemble"]}, "leave ensemble out of comparators"),
        ({"heads": "separate", "tests": {"out_of_domain": ["ssec"]}}, "no head is made for tests.out_of_domain"),
        ({"heads": "separate", "layout": "partitions"}, "share its labels"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"contributors": {"model0": {"sets": "x"}, "model1": {}}}, "unknown key 'contributors.model0.sets'"),
        ({"pretrained": {"model": "m"}}, "pretrained.title' is missing"),
        ({"layout": "triples"}, "layout"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path, change, said):
    values = {**WHOLE, "seeds": [1], "templates": {"resources": "r"}, **change}
    with pytest.raises(UserError, match=r"(?s)one\.yaml.*" + said):
        load_config([write(tmp_path, "one.yaml", values)])


@pytest.mark.parametrize(("text", "said"), [("a: [", "not YAML"), ("- 1", "is a mapping"), (None, "unreadable")])
def test_unreadable_files(tmp_path, text, said):
    path = tmp_path / "one.yaml"
    if text is not None:
        write(tmp_path, "one.yaml", text)
    with pytest.raises(RecipeError, match=f"(?s)one.yaml.*{said}"):
        load_config([path])


def test_heads_that_cannot_all_differ_are_remarked_on(tmp_path):
    path = write(tmp_path, "one.yaml", {**WHOLE, "heads": ["different"], "seeds": [1, 2]})
    assert load_config([path], templates={"resources": "x"}).remarks() == []
    three = {**WHOLE["contributors"], "model2": {"set": "smile"}}
    path = write(
        tmp_path, "two.yaml", {**WHOLE, "heads": ["same", "different"], "seeds": [1, 2], "contributors": three}
    )
    (remark,) = load_config([path], templates={"resources": "x"}).remarks()
    assert "3 contributors" in remark and "2 seeds" in remark
