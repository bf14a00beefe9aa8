"""What a configuration of mergekit gives, against its formulas in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from merganser.cli import cli
from merganser.merging import verify
from mergekit_formulas import merged

LAYERS = 3


def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def bert() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "vocab_size": 32}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind, a folder with ``base`` and the fine-tunes ``a``, ``b`` and ``c``."""
    found = {}
    for kind, build in (("llama", llama), ("bert", bert)):
        folder = found[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(len(kind))
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        model.save_pretrained(folder / "base")
        for name in "abc":
            model.load_state_dict({key: value + 0.03 * torch.randn_like(value) for key, value in base.items()})
            model.save_pretrained(folder / name)
    return found


def run(text: str, folder: Path, out: Path, *more: str) -> Any:
    """The configuration with the folder's models, by the command."""
    file = out.with_suffix(".yaml")
    file.write_text(placed(text, folder))
    done = CliRunner().invoke(cli, ["merge", str(file), "-o", str(out), *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def placed(text: str, folder: Path) -> str:
    for name in ("base", "a", "b", "c"):
        text = text.replace(f"${name}", str(folder / name))
    return text


def check(text: str, folder: Path, out: Path) -> None:
    run(text, folder, out)
    models = {str(folder / n): read(folder / n) for n in ("base", "a", "b", "c")}
    expected = merged(yaml.safe_load(placed(text, folder)), models)
    found = read(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=1e-6, err_msg=name)
    opened, loading = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    depth = len({name.split(".layer")[1].split(".")[1] for name in expected if ".layer" in name})
    assert opened.config.num_hidden_layers == depth


def read(folder: Path) -> Mapping[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


PAIR = "models: [{model: $a, parameters: {weight: 0.7, density: 0.6}}, {model: $b, parameters: {weight: 0.4}}]\n"
THREE = "models: [{model: $a}, {model: $b}, {model: $c}]\n"
BASE = "base_model: $base\n"


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\n" + PAIR,
        "merge_method: linear\nbase_model: $base\nparameters: {weight: [0.1, 0.9]}\n" + THREE,
        "merge_method: linear\nparameters: {normalize: false}\n" + PAIR,
        "merge_method: linear\nmodels:\n- {model: $a, parameters: {weight: [0, 1, 0.2]}}\n"
        "- {model: $b, parameters: {weight: [{filter: mlp, value: [1, 2]}, {filter: out, value: 3}, {value: 1e-1}]}}\n",
        "merge_method: slerp\nbase_model: $b\nmodels: [{model: $a}, {model: $b}]\n"
        "parameters: {t: [{filter: self, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.4}]}\n",
        "merge_method: nuslerp\n" + PAIR,
        "merge_method: nuslerp\nparameters: {nuslerp_flatten: false}\n" + BASE + PAIR,
        "merge_method: multislerp\n" + BASE + "parameters: {weight: [1, 2]}\n" + THREE,
        "merge_method: karcher\n" + THREE,
        "merge_method: karcher\nparameters: {max_iter: 2, tol: 1e-9}\n" + BASE + THREE,
        "merge_method: model_stock\n" + BASE + THREE,
        "merge_method: model_stock\nparameters: {filter_wise: true}\n" + BASE + THREE,
        "merge_method: nearswap\nbase_model: $b\nparameters: {t: [0.01, 0.001]}\nmodels: [{model: $a}]\n",
        "merge_method: sce\n" + BASE + THREE,
        "merge_method: sce\nparameters: {select_topk: [0.1, 0.6]}\n" + BASE + THREE,
        "merge_method: ram\nparameters: {epsilon: 0.02}\n" + BASE + THREE,
        "merge_method: ramplus_tl\nparameters: {epsilon: 0.02, r: 0.5, alpha: 0.4}\n" + BASE + THREE,
        "merge_method: task_arithmetic\nparameters: {lambda: 0.7}\n" + BASE + PAIR,
        "merge_method: task_arithmetic\nparameters: {normalize: true}\n" + BASE + PAIR,
        "merge_method: task_arithmetic\n" + BASE + PAIR.replace("0.4", "-0.4"),
        "merge_method: ties\n" + BASE + PAIR,
        "merge_method: ties\nparameters: {density: [1, 0.1], normalize: [{filter: mlp, value: false}, {value: true}]}\n"
        + BASE + PAIR.replace(", density: 0.6", ""),
        "merge_method: dare_ties\n" + BASE + PAIR.replace("0.6", "1.0"),
        "merge_method: dare_linear\nparameters: {lambda: 1.3}\n" + BASE + PAIR.replace("0.6", "1.0"),
        "merge_method: della\n" + BASE + PAIR.replace("0.6", "1.0"),
        "merge_method: breadcrumbs\nparameters: {gamma: [0.01, 0.2]}\n" + BASE + PAIR,
        "merge_method: breadcrumbs_ties\nparameters: {density: 0.3, gamma: 0.001}\n" + BASE + PAIR,
    ],
)  # fmt: skip
def test_whole_models(kind: str, text: str, families: dict[str, Path], tmp_path: Path) -> None:
    check(text, families[kind], tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(
    "text",
    [
        "merge_method: passthrough\nslices:\n- sources: [{model: $a, layer_range: [0, 2]}]\n",
        "merge_method: passthrough\nslices:\n- sources: [{model: $a, layer_range: [0, 2]}]\n"
        "- sources: [{model: $b, layer_range: [1, 3]}]\n",
        "merge_method: passthrough\nslices:\n- sources: [{model: $a, layer_range: [0, 3]}]\n"
        "- sources: [{model: $a, layer_range: [1, 3], parameters: {scale: [{filter: o_proj, value: 0}, "
        "{filter: down_proj, value: 0}, {filter: output.dense, value: 0.5}, {value: 1}]}}]\n",
        "merge_method: linear\nslices:\n"
        "- {sources: [{model: $a, layer_range: [0, 2]}, {model: $b, layer_range: [0, 2], "
        "parameters: {weight: [0, 1]}}], parameters: {weight: 1}}\n"
        "- sources: [{model: $b, layer_range: [1, 3]}, {model: $c, layer_range: [0, 2], parameters: {weight: 2}}]\n"
        "parameters: {weight: [{filter: mlp, value: 0.1}, {value: [0.3, 0.4]}]}\n",
        "merge_method: slerp\nbase_model: $a\nslices:\n"
        "- sources: [{model: $a, layer_range: [0, 3]}, {model: $b, layer_range: [0, 3]}]\nparameters: {t: [0, 1]}\n",
        "merge_method: ties\nbase_model: $base\nslices:\n"
        "- sources: [{model: $a, layer_range: [0, 2]}, {model: $b, layer_range: [1, 3]}, "
        "{model: $base, layer_range: [0, 2]}]\n"
        "- sources: [{model: $a, layer_range: [2, 3]}, {model: $b, layer_range: [2, 3]}, "
        "{model: $base, layer_range: [2, 3]}]\nparameters: {weight: [0.2, 0.6], density: [0.4, 0.8]}\n",
    ],
)
def test_layers_of_models(kind: str, text: str, families: dict[str, Path], tmp_path: Path) -> None:
    check(text, families[kind], tmp_path / "out")


def test_dtypes(families: dict[str, Path], tmp_path: Path) -> None:
    text = "merge_method: linear\n" + PAIR
    run(text + "dtype: float32\nout_dtype: bfloat16\n", families["llama"], tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    done = run(text + "dtype: float16\n", families["llama"], tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert "mergekit rounds the inputs" in done.stderr


def test_random_drops_keep_what_mergekit_keeps_of_them(families: dict[str, Path], tmp_path: Path) -> None:
    """Other numbers are dropped; as many, and with the same sum of magnitudes."""
    folder = families["llama"]
    text = "merge_method: dare_linear\nparameters: {weight: 1, density: 0.5}\n" + BASE + "models: [{model: $a}]\n"
    done = run(text, folder, tmp_path / "out")
    assert "other numbers are dropped" in done.stderr
    base, tuned, out = read(folder / "base"), read(folder / "a"), read(tmp_path / "out")
    for name, tensor in out.items():
        delta, before = tensor - base[name], tuned[name] - base[name]
        np.testing.assert_allclose(np.abs(delta).sum(), np.abs(before).sum(), rtol=1e-4)
        if delta.size > 300:
            assert abs(np.mean(np.abs(delta) > 1e-7) - 0.5) < 0.12


STAGES = (
    "merge_method: slerp\nbase_model: $a\nmodels: [{model: $a}, {model: $b}]\nparameters: {t: 0.3}\nname: first\n"
    "---\nmerge_method: task_arithmetic\nbase_model: $base\nparameters: {weight: 0.5}\n"
    "models: [{model: first}, {model: $c}]\n"
)


def test_stages(families: dict[str, Path], tmp_path: Path) -> None:
    folder, out = families["llama"], tmp_path / "out"
    done = run(STAGES, folder, out)
    between = tmp_path / "out-intermediate" / "first"
    verify(between)
    verify(out)
    models = {str(folder / n): read(folder / n) for n in ("base", "a", "b", "c")}
    one, other = yaml.safe_load_all(placed(STAGES, folder))
    expected = merged(other, {**models, "first": merged(one, models)})
    for name, tensor in read(out).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
    before = (between / "model.safetensors").stat().st_mtime_ns
    done = run(STAGES, folder, out, "--overwrite")
    assert "is not made again" in done.stderr and (between / "model.safetensors").stat().st_mtime_ns == before
    done = run(STAGES.replace("t: 0.3", "t: 0.6"), folder, out, "--overwrite")
    assert "is not made again" not in done.stderr
    assert (between / "model.safetensors").stat().st_mtime_ns != before


def test_an_intermediate_result_that_was_changed_is_made_again(families: dict[str, Path], tmp_path: Path) -> None:
    folder, out = families["llama"], tmp_path / "out"
    run(STAGES, folder, out)
    between = tmp_path / "out-intermediate" / "first"
    whole = (between / "model.safetensors").read_bytes()
    (between / "model.safetensors").write_bytes(whole[:-4] + b"abcd")
    done = run(STAGES, folder, out, "--overwrite")
    assert "is not made again" not in done.stderr and (between / "model.safetensors").read_bytes() == whole


def test_what_a_killed_command_left_beside_an_intermediate_result_is_removed(
    families: dict[str, Path], tmp_path: Path
) -> None:
    folder, out = families["llama"], tmp_path / "out"
    run(STAGES, folder, out)
    for name in ("first", "another"):  # as it is while a folder takes its place, and of a file that has changed since
        left = tmp_path / "out-intermediate" / f".{name}.partial-0123abcd"
        left.mkdir()
        (left / "lock").touch()
    done = run(STAGES, folder, out, "--overwrite")
    assert "is not made again" in done.stderr
    assert [path.name for path in (tmp_path / "out-intermediate").iterdir()] == ["first"]


def test_models_of_later_stages_are_opened_before_the_first_is_merged(
    families: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(placed(STAGES, families["llama"]).replace(str(families["llama"] / "c"), str(tmp_path / "nowhere")))
    done = CliRunner().invoke(cli, ["merge", str(file), "-o", str(tmp_path / "out")])
    assert done.exit_code != 0 and "nowhere" in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.yaml"]


def test_a_dry_run_plans_what_can_be_planned(families: dict[str, Path], tmp_path: Path) -> None:
    done = run(STAGES, families["llama"], tmp_path / "out", "--dry-run")
    assert "first: the plan of what others need" in done.stderr and "slerp" in done.stdout
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-intermediate").exists()
    run(STAGES, families["llama"], tmp_path / "out")
    done = run(
        STAGES, families["llama"], tmp_path / "out2", "--dry-run", "--intermediate", str(tmp_path / "out-intermediate")
    )
    assert "task_arithmetic" in done.stdout


def test_explain_writes_nothing_and_prints_a_recipe(families: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(placed(STAGES, families["llama"]))
    done = CliRunner().invoke(cli, ["merge", str(file), "--explain", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["file.yaml"]
    first, last = yaml.safe_load_all(done.stdout)
    assert first["method"] == "slerp" and last["method"] == "task_arithmetic"
    recipe = tmp_path / "ours.yaml"  # the recipe is one that can be carried out as it is
    recipe.write_text(done.stdout.split("---\n")[0])
    assert CliRunner().invoke(cli, ["merge", str(recipe), "-o", str(tmp_path / "again")]).exit_code == 0


@pytest.mark.parametrize("name", ["\x1b]0;x\x07", "x\nmethod: ties", "\u202ex", "x\u2028method: ties", "x\x85y"])
def test_names_stay_in_the_comments_of_an_explanation(families: dict[str, Path], tmp_path: Path, name: str) -> None:
    file = tmp_path / "file.yaml"
    first, last = yaml.safe_load_all(placed(STAGES, families["llama"]))
    first["name"] = last["models"][0]["model"] = name
    file.write_text(yaml.safe_dump_all([first, last]))
    done = CliRunner().invoke(cli, ["merge", str(file), "--explain"])
    assert done.exit_code == 0, done.exception
    assert all(letter == "\n" or letter.isprintable() for letter in done.stdout)
    assert [one["method"] for one in yaml.safe_load_all(done.stdout)] == ["slerp", "task_arithmetic"]


def test_what_is_no_recipe_is_not_explained(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("contributors: [a, b]\nmethod: simple\nrules: [ties]\n")
    done = CliRunner().invoke(cli, ["merge", str(file), "--explain"])
    assert done.exit_code != 0 and "rules.0" in str(done.exception) and not done.stdout


def test_modules_of_whole_models(tmp_path: Path) -> None:
    """An encoder and a decoder with weights of their own, each over its own depth."""
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "decoder_start_token_id": 0}
    config = transformers.T5Config(**sizes, num_layers=2, num_decoder_layers=3)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / name)
    text = (
        "merge_method: linear\nmodules:\n  encoder: {models: [{model: $a}, {model: $b, parameters: "
        "{weight: [{filter: SelfAttention, value: 2}, {value: [3, 1]}]}}]}\n"
        "  decoder: {models: [{model: $a}, {model: $b}], parameters: {weight: [4, 1]}}\n"
        "  shared: {models: [{model: $a}, {model: $b}]}\nparameters: {weight: 5}\n"
    ).replace("$a", str(tmp_path / "a")).replace("$b", str(tmp_path / "b"))  # fmt: skip
    run(text, tmp_path, tmp_path / "out")
    a, b, found = (read(tmp_path / name) for name in ("a", "b", "out"))
    for name, tensor in found.items():
        layer = int(name.split(".")[2]) if ".block." in name else 0
        weights = (5.0, 5.0)
        if name.startswith("encoder."):
            weights = (5.0, 2.0 if "SelfAttention" in name else (3.0, 1.0)[layer])
        elif name.startswith("decoder."):
            weights = (4.0 - 1.5 * layer,) * 2
        expected = (weights[0] * a[name].astype(float) + weights[1] * b[name]) / sum(weights)
        np.testing.assert_allclose(tensor, expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_chat_templates(families: dict[str, Path], tmp_path: Path) -> None:
    from vocabulary_examples import give_tokenizer

    folder = tmp_path / "models"
    for name in ("base", "a", "b"):
        torch.manual_seed(len(name))
        llama().save_pretrained(folder / name)
        give_tokenizer(folder / name, ["[UNK]", "[PAD]", "[EOS]", *(f"w{n}" for n in range(29))])
    for name, template in (("a", "{{ messages[0] }} a"), ("b", "{{ messages[0] }} a"), ("base", "{{ 1 }} base")):
        (folder / name / "chat_template.jinja").write_text(template)
    text = "merge_method: linear\nbase_model: $base\nparameters: {weight: 1}\nmodels: [{model: $a}, {model: $b}]\n"
    for given, expected in (
        ("", "{{ 1 }} base"),
        ("auto", "{{ messages[0] }} a"),
        ("'{{ own }} text'", "{{ own }} text"),
    ):
        out = tmp_path / f"out{len(given)}"
        run(f"{text}chat_template: {given}\n", folder, out)
        assert transformers.AutoTokenizer.from_pretrained(out).chat_template == expected
        verify(out)
