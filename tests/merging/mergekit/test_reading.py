"""Configurations of mergekit, read and translated: what comes out, and what is refused with which words."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml

from merganser.errors import RecipeError, UserError
from merganser.merging.mergekit import read_configuration, read_stages, translate
from merganser.merging.mergekit.schema import is_mergekit
from merganser.merging.recipe import make_recipe


def translated(text):
    values = yaml.safe_load(text)
    assert is_mergekit(values)
    return translate(read_configuration(values, "file"), "file")


def refused(text):
    with pytest.raises(UserError) as caught:
        translated(text)
    return str(caught.value)


TIES = """
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - model: org/a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: other/a@v2
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {filter: "[x]", value: "1e-1"}, {value: 0}]
parameters: {normalize: true, int8_mask: true, lambda: 2}
dtype: float32
"""


def test_a_parameter_becomes_an_option_a_coefficient_or_a_rule():
    recipe = translated(TIES).recipe
    assert recipe["base"] == "org/base" and recipe["method"] == "ties" and recipe["dtype"] == "F32"
    first, second = recipe["contributors"]
    assert first["model"] == "org/a" and second["model"] == "other/a@v2" and first["name"] != second["name"]
    assert first["coefficient"] == 1 and first["options"] == {"density": [1.0, 0.7, 0.1]}
    assert second["coefficient"] == 0 and second["options"] == {"density": 0.33}
    assert recipe["options"] == {"normalize": True, "rescale": "none", "scale": 2.0}
    assert recipe["rules"] == [
        {"tensors": ["*mlp*"], "optional": True, "contributors": {second["name"]: {"coefficient": 0.5}}},
        {"tensors": ["*[[]x]*"], "optional": True, "contributors": {second["name"]: {"coefficient": 0.1}}},
    ]
    make_recipe({**recipe, "method": "ties"})


def test_rules_keep_the_order_of_each_parameters_own_conditions():
    recipe = translated("""
        merge_method: ties
        base_model: base
        models:
          - model: a
            parameters: {weight: [{filter: x, value: 1}, {filter: y, value: 2}, {value: 3}]}
          - model: b
            parameters: {weight: [{filter: y, value: 4}, {filter: x, value: 5}, {value: 6}]}
        """).recipe

    def weight(name, person):
        for rule in recipe["rules"]:
            own = rule["contributors"].get(person, {})
            if rule["tensors"][0].strip("*") in name and "coefficient" in own:
                return own["coefficient"]
        return next(one["coefficient"] for one in recipe["contributors"] if one["name"] == person)

    assert [weight(name, "a") for name in ("xy", "x", "y", "z")] == [1, 1, 2, 3]
    assert [weight(name, "b") for name in ("xy", "x", "y", "z")] == [4, 5, 4, 6]


@pytest.mark.parametrize(("where", "expected"), [("source", 1), ("slice", 2), ("everything", 3)])
def test_the_innermost_place_counts(where, expected):
    values = {"source": {"weight": 1}, "slice": {"weight": 2}, "everything": {"weight": 3}}
    order = ["source", "slice", "everything"]
    used = {name: values[name] if order.index(name) >= order.index(where) else {} for name in order}
    source = {"model": "a", "layer_range": [0, 2], "parameters": used["source"]}
    recipe = translate(
        read_configuration(
            {
                "merge_method": "linear",
                "slices": [{"sources": [source], "parameters": used["slice"]}],
                "parameters": used["everything"],
            },
            "",
        ),
        "",
    ).recipe
    assert recipe["contributors"] == [{"model": "a", "name": "a", "coefficient": expected}]
    assert recipe["layers"] == [{"sources": [{"contributor": "a", "range": [0, 2]}]}]


def test_a_condition_of_an_outer_place_holds_for_what_the_inner_ones_leave():
    recipe = translated("""
        merge_method: linear
        models:
          - {model: a, parameters: {weight: {filter: mlp, value: 7}}}
          - {model: b, parameters: {weight: 1}}
        parameters: {weight: [{filter: attn, value: 8}, {filter: "*", value: 9}, {filter: never, value: 1}]}
        """).recipe
    assert [one["coefficient"] for one in recipe["contributors"]] == [9, 1]
    assert [rule["tensors"] for rule in recipe["rules"]] == [["*mlp*"], ["*attn*"]]


def test_defaults_of_mergekit_are_spelled_out():
    def options(method, more=""):
        return translated(
            f"{{merge_method: {method}, base_model: base, parameters: {{weight: 1{more}}}, models: [{{model: a}}]}}"
        ).recipe

    ties = options("ties")
    assert ties["options"] == {"normalize": True, "rescale": "none", "scale": 1.0}
    assert ties["contributors"][0]["options"] == {"density": 1.0}
    assert options("dare_ties")["options"] == {"normalize": False, "rescale": "l1", "scale": 1.0}
    assert options("della")["contributors"][0]["options"] == {"density": 1.0, "epsilon": 0.15}
    assert options("breadcrumbs", ", lambda: 0.5")["options"]["scale"] == 0.5
    assert options("task_arithmetic")["options"] == {"normalize": False, "scale": 1.0}


def test_slerp_starts_at_the_base_wherever_it_stands():
    recipe = translated("""
        merge_method: slerp
        base_model: b
        slices: [{sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]}]
        parameters: {t: [{filter: self_attn, value: [0, 1]}, {value: 0.3}]}
        """).recipe
    assert [one["name"] for one in recipe["contributors"]] == ["b", "a"] and "base" not in recipe
    assert recipe["options"] == {"t": 0.3, "linear_above": 0.9995} and recipe["rules"][0]["options"] == {
        "t": [0.0, 1.0]
    }
    assert recipe["tokenizer_from"] == "b"


def test_slices_become_blocks_of_layers():
    recipe = translated("""
        merge_method: passthrough
        slices:
          - sources: [{model: org/a, layer_range: [0, 3]}]
          - sources:
              - {model: org/b, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0}, {value: 1}]}}
        """).recipe
    first, second = recipe["layers"]
    assert first == {"sources": [{"contributor": "a", "range": [0, 3]}]}
    assert second["sources"] == [{"contributor": "b", "range": [1, 4], "options": {"scale": 1.0}}]
    assert second["rules"] == [
        {"tensors": ["*o_proj*"], "optional": True, "contributors": {"b": {"options": {"scale": 0.0}}}}
    ]


def test_a_base_model_is_one_more_input_of_linear():
    recipe = translated(
        "{merge_method: linear, base_model: base, models: [{model: a}], parameters: {weight: 1}}"
    ).recipe
    assert [one["model"] for one in recipe["contributors"]] == ["a", "base"] and "base" not in recipe
    assert len({one["name"] for one in recipe["contributors"]} - {"base"}) == 2  # base means something else in a recipe


def test_models_are_read_however_they_are_written():
    recipe = translated("""
        merge_method: linear
        models:
          - model: {model: {path: org/a, revision: main}, lora: {path: org/lora}}
          - model: {path: org/b}
          - model: org/c@v1+org/lora@v2
        parameters: {weight: 1}
        """).recipe
    assert [one["model"] for one in recipe["contributors"]] == [
        "org/a@main+org/lora", "org/b", "org/c@v1+org/lora@v2",
    ]  # fmt: skip


def test_what_is_skipped_is_told():
    notes = " ".join(
        translated("""
        merge_method: linear
        models: [{model: a, parameters: {weight: 1, normalize: false}}]
        parameters: {density: 0.5}
        dtype: bfloat16
        """).notes
    )
    assert "density" in notes and "normalize" in notes and "bfloat16" in notes
    notes = " ".join(
        translated(TIES.replace("- model: org/base\n", "- model: org/base\n    parameters: {weight: 1}\n")).notes
    )
    assert "base model" in notes


@pytest.mark.parametrize("text", ["layers.2.mlp", "layers.2", "2.mlp", "layers.12.", "experts.2.", "layers.7.", "mlp"])
def test_filters_of_models_mean_their_own_layers(text):
    """mergekit looks for a filter in the names of the model's own files, however layers are numbered in the result."""
    recipe = translated(f"""
        merge_method: linear
        slices:
          - sources: [{{model: a, layer_range: [0, 5]}}, {{model: b, layer_range: [1, 6]}}]
          - sources:
              - {{model: a, layer_range: [2, 24], parameters: {{weight: [{{filter: {text}, value: 2}}, {{value: 3}}]}}}}
              - {{model: b, layer_range: [0, 22]}}
        parameters: {{weight: 1}}
        """).recipe
    rules = recipe["layers"][1].get("rules", [])
    for own in range(2, 24):
        for rest in ("mlp.experts.2.w1", "mlp.up_proj", "attention"):
            result, stored = (f"model.layers.{number}.{rest}.weight" for number in (own + 3, own))
            held = any(fnmatchcase(result, pattern) for rule in rules for pattern in rule["tensors"])
            assert held == (text in stored), (result, stored)


def test_a_text_decoder_is_what_no_other_module_is():
    modules = {name: {"models": [{"model": "a"}, {"model": "b"}]} for name in ("text_decoder", "vision_tower")}
    modules["text_decoder"]["parameters"], modules["vision_tower"]["parameters"] = {"weight": 2}, {"weight": 3}
    for order in (modules, dict(reversed(modules.items()))):
        recipe = translated(yaml.safe_dump({"merge_method": "linear", "modules": order}, sort_keys=False)).recipe
        for name, weight in (
            ("model.layers.0.mlp.weight", 2),
            ("lm_head.weight", 2),
            ("language_model.model.norm.weight", 2),
            ("visual.blocks.0.attn.proj.weight", 3),
            ("vision_tower.vision_model.post_layernorm.weight", 3),
        ):
            first = next(r for r in recipe["rules"] if any(fnmatchcase(name, pattern) for pattern in r["tensors"]))
            assert first["contributors"]["a"]["coefficient"] == weight, name
    halves = {name: {"models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}} for name in ("encoder",)}
    told = translated(yaml.safe_dump({"merge_method": "linear", "modules": halves})).notes
    assert any("not named are merged, with equal weights" in note for note in told)
    alone = translated(yaml.safe_dump({"merge_method": "linear", "modules": {"text_decoder": modules["text_decoder"]}}))
    assert any("not named are merged as text_decoder" in note for note in alone.notes)


def test_a_chat_template_can_be_that_of_a_model():
    text = (
        "merge_method: linear\nmodels: [{model: x/a, parameters: {weight: 1}}, {model: x/b, parameters: {weight: 1}}]\n"
    )
    for name in ("a", "x/a"):
        assert translated(f"{text}chat_template: {name}").recipe["chat_template"] == "a"
    assert "whose it is: one of a, b" in refused(f"{text}chat_template: chatml")


def test_modules_are_rules_for_the_names_of_their_tensors():
    recipe = translated("""
        merge_method: linear
        modules:
          encoder: {models: [{model: a}, {model: b, parameters: {weight: [{filter: mlp, value: 2}, {value: 3}]}}]}
          decoder: {models: [{model: a}, {model: b}], parameters: {weight: 4}}
          shared: {models: [{model: a}, {model: b}]}
        parameters: {weight: 5}
        """).recipe

    def weights(name):
        found = {}
        for rule in recipe["rules"]:
            if any(fnmatchcase(name, pattern) for pattern in rule["tensors"]):
                for person, own in rule["contributors"].items():
                    found.setdefault(person, own["coefficient"])
        return found["a"], found["b"]

    assert weights("encoder.block.0.mlp.weight") == (5, 2) and weights("encoder.block.0.attention.weight") == (5, 3)
    assert weights("decoder.block.0.mlp.weight") == (4, 4) and weights("shared.weight") == (5, 5)
    assert [one["name"] for one in recipe["contributors"]] == ["a", "b"]
    make_recipe(recipe)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{merge_method: teis, models: [{model: a}]}", ["'teis'", "did you mean 'ties'"]),
        ("{merge_method: linear, model: [{model: a}]}", ["'model'", "did you mean 'models'"]),
        ("{merge_method: linear, models: [{modle: a}]}", ["'models.0.modle'", "did you mean 'model'"]),
        (
            "{merge_method: linear, slices: [{sources: [{model: a, layer_rnage: [0, 1]}]}]}",
            ["layer_rnage", "did you mean 'layer_range'"],
        ),
        ("{merge_method: linear, models: [{model: a, parameters: {weigth: 1}}]}", ["did you mean 'weight'"]),
        ("{merge_method: linear, models: [{model: a, weight: 1}]}", ["models.0", "write parameters: {weight: 1}"]),
        ("{merge_method: slerp, base_model: a, t: 0, models: [{model: a}, {model: b}]}", ["write parameters: {t: 0}"]),
        (
            "{merge_method: linear, models: [{model: a}], parameters: {weight: [{patern: x, value: 1}]}}",
            ["patern", "filter, value"],
        ),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: heavy}}", ["'heavy'", "number"]),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: []}}", ["one or more"]),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: [[1]]}}", ["number"]),
        ("{merge_method: linear, models: [{model: a}], parameters: {weight: 1, normalize: 2}}", ["true or false"]),
        ("{merge_method: linear, models: [{model: a}]}", ["weight is missing", "parameters: {weight"]),
        (
            "{merge_method: linear, models: [{model: a}, {model: b}, {model: c}, {model: d}, {model: e}]}",
            ["file: models: a, models: b, models: c and 2 more: the weight is missing"],
        ),
        (
            "{merge_method: linear, models: [{model: a, parameters: {weight: {filter: x, value: 1}}}]}",
            ["no filter holds", "- value:"],
        ),
        ("{merge_method: linear}", ["nothing to merge", "models, slices and modules"]),
        ("{merge_method: linear, models: [{model: a}], slices: []}", ["weight"]),
        ("{base_model: a, models: [{model: a}]}", ["merge_method", "missing"]),
        ("{merge_method: ties, models: [{model: a}], parameters: {weight: 1}}", ["needs a base", "base_model"]),
        ("{merge_method: slerp, base_model: a, models: [{model: a}], parameters: {t: 0}}", ["exactly 2"]),
        ("{merge_method: passthrough, models: [{model: a}, {model: b}]}", ["exactly 1", "a slice of its own", "are 2"]),
        ("{merge_method: karcher, models: [{model: a}, {model: a}]}", ["there twice"]),
        ("{merge_method: karcher, models: [{model: a}], dtype: int4}", ["int4", "bfloat16"]),
        (
            "{merge_method: karcher, models: [{model: a}], tokenizer: {source: c}}",
            ["tokenizer: c", "none of the models"],
        ),
        (
            "{merge_method: karcher, models: [{model: a}], tokenizer: {tokens: {x: {source: {kind: one}}}}}",
            ["model_token or zero"],
        ),
        (
            "{merge_method: karcher, models: [{model: a}], tokenizer: {tokens: {x: {source: {kind: model_token, "
            "model: a}}}}}",
            ["token or token_id"],
        ),
        (
            "{merge_method: karcher, models: [{model: a}], tokenizer: {source: union}, tokenizer_source: union}",
            ["both given"],
        ),
        (
            "{merge_method: karcher, models: [{model: {model: a, override_architecture: X}}]}",
            ["override_architecture"],
        ),
        ("{base_model: a, gate_mode: random, experts: [{source_model: b}]}", ["mergekit-moe", "merganser moe"]),
        ("{merge_method: karcher, models: [{model: a}], chat_template: chatml}", ["'chatml'", "one of a"]),
        ("{merge_method: karcher, modules: {brain: {models: [{model: a}]}}}", ["unknown module 'brain'"]),
        (
            "{merge_method: linear, slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: "
            "[0, 3]}]}], parameters: {weight: 1}}",
            ["different numbers of layers"],
        ),
        (
            "{merge_method: ties, base_model: c, slices: [{base_model: d, sources: [{model: a, layer_range: [0, 2]}, "
            "{model: c, layer_range: [0, 2]}]}], parameters: {weight: 1}}",
            ["slices[0].base_model", "stages"],
        ),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_with_a_mend(text, words):
    said = refused(text)
    assert all(word in said for word in words), said
    assert "to mend" in said


def test_all_mistakes_are_found_at_once():
    said = refused("{merge_method: linear, dtyp: a, models: [{modle: a}], tokenizer: {sorce: b}}")
    assert said.startswith("4 problems") and all(word in said for word in ("dtype", "model", "source"))


# ── several documents ──

STAGES = """
merge_method: slerp
base_model: org/a
models: [{model: org/a}, {model: org/b}]
parameters: {t: 0.5}
name: first
---
merge_method: linear
models: [{model: first}, {model: first+org/lora}, {model: org/firsts}]
parameters: {weight: 1}
"""


def stages_of(tmp_path: Path, text: str, folder: str | None = "between"):
    file = tmp_path / "file.yaml"
    file.write_text(text)
    return read_stages(file, None if folder is None else tmp_path / folder)


def test_later_documents_use_what_earlier_ones_make(tmp_path):
    first, last = stages_of(tmp_path, STAGES)
    assert first.name == "first" and first.folder == tmp_path / "between" / "first" and last.folder is None
    assert [one["model"] for one in last.recipe["contributors"]] == [
        str(first.folder), f"{first.folder}+org/lora", "org/firsts",
    ]  # fmt: skip


def test_the_order_of_documents_does_not_matter(tmp_path):
    one, other = STAGES.split("---")
    stages = stages_of(tmp_path, f"{other}---{one}")
    assert [stage.name for stage in stages] == ["first", None]


def test_documents_with_paths_as_names(tmp_path):
    text = STAGES.replace("name: first", "out_path: ./models/first").replace("model: first", "model: ./models/first")
    first, last = stages_of(tmp_path, text + "out_path: ./models/last\n")
    assert first.folder == tmp_path / "between" / "first" and last.name is None
    assert last.recipe["contributors"][0]["model"] == str(first.folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (STAGES.replace("name: first\n", ""), "2 documents have no name"),
        (STAGES.replace("org/b}", "second}") + "name: second\n---\nmerge_method: linear\nmodels: [{model: first}]\n"
         "parameters: {weight: 1}\n", "use each other"),
        (STAGES + "---\nname: first\nmerge_method: linear\nmodels: [{model: x}]\n", "two documents"),
        (STAGES.replace("name: first", "name: ..") + "", "no name"),
        (STAGES + "---\nmethod: ties\ncontributors: [a]\nname: third\n", "document 3"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        stages_of(tmp_path, text)


def test_recipes_of_ours_are_no_configuration_of_mergekit(tmp_path):
    assert stages_of(tmp_path, "method: ties\ncontributors: [a, b]\n") == []
    assert stages_of(tmp_path, "contributors: [a, b]\n") == []
    assert stages_of(tmp_path, "models: [a, b]\nbase: c\noptions: {density: 1}\n") == []  # to be told what is wrong


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\nmodels: &a [{model: *a}]\n",
        "merge_method: linear\nmodels: [" + "[" * 200 + "]" * 200 + "]\n",
        "merge_method: !!python/object:os.system {}\n",
        "merge_method: linear\nmerge_method: ties\n",
        "merge_method: linear\nmodels: 3\n",
        "merge_method: [1]\nmodels: [{model: a}]\n",
        "merge_method: linear\nmodels: [{model: [a]}]\n",
        "merge_method: linear\nmodels: [{model: a, parameters: [1]}]\n",
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: {value: {value: 1}}}\n",
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1, 2]}]}]\nparameters: {weight: 1}\n",
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 3]}]}]\nparameters: {weight: 1}\n",
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [-1, 3]}]}]\nparameters: {weight: 1}\n",
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: .nan}\n",
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1e999}\n",
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {1: 2}\n",
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {pad_to_multiple_of: 0}\nparameters: {weight: 1}\n",
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {tokens: [a]}\nparameters: {weight: 1}\n",
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer: 7\nparameters: {weight: 1}\n",
        "merge_method: linear\nmodels: [{model: a}]\nmodules: {default: {}}\nparameters: {weight: 1}\n",
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {tokens: {x: {source: {kind: [1]}}}}\n",
        "merge_method: ties\nbase_model: b\nmodels: [{model: a, parameters: {weight: ''}}]\n",
        "- merge_method\n---\nmerge_method: linear\n",
    ],
)
def test_what_a_stranger_wrote_is_an_error_and_no_crash(tmp_path, text):
    with pytest.raises(UserError):
        stages_of(tmp_path, text)
