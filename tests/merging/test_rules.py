"""Rules: which tensor gets which method, options and coefficients; against float64 arithmetic written here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers import AutoModelForSequenceClassification as Classifier

from adapter_examples import adapt_linears, oracle
from conftest import make_model
from merganser.errors import UserError
from merganser.merging import Plan, make_plan, make_recipe, merge, reproduce, verify
from merganser.merging.matching import Fill, RowMap
from merganser.merging.rules import interpolated
from merganser.methods import IN_TURN, METHODS
from merganser.methods.auto import AUTO
from merganser.methods.names import METHODS_ELSEWHERE, suggest_method

Family = Callable[..., tuple[Path, list[Path]]]
State = dict[str, torch.Tensor]


def opened(folder: Path, kind: Any = AutoModelForCausalLM) -> State:
    """The parameters of the model that opens, in float64; no key may be missing or unexpected."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def averaged(states: list[State], weights: list[float], name: str) -> torch.Tensor:
    return sum(w * state[name] for w, state in zip(weights, states, strict=True)) / sum(weights)


def arithmetic(base: State, states: list[State], weights: list[float], scale: float, name: str) -> torch.Tensor:
    return base[name] + scale * sum(w * (s[name] - base[name]) for w, s in zip(weights, states, strict=True))


def trimmed(base: torch.Tensor, tuned: torch.Tensor, density: float) -> torch.Tensor:
    """What TIES leaves of a task vector: its largest numbers."""
    delta = tuned - base
    kept = max(1, int(density * delta.numel()))
    threshold = delta.abs().flatten().topk(kept).values[-1]
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def carried_out(folder: Path, models: list[Path], **recipe: Any) -> Path:
    """The result of a recipe as one would write it in YAML."""
    people = recipe.pop("contributors", [{}] * len(models))
    listed = [{"model": str(model), **own} for model, own in zip(models, people, strict=True)]
    return Path(merge(make_recipe({"contributors": listed, **recipe}), folder))


def close(found: State, expected: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_methods_by_role_and_name(family: Family, tmp_path: Path) -> None:
    base, models = family("llama", 2, statistics=False, num_hidden_layers=3)
    rules = [
        {"role": "norm", "take": "base"},
        {"tensors": "*.layers.1.*", "role": "mlp", "method": "simple", "contributors": {"tuned-0": {"coefficient": 3}}},
        {"role": ["embedding", "head"], "take": "tuned-1"},
        {"role": "attention", "options": {"scale": 0.25}},
    ]
    out = carried_out(
        tmp_path / "out", models, method="task_arithmetic", options={"scale": 0.5}, base=str(base), rules=rules
    )
    found, origin, states = opened(out), opened(base), [opened(model) for model in models]
    expected = {}
    for name in found:
        if "norm" in name:
            expected[name] = origin[name]
        elif "layers.1.mlp" in name:
            expected[name] = averaged(states, [3, 1], name)
        elif "embed_tokens" in name or "lm_head" in name:
            expected[name] = states[1][name]
        else:
            expected[name] = arithmetic(origin, states, [1, 1], 0.25 if "self_attn" in name else 0.5, name)
    close(found, expected)
    assert verify(out).parents and not reproduce(out, tmp_path / "again")


def test_each_contributor_has_options_of_its_own(family: Family, tmp_path: Path) -> None:
    base, models = family("bert", 2, statistics=False)
    out = carried_out(
        tmp_path / "out",
        models,
        method="ties",
        base=str(base),
        options={"density": 0.5, "scale": 0.7},
        contributors=[{}, {"options": {"density": 0.2}}],
        rules=[{"tensors": "*.layer.1.*", "contributors": {"tuned-0": {"options": {"density": 0.9}}}}],
    )
    found, origin = opened(out, Classifier), opened(base, Classifier)
    states = [opened(model, Classifier) for model in models]
    expected = {}
    for name in (name for name in found if name.endswith("dense.weight")):
        densities = [0.9 if ".layer.1." in name else 0.5, 0.2]
        deltas = [trimmed(origin[name], s[name], d) for s, d in zip(states, densities, strict=True)]
        sign = torch.where(sum(deltas) < 0, -1.0, 1.0)
        agreed = [torch.where(delta * sign > 0, delta, 0.0) for delta in deltas]
        voters = sum((delta != 0).double() for delta in agreed)
        expected[name] = origin[name] + 0.7 * sum(agreed) / voters.clamp_min(1)
    close(found, expected)


def test_gradients_over_depth(family: Family, tmp_path: Path) -> None:
    base, models = family("llama", 2, statistics=False, num_hidden_layers=5)
    out = carried_out(
        tmp_path / "out",
        models,
        method="task_arithmetic",
        base=str(base),
        options={"scale": [1.0, 0.0, 2.0]},
        contributors=[{"coefficient": [0, 1]}, {"coefficient": 0.5}],
    )
    found, origin, states = opened(out), opened(base), [opened(model) for model in models]
    scale, first = [1.0, 0.5, 0.0, 1.0, 2.0], [0.0, 0.25, 0.5, 0.75, 1.0]
    expected = {}
    for name in found:
        number = re.search(r"layers\.(\d)\.", name)
        depth = int(number[1]) if number else 0
        expected[name] = arithmetic(origin, states, [first[depth], 0.5], scale[depth], name)
    close(found, expected)
    assert verify(out).parents and not reproduce(out, tmp_path / "again")
    assert "| tuned-0 | 0, 1 |" in (out / "README.md").read_text()


def test_each_stack_of_layers_has_its_own_depth(tmp_path: Path) -> None:
    models = []
    for number in range(2):
        torch.manual_seed(number)
        sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "vocab_size": 32}
        model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=3, num_decoder_layers=2))
        models.append(tmp_path / f"t5-{number}")
        model.save_pretrained(models[-1])
    out = carried_out(
        tmp_path / "out", models, method="simple", contributors=[{"coefficient": [0, 1]}, {"coefficient": [1, 0]}]
    )
    found = opened(out, AutoModelForSeq2SeqLM)
    states = [opened(model, AutoModelForSeq2SeqLM) for model in models]
    expected = {}
    for name in found:
        number = re.search(r"(encoder|decoder)\.block\.(\d)\.", name)
        share = 0.0 if number is None else int(number[2]) / (2 if number[1] == "encoder" else 1)
        expected[name] = share * states[0][name] + (1 - share) * states[1][name]
    close(found, expected)


def test_where_every_coefficient_is_zero_the_base_is_left(family: Family, tmp_path: Path) -> None:
    base, models = family("llama", 1, statistics=False, num_hidden_layers=2)
    out = carried_out(tmp_path / "out", models, method="ties", base=str(base), contributors=[{"coefficient": [0, 1]}])
    found, origin = opened(out), opened(base)
    for name, tensor in origin.items():
        assert torch.equal(found[name], tensor) != (".layers.1." in name)
    plan = json.loads((out / "provenance.json").read_text())["plan"]
    assert any(step.get("rule") == "every coefficient is 0 here" for step in plan["steps"])


def test_experts_and_routers(family: Family, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32, "num_experts": 3}
    models = []
    for number in range(2):
        torch.manual_seed(number)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts_per_tok=1, tie_word_embeddings=False))
        models.append(tmp_path / f"moe-{number}")
        model.save_pretrained(models[-1])
    rules = [{"role": "router", "take": "moe-1"}, {"role": "expert", "contributors": {"moe-0": {"coefficient": 3}}}]
    out = carried_out(tmp_path / "out", models, method="simple", rules=rules)
    found, states = opened(out), [opened(model) for model in models]
    expected = {}
    for name in found:
        if "mlp.gate." in name:
            expected[name] = states[1][name]
        else:
            expected[name] = averaged(states, [3, 1] if "experts" in name else [1, 1], name)
    close(found, expected)


def plan_of(models: list[Path], **recipe: Any) -> Plan:
    people = recipe.pop("contributors", [{}] * len(models))
    listed = [{"model": str(model), **own} for model, own in zip(models, people, strict=True)]
    return make_plan(make_recipe({"contributors": listed, **recipe}))


def test_the_plan_says_what_each_tensor_gets_and_why(family: Family) -> None:
    base, models = family("bert", 2, statistics=False)
    rules = [{"role": "norm", "take": "tuned-0"}, {"tensors": "*attention*", "method": "simple"}]
    plan = plan_of(models, method="ties", base=str(base), rules=rules)
    said = {step.unit.names[0]: (step.method, step.rule, step.asked) for step in plan.steps}
    assert said["bert.encoder.layer.0.output.LayerNorm.weight"] == ("taken", "rules.0 (role norm)", None)
    assert said["bert.encoder.layer.0.attention.self.key.weight"] == ("simple", "rules.1 (*attention*)", "simple")
    assert said["bert.encoder.layer.0.output.dense.weight"] == ("ties", None, None)
    assert plan.coverage.share == 1  # every linear weight has what its own rule asks for
    assert {(part.method, part.rule) for part in plan.treatments} == {(one[0], one[1]) for one in said.values()}
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())), "here")
    assert again == plan


def test_the_same_bytes_whatever_slices_and_threads(family: Family, tmp_path: Path) -> None:
    base, models = family("llama", 2, statistics=False)
    recipe = make_recipe(
        {
            "contributors": [
                {"model": str(models[0]), "coefficient": [0.3, 1]},
                {"model": str(models[1]), "options": {"density": [0.2, 0.9]}},
            ],
            "method": "ties", "base": str(base),
            "rules": [{"role": "mlp", "method": "task_arithmetic"}, {"role": "head", "take": "tuned-1"}],
        }
    )  # fmt: skip
    one = Path(merge(recipe, tmp_path / "one", threads=1)) / "model.safetensors"
    two = Path(merge(recipe, tmp_path / "two", threads=2, max_memory="3GB")) / "model.safetensors"
    assert one.read_bytes() == two.read_bytes()


def test_computation_in_float64(family: Family, tmp_path: Path) -> None:
    _, models = family("llama", 3, statistics=False)
    out = carried_out(tmp_path / "out", models, method="simple", computation="F64", dtype="F64")
    found, states = opened(out), [opened(model) for model in models]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, averaged(states, [1, 1, 1], name), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("value", "share", "expected"),
    [
        (0.3, 0.7, 0.3),
        ([0, 1], 0.25, 0.25),
        ([1, 2, 4], 0.75, 3.0),
        ([1, 2, 4], 1.0, 4),
        ([5], 0.5, 5),
        ([True, False], 0.9, True),
        (["a", "b", "c"], 0.5, "b"),
    ],
)
def test_interpolation(value: Any, share: float, expected: Any) -> None:
    assert interpolated(value, share) == expected


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"method": "linear"}, "linear is called simple here"),
        ({"method": "task-arithmetic"}, "task-arithmetic is called task_arithmetic here"),
        ({"method": "tise"}, "did you mean 'ties'"),
        ({"contributors": [{"weight": 1}, {}]}, "weight is called coefficient here"),
        ({"contributors": [{"parameters": {}}, {}]}, "parameters is called options here"),
        ({"merge_method": "ties"}, "merge_method is called method here"),
        ({"rules": [{"role": "mlp", "metod": "ties"}]}, "did you mean 'method'"),
        ({"rules": [{"role": "mlp", "method": "average"}]}, "average is called simple here"),
        ({"rules": [{"role": "mlp", "contributors": {"tuned-0": {"weight": 1}}}]}, "weight is called coefficient here"),
        ({"rules": [{"role": "mlp", "contributors": {"tuned-9": {"coefficient": 1}}}]}, "did you mean 'tuned-"),
        ({"rules": [{"role": "mlp", "take": "base"}]}, "there is no base model"),
        ({"rules": [{"role": "mlp"}]}, "says nothing"),
        ({"rules": [{"role": "mlp", "take": "tuned-0", "method": "ties"}]}, "as it is has no method"),
        ({"rules": [{"role": "atention", "take": "tuned-0"}]}, "did you mean 'attention'"),
        ({"rules": [{"role": "expert", "take": "tuned-0"}]}, "have the roles"),
        ({"rules": [{"tensors": "attention", "take": "tuned-0"}]}, r"write '\*attention\*'"),
        ({"rules": [{"tensors": "*.atention.*", "take": "tuned-0"}]}, "such as 'bert.*attention"),
        ({"rules": [{"role": "mlp", "options": {"densty": 1}}]}, "no method of these tensors"),
        ({"rules": [{"role": "mlp", "method": "ties", "options": {"densty": 1}}]}, "did you mean 'density'"),
        ({"rules": [{"role": "mlp", "method": "task_arithmetic"}]}, "needs the pre-trained model"),
        ({"rules": [{"role": "mlp", "method": "regmean"}]}, "has no statistics"),
        ({"contributors": [{"coefficient": []}, {}]}, "empty list"),
        ({"contributors": [{"coefficient": [1, "x"]}, {}]}, "list of numbers"),
        ({"contributors": [{"options": {"scale": 1}}, {}]}, "no method of these tensors"),
        ({"contributors": [{"coefficient": [0, 1]}, {"coefficient": [0, 1]}]}, "every coefficient is zero"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_mend(shared: list[Path], recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(shared, **{"method": "simple", **recipe})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two BERTs that nothing is written to."""
    folders = []
    for number in range(2):
        folders.append(tmp_path_factory.mktemp("shared") / f"tuned-{number}")
        make_model("bert", number).save_pretrained(folders[-1])
    return folders


@pytest.mark.parametrize("own", [{"coefficient": 2}, {"options": {"density": 0.5}}])
@pytest.mark.parametrize("place", ["rules", "layers"])
def test_the_base_has_no_weight_of_its_own(shared: list[Path], own: dict[str, Any], place: str) -> None:
    sources = [{"contributor": name, "range": [0, 2]} for name in ("tuned-0", "tuned-1")]
    places: dict[str, Any] = {
        "rules": [{"role": "mlp", "contributors": {"base": own}}],
        "layers": [{"sources": [*sources, {"contributor": "base", "range": [0, 2], **own}]}],
    }
    asked = {"method": "ties", "base": str(shared[0]), place: places[place]}
    with pytest.raises(UserError, match=rf"{place}\.0: the base is no contributor"):
        plan_of(shared, **asked)


def test_a_contributor_may_be_called_base(shared: list[Path]) -> None:
    rules = [{"role": "mlp", "contributors": {"base": {"coefficient": 2}}}]
    people = [{"name": "base"}, {"name": "other"}]
    plan = plan_of(shared, method="ties", base=str(shared[1]), rules=rules, contributors=people)
    assert {step.coefficients for step in plan.steps} == {(1.0, 1.0), (2.0, 1.0)}


@pytest.mark.parametrize(
    ("first", "second", "idle"),
    [("*mlp*", "*nowhere*", ["*mlp*", "*nowhere*"]), ("*layer.0.*", "*layer.0.*", []), ("*", "*bert*", [])],
)
def test_rules_without_effect_are_told_of(shared: list[Path], first: str, second: str, idle: list[str]) -> None:
    sources = [{"contributor": name, "range": [0, 1]} for name in ("tuned-0", "tuned-1")]
    rule = {"optional": True, "contributors": {"tuned-0": {"coefficient": 2}}}
    blocks = [{"sources": sources, "rules": [{**rule, "tensors": pattern}]} for pattern in (first, second)]
    notes = [note for note in plan_of(shared, method="simple", layers=blocks).notes if "no effect" in note]
    assert [note.split(":")[0] for note in notes] == [f"no tensor matches {pattern}" for pattern in idle]


def test_options_that_are_one_for_all(shared: list[Path]) -> None:
    with pytest.raises(UserError, match="one for all contributors; these can: density"):
        plan_of(shared, method="ties", base=str(shared[0]), contributors=[{"options": {"scale": 1}}, {}])


@pytest.mark.parametrize(("asked", "expected"), [("auto", "often"), ("one", "rare"), ("{{ own }}", "{{ own }}")])
def test_chat_templates(tmp_path: Path, asked: str, expected: str) -> None:
    models = []
    for number, template in enumerate(["often", "rare", "often"]):
        models.append(tmp_path / ("zero", "one", "two")[number])
        make_model("llama", number).save_pretrained(models[-1])
        byte_tokenizer(models[-1], template)
    out = carried_out(tmp_path / "out", models, method="simple", chat_template=asked)
    assert AutoTokenizer.from_pretrained(out).chat_template == expected
    assert verify(out).parents and not reproduce(out, tmp_path / "again")
    with pytest.raises(UserError, match="did you mean 'one'"):
        plan_of(models, method="simple", chat_template="ona")


def byte_tokenizer(folder: Path, template: str) -> None:
    """A tokenizer of a few words with a chat template, as older versions wrote it into its configuration."""
    words = {word: number for number, word in enumerate(["[UNK]", "a", "b", "c"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")))
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))


def test_what_methods_are_called_elsewhere() -> None:
    known = {*METHODS, *IN_TURN, AUTO}
    assert set(METHODS_ELSEWHERE.values()) <= known and not set(METHODS_ELSEWHERE) & known
    assert suggest_method("Git-ReBasin", METHODS) == "Git-ReBasin is called rebasin here"
    assert suggest_method("tsvm", METHODS) == "tsvm is called tsv_m here"


def test_the_base_may_be_one_of_the_models(family: Family, tmp_path: Path) -> None:
    _, models = family("llama", 3, statistics=False)
    people = [{"name": "first"}, {}, {}]
    out = carried_out(tmp_path / "out", models, method="task_arithmetic", base="first", contributors=people)
    found, states = opened(out), [opened(model) for model in models]
    close(found, {name: arithmetic(states[0], states, [1, 1, 1], 0.4, name) for name in found})


def test_rows_that_the_taken_model_lacks_are_the_others() -> None:
    table = RowMap.of([[0, 1, 2, -1], [-1, 0, 1, 2], [1, -1, 0, 3]], base=[0, -1, 1, 2])
    assert table.preferring(0).own == ((0, 1, 2, -1), (-1, -1, -1, 2), (-1, -1, -1, 3))
    assert table.preferring(0).own_base == (-1, -1, -1, 2)
    assert table.preferring(-1).own == ((-1, 1, -1, -1), (-1, 0, -1, -1), (-1, -1, -1, -1))
    assert table.preferring(-1).own_base == (0, -1, 1, 2)
    filled = RowMap.of([[0, -1], [0, 1]], fills=[Fill.of([0], np.array([[1], [0]]), [1])])
    assert [group[:2] for group in filled.preferring(0).groups()] == [((0, 1), (0,))]


def test_a_head_from_one_model_knows_the_labels_of_the_others(tmp_path: Path) -> None:
    models = []
    for number, labels in enumerate((["x", "y"], ["y", "z"])):
        models.append(tmp_path / f"tuned-{number}")
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
        make_model("bert", number, **names).save_pretrained(models[-1])
    rules = [{"role": "head", "take": "tuned-1"}]
    out = carried_out(tmp_path / "out", models, method="simple", labels="union", rules=rules)
    found, states = opened(out, Classifier), [opened(model, Classifier) for model in models]
    expected = torch.stack([states[0]["classifier.weight"][0], *states[1]["classifier.weight"]])
    assert torch.equal(found["classifier.weight"], expected)


def test_adapters_of_one_base_are_taken_apart(family: Family, tmp_path: Path) -> None:
    base, _ = family("llama", 0, statistics=False)
    adapters = [tmp_path / "one", tmp_path / "two"]
    for number, folder in enumerate(adapters):
        adapt_linears(folder, base, ("q_proj", "up_proj", "down_proj"), seed=number)
    rules = [{"role": "attention", "take": "two"}, {"tensors": "*down_proj*", "take": "base"}]
    out = carried_out(tmp_path / "out", adapters, method="simple", rules=rules)
    found, origin, models = opened(out), opened(base), [oracle(base, folder) for folder in adapters]
    for name, tensor in found.items():
        expected = (models[0][name] + models[1][name]) / 2
        expected = models[1][name] if "self_attn" in name else expected
        expected = origin[name].numpy() if "down_proj" in name else expected
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)
