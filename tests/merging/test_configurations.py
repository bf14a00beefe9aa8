"""Contributors whose configurations compute different functions of the same weights are refused, or one is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from merganser.errors import Problems, UserError
from merganser.merging import ledger as ledgers
from merganser.merging import make_plan, make_recipe, merge

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 16,
}  # fmt: skip


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """``save(name, seed, edit, **config)``: a tiny Mistral; ``edit`` changes what ``config.json`` says."""

    def write(name: str, seed: int, edit: Callable[[dict[str, Any]], Any] | None = None, **config: Any) -> Path:
        torch.manual_seed(seed)
        transformers.MistralForCausalLM(transformers.MistralConfig(**(SMALL | config))).save_pretrained(tmp_path / name)
        place = tmp_path / name / "config.json"
        said = json.loads(place.read_text())
        if edit is not None:
            edit(said)
            place.write_text(json.dumps(said))
        return tmp_path / name

    return write


def plan(*models: Path, **settings: Any) -> Any:
    return make_plan(make_recipe({"contributors": [str(model) for model in models], "method": "simple", **settings}))


CHANGES: dict[str, dict[str, Any]] = {
    "rope_parameters.rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "rope_parameters.factor": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "num_attention_heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
    "num_key_value_heads": {"num_key_value_heads": 1, "head_dim": 16, "num_attention_heads": 2},
    "hidden_act": {"hidden_act": "gelu"},
    "rms_norm_eps": {"rms_norm_eps": 1e-5},
    "sliding_window": {"sliding_window": None},
    "tie_word_embeddings": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("key", CHANGES)
def test_what_changes_the_function_is_an_error(save: Callable[..., Path], key: str) -> None:
    a, b = save("a", 1), save("b", 2, lambda said: said.update(CHANGES[key]))
    with pytest.raises(UserError) as caught:
        plan(a, b)
    found = caught.value.problems[0] if isinstance(caught.value, Problems) else caught.value
    assert f"{key}: a " in found.what and ", b " in found.what and "compute different functions" in found.what
    assert found.mend is not None and "--config-from a or --config-from b" in found.mend


def test_all_keys_are_named_in_one_error_with_every_models_value(save: Callable[..., Path]) -> None:
    a, b = save("a", 1), save("b", 2, rms_norm_eps=1e-3, hidden_act="relu")
    base = save("base", 0, rms_norm_eps=0.5)
    with pytest.raises(UserError) as caught:
        plan(a, b, base=str(base), method="task_arithmetic")
    assert not isinstance(caught.value, Problems)
    assert "rms_norm_eps: a 1e-06, b 0.001, base 0.5" in str(caught.value)
    assert "hidden_act: a silu, b relu, base silu" in str(caught.value) and "--config-from base" in str(caught.value)


def test_what_does_not_change_the_function_is_ignored(save: Callable[..., Path]) -> None:
    def edit(said: dict[str, Any]) -> None:
        theta = said.pop("rope_parameters")["rope_theta"]
        said |= {"rope_theta": theta, "transformers_version": "4.40.0", "torch_dtype": "float32", "use_cache": False}
        said |= {"_name_or_path": "elsewhere", "attention_dropout": 0.1, "initializer_range": 0.5, "head_dim": None}
        said |= {"output_attentions": True, "problem_type": "regression", "pruned_heads": {}, "num_beams": 4}
        said |= {
            "router_aux_loss_coef": 0.5,
            "eos_token_id": [2, 3],
            "architectures": ["MistralForCausalLM", "MistralModel"],
        }
        said |= {"label2id": {"x": 0}, "id2label": {"0": "x"}, "temperature": 0.7, "_attn_implementation": "eager"}
        del said["rms_norm_eps"]  # the default of its class

    found = plan(save("a", 1), save("b", 2, edit))
    assert found.notes == ()


def test_what_the_class_does_not_know_is_a_note(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = save("a", 1), save("b", 2, lambda said: said.update(my_note="x", max_position_embeddings=128))
    (note,) = plan(a, b).notes
    assert (
        "my_note: a absent, b x" in note and "max_position_embeddings: a 64, b 128" in note and "a's is written" in note
    )
    scaled = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    c = save("c", 1, lambda said: said.update(scaled))
    d = save("d", 2, lambda said: said.update(scaled, max_position_embeddings=128))
    with pytest.raises(UserError, match="max_position_embeddings: c 64, d 128"):
        plan(c, d)


@pytest.mark.parametrize("whose", ["a", "b", "base"])
def test_one_configuration_is_taken_on_purpose(save: Callable[..., Path], tmp_path: Path, whose: str) -> None:
    """What opens computes the function of that configuration with the merged weights."""

    def old(said: dict[str, Any]) -> None:
        said["rope_theta"] = said.pop("rope_parameters")["rope_theta"]

    theta = {
        name: {"rope_type": "default", "rope_theta": value} for name, value in zip("abc", (1e4, 5e5, 2e4), strict=True)
    }
    a, b = (
        save("a", 1, old, rope_parameters=theta["a"]),
        save("b", 2, old, rope_parameters=theta["b"], hidden_act="relu"),
    )
    base = save("base", 3, rope_parameters=theta["c"])
    out = merge([a, b], tmp_path / "out", method="simple", config_from=whose, base=base)
    assert any("as asked for" in note for note in out.notes)
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (out, a, b, base)]
    chosen = models[["a", "b", "base"].index(whose) + 1]
    expected = transformers.MistralForCausalLM(chosen.config).eval()
    states = [model.state_dict() for model in models[1:3]]
    expected.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(models[0](ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)
    said = json.loads((out / "config.json").read_text())
    assert ("rope_theta" in said) == (whose != "base")  # spelled as that model's file has it
    assert said["architectures"] == ["MistralForCausalLM"]


def test_a_head_of_its_own_has_the_configuration_that_was_taken(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = save("a", 1, pad_token_id=3), save("b", 2, rms_norm_eps=0.5, pad_token_id=4)
    out = merge([a, b], tmp_path / "out", method="simple", config_from="a", keep_separate=["lm_head*"])
    said = json.loads((out / "heads" / "b" / "config.json").read_text())
    assert said["rms_norm_eps"] == 1e-6 and said["pad_token_id"] == 4


def test_sub_configurations_are_compared_alike(tmp_path: Path) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, changes in (("a", {}), ("b", {"layer_norm_eps": 0.5})):
        config = transformers.CLIPConfig(
            text_config={"vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 2, **tiny},
            vision_config={"image_size": 16, "patch_size": 8, **tiny, **changes},
            projection_dim=16,
        )
        transformers.CLIPModel(config).save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match=r"vision_config.layer_norm_eps: a 1e-05, b 0.5\n"):
        plan(tmp_path / "a", tmp_path / "b")
    out = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="simple", config_from="b")
    assert transformers.AutoConfig.from_pretrained(out).vision_config.layer_norm_eps == 0.5


def test_old_names_of_keys_meet_new_ones(tmp_path: Path) -> None:
    for name in "ab":
        config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    place = tmp_path / "b" / "config.json"
    said = json.loads(place.read_text())
    said["num_attention_heads"] = said.pop("n_head")
    place.write_text(json.dumps(said))
    assert plan(tmp_path / "a", tmp_path / "b").notes == ()
    place.write_text(json.dumps({**said, "num_attention_heads": 4}))
    with pytest.raises(UserError, match="n_head: a 2, b 4"):
        plan(tmp_path / "a", tmp_path / "b")


def test_an_architecture_that_transformers_does_not_know(save: Callable[..., Path]) -> None:
    """Its configurations are compared as they are written."""

    def stranger(said: dict[str, Any]) -> None:
        said["model_type"] = "of-ones-own"

    a, b = (
        save("a", 1, stranger),
        save("b", 2, lambda said: (stranger(said), said.update(own_scale=2.0, use_cache=False))),
    )
    with pytest.raises(UserError, match="own_scale: a absent, b 2") as caught:
        plan(a, b)
    assert "use_cache" not in str(caught.value)
    assert plan(a, b, config_from="b").notes


def test_shapes_that_differ_are_not_mended_by_a_choice(save: Callable[..., Path]) -> None:
    a, b = save("a", 1), save("b", 2, num_hidden_layers=3)
    with pytest.raises(UserError) as caught:
        plan(a, b)
    assert "num_hidden_layers: a 2, b 3" in str(caught.value) and "--config-from" not in str(caught.value)


def test_a_choice_that_cannot_be_made(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = save("a", 1), save("b", 2, rms_norm_eps=0.5)
    with pytest.raises(UserError, match="no model of this merge is called 'c'"):
        plan(a, b, config_from="c")
    with pytest.raises(UserError, match="no base model"):
        plan(a, b, config_from="base")
    base = save("base", 0)
    with pytest.raises(UserError, match="an adapter is opened with its base's configuration"):
        merge([a, b], tmp_path / "no", method="simple", base=base, as_adapter=4, config_from="b")
    out = merge([a, b], tmp_path / "out", method="simple", base=base, as_adapter=4, config_from="base")
    assert (out / "adapter_config.json").is_file()


def test_a_ledger_refuses_another_function(save: Callable[..., Path], tmp_path: Path) -> None:
    base, a = save("base", 0), save("a", 1, rms_norm_eps=0.5)
    ledgers.init(tmp_path / "ledger", base, method="simple")
    with pytest.raises(UserError, match=r"rms_norm_eps: base 1e-06, a 0.5\n.*a ledger adds up models of one"):
        ledgers.add(tmp_path / "ledger", a)


def test_one_is_not_true(save_ready: Callable[..., Path], tmp_path: Path) -> None:
    """transformers takes no 1 for true, and Python holds the two for equal: an average would not open."""
    folders = [save_ready(f"same-{seed}", "bert", seed=seed) for seed in (1, 2)]
    path = folders[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_cache": 1}))
    with pytest.raises(UserError, match="use_cache"):
        merge(folders, tmp_path / "out", method="simple")
