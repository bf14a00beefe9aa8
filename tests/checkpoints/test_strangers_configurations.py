"""Configurations of strangers: a few bytes that ask for a billion layers, values of other types, patterns of names."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from adapter_examples import adapt_linears
from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.adapter_settings import _fits
from merganser.checkpoints.configuration_checks import check_configuration
from merganser.checkpoints.layers import BadConfiguration, build_empty, check_config
from merganser.checkpoints.model_view import view_of
from merganser.errors import UserError
from merganser.merging import merge

Save = Callable[..., Path]


def change(folder: Path, **values: Any) -> None:
    place = folder / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **values}))


def opened(folder: Path) -> object:
    """What every merge does with a model before it reads a weight."""
    checkpoint = open_checkpoint(folder)
    check_config(checkpoint)
    return view_of(checkpoint).model


TOO_LARGE = {
    "num_hidden_layers": 10**9, "num_labels": 10**9, "hidden_size": 10**9, "vocab_size": 10**12,
    "intermediate_size": 2**40, "max_position_embeddings": 2**40, "num_attention_heads": -(10**9),
    "id2label": {str(number): "x" for number in range(50_000)}, "pruned_heads": [[0]] * 50_000,
    "text_config": {"num_hidden_layers": 10**9}, "backbone_config": {"depths": [1, 10**9]},
}  # fmt: skip


@pytest.mark.parametrize("key", TOO_LARGE)
def test_configurations_are_no_larger_than_their_weights(save_model: Save, key: str) -> None:
    folder = save_model("m")
    change(folder, **{key: TOO_LARGE[key]})
    begin = time.process_time()
    with pytest.raises(UserError, match=key) as caught:
        opened(folder)
    assert "config.json" in str(caught.value) and time.process_time() - begin < 2


@pytest.mark.parametrize(
    ("architecture", "key"), [("bert", "num_hidden_layers"), ("t5", "num_layers"), ("distilbert", "n_layers")]
)
def test_a_model_of_far_more_parts_than_tensors_is_not_built(save_model: Save, architecture: str, key: str) -> None:
    """Counts that could be: 9,999 layers are a matter of seconds, and refused by the parts that are made."""
    folder = save_model("m", architecture)
    change(folder, **{key: 9_999})
    begin = time.process_time()
    with pytest.raises(UserError, match=r"more than .* parts"):
        opened(folder)
    assert time.process_time() - begin < 10


WRONG = [
    ("vocab_size", "(a+)+"), ("vocab_size", True), ("vocab_size", [5]), ("pad_token_id", False), ("pad_token_id", "0"),
    ("architectures", 1.5), ("architectures", [1.5]), ("architectures", "Bert"), ("architectures", ["\x1b[31mX[/b]"]),
    ("id2label", [1]), ("id2label", {"x": "y"}), ("id2label", {"0": None, "1": {}}), ("id2label", {"-1": "a"}),
    ("label2id", ["a"]), ("label2id", {"a": None}), ("model_type", []), ("model_type", "a\x1bb"),
    ("quantization_config", 7), ("quantization_config", []), ("auto_map", [[[]]]), ("auto_map", {"AutoModel": 3}),
    ("torch_dtype", {}), ("torch_dtype", "floaty"), ("dtype", ["float32"]), ("num_labels", "two"), ("num_labels", -1),
    ("attention_probs_dropout_prob", "x"), ("attention_probs_dropout_prob", True), ("initializer_range", [1]),
    ("vocab_size", -1), ("hidden_size", -1), ("num_attention_heads", 0), ("hidden_act", "none-such"),
    ("hidden_size", "sixteen"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_values_that_transformers_does_not_take_are_errors(save_model: Save, key: str, value: object) -> None:
    folder = save_model("m")
    change(folder, **{key: value})
    with pytest.raises(UserError, match=r"config\.json"):
        opened(folder)


def test_they_are_errors_of_every_contributor(save_model: Save, tmp_path: Path) -> None:
    models = [save_model(f"m{seed}", seed=seed) for seed in (1, 2)]
    for bad in models:
        before = (bad / "config.json").read_text()
        change(bad, initializer_range="x")
        with pytest.raises(UserError, match=f"{bad.name}/config.json.*initializer_range"):
            merge(models, tmp_path / "out", method="simple")
        (bad / "config.json").write_text(before)
    assert merge(models, tmp_path / "out", method="simple")


def test_honest_values_are_taken() -> None:
    """Those of large and of unusual models: nothing of this is beyond what a file with such tensors may say."""
    config = transformers.Qwen2MoeConfig().to_dict() | {"rope_theta": 10**10, "max_position_embeddings": 10_485_760}
    config |= {"id2label": {"0": 0, "1": "b"}, "label2id": {"a": 0}, "architectures": None, "num_train_steps": 10**7}
    config |= {"dtype": "bfloat16", "auto_map": {"AutoTokenizer": ["a.B", None], "AutoModel": "c.D"}}
    config |= {"vision_config": {"torch_dtype": "float32"}, "quantization_config": {"bits": 4}, "total": 10**12}
    check_configuration(json.loads(json.dumps(config, default=str)), {}, Path("config.json"))


def test_only_a_model_is_made_of_a_configuration(tmp_path: Path) -> None:
    values = {**transformers.BertConfig(num_hidden_layers=1).to_dict(), "architectures": ["TrainingArguments"]}
    assert type(build_empty(values, tmp_path, 10)).__name__ == "BertModel"
    with pytest.raises(BadConfiguration, match="parts"):
        build_empty({**values, "num_hidden_layers": 5000}, tmp_path, 10)


PATTERNS = (
    "q_proj", "1.q_proj", "layers.0.q_proj", r".*\.0\..*q_proj", "0.q_proj|v_proj", "q", "^q_proj", r"\d+.q_proj",
    "[qv]_proj", "model.layers.1.v_proj", "a-b", "layers.*", "(q|v)_proj", "x.layers.0.q_proj", "q_proj.*",
)  # fmt: skip
MODULES = (
    "model.layers.0.q_proj", "model.layers.10.q_proj", "model.layers.1.v_proj", "q_proj", "layersX0.q_proj", "a-b",
    "model.xlayers.0.q_proj", "model.layers.0.q_projx", "1.q_proj",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_in_peft(pattern: str) -> None:
    for module in MODULES:
        assert _fits(pattern, module) == bool(re.match(rf"(.*\.)?({pattern})$", module)), module


SLOW = ("(a|a|x|.)*(.*)*(e+)+$Z", "((((.*)*)*)*)*!", ".*.*.*.*.*.*.*.*.*!", "(x+x+)+y", "(.|.){1,900}Z")
REFUSED = ("(?=a)b", "(a)\\1", "(", "a{1000}{1000}", "[a-", "x" * 501, "*")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_take_linear_time_or_are_refused(save_model: Save, tmp_path: Path, key: str) -> None:
    base = save_model("base", "llama")
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    begin = time.process_time()
    table = dict.fromkeys(SLOW, 3)
    found = open_checkpoint(adapt_linears(tmp_path / "a", base, names, **{key: table}))
    assert found.changes and time.process_time() - begin < 3
    for pattern in REFUSED:
        adapter = adapt_linears(tmp_path / "b", base, names, **{key: {pattern: 3}})
        with pytest.raises(UserError, match="no pattern that can be used"):
            open_checkpoint(adapter)
    many = adapt_linears(tmp_path / "c", base, names, **{key: {f"{number}.*": 3 for number in range(100_000)}})
    with pytest.raises(UserError, match="too many to try"):
        open_checkpoint(many)
    assert time.process_time() - begin < 10


def test_many_differences_of_configurations_are_told_in_few_words(save_model: Save, tmp_path: Path) -> None:
    models = [save_model(f"m{seed}", seed=seed) for seed in (1, 2)]
    change(models[0], **{f"key {number} {'x' * 500}": number for number in range(3000)})
    result = merge(models, tmp_path / "out", method="simple", config_from=str(models[0]))
    assert any("and 2980 more" in note for note in result.notes) and max(map(len, result.notes)) < 10_000
