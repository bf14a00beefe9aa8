"""RegMean++ against a loop over blocks and texts in plain torch, float64: whole models, no padding, ordinary hooks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import save_tokenizer
from merganser.cli import main
from merganser.errors import UserError
from merganser.merging import make_recipe, reproduce, verify
from merganser.sequential import merge_regmean_pp
from merganser.statistics import Statistics

TEXTS = (
    ["the movie was good", "very good food !", "I liked it very much . it was not bad", "yes"],
    ["bad food", "the movie was not good", "no - it was bad , very bad", "Anna saw it in Paris .", "not good"],
)
TARGETS = (["yes", "good", "not bad", "yes yes"], ["no", "bad", "very bad", "Paris", "no !"])
ALPHA = 0.95
GENERATE = ("t5", "bart")
Save = Callable[..., Path]

MODELS = [
    ("bert", transformers.BertForSequenceClassification, {"num_labels": 2}, ["bert.encoder.layer"]),
    ("roberta", transformers.RobertaForSequenceClassification, {"num_labels": 2}, ["roberta.encoder.layer"]),
    ("distilbert", transformers.DistilBertForSequenceClassification, {}, ["distilbert.transformer.layer"]),
    ("llama", transformers.LlamaForCausalLM, {}, ["model.layers"]),
    ("t5", transformers.T5ForConditionalGeneration, {}, ["encoder.block", "decoder.block"]),
    ("bart", transformers.BartForConditionalGeneration, {}, ["model.encoder.layers", "model.decoder.layers"]),
]


def bart_config(**more: Any) -> Any:
    sides = {
        f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 2))
    }
    return transformers.BartConfig(
        vocab_size=64, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=64, **sides,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3, **more,
    )  # fmt: skip


def save_bart(folder: Path, seed: int) -> Path:
    """Its blocks name their layers in another order than they call them in."""
    torch.manual_seed(seed)
    model = transformers.BartForConditionalGeneration(bart_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder, "bert")
    return folder


def make(save_ready: Save, tmp_path: Path, architecture: str, model_class: Any, config: Any) -> Any:
    """Two models and their data."""
    folders, files = [], []
    for number, texts in enumerate(TEXTS):
        if architecture == "bart":
            folders.append(save_bart(tmp_path / f"m{number}", number))
        else:
            folders.append(save_ready(f"m{number}", architecture, 10 + number, model_class, **config))
        rows = [{"text": text} for text in texts]
        if architecture in GENERATE:
            rows = [{**row, "target": target} for row, target in zip(rows, TARGETS[number], strict=True)]
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folders, files


def inputs_of(folder: Path, number: int, architecture: str) -> list[dict[str, Tensor]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = [dict(tokenizer(text, return_tensors="pt")) for text in TEXTS[number]]
    for batch, target in zip(found, TARGETS[number], strict=True):
        batch.pop("token_type_ids", None)
        if architecture in GENERATE:
            batch["labels"] = tokenizer(target, return_tensors="pt")["input_ids"]
    return found


def grams_of(model: nn.Module, layers: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def see(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        sums[name] = sums.get(name, 0) + x.T @ x
        rows[name] = rows.get(name, 0) + len(x)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name in layers
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: total / rows[name] for name, total in sums.items()}


def brute_force(
    folders: list[Path], architecture: str, model_class: Any, stacks: list[str], coefficients: list[float]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The merged parameters, and each contributor's Gram matrices, block after block and then what comes after them."""
    models = [model_class.from_pretrained(folder).double().eval() for folder in folders]
    batches = [inputs_of(folder, number, architecture) for number, folder in enumerate(folders)]
    merged = copy.deepcopy(models[0])
    linear = [name for name, module in merged.named_modules() if isinstance(module, nn.Linear)]
    tied = {name for name in linear if architecture in GENERATE and name == "lm_head"}
    blocks = [f"{stack}.{n}." for stack in stacks for n in range(len(merged.get_submodule(stack)))]
    stages = [[name for name in linear if name.startswith(block)] for block in blocks]
    stages.append([name for name in linear if not any(name.startswith(block) for block in blocks) and name not in tied])
    total = sum(coefficients)
    parts = [dict(model.named_parameters()) for model in models]
    found: list[dict[str, Tensor]] = [{}, {}]
    with torch.no_grad():
        for name, parameter in merged.named_parameters():  # blocks are overwritten below
            parameter.copy_(sum(c * own[name] for c, own in zip(coefficients, parts, strict=True)) / total)
        averages = {name: parameter.clone() for name, parameter in merged.named_parameters()}
        ours = dict(merged.named_parameters())
        for place, layers in enumerate(stages):
            prefixes = [blocks[place]] if place < len(blocks) else [f"{name}." for name in layers]
            names = [name for name in ours if any(name.startswith(prefix) for prefix in prefixes)]
            for number, own in enumerate(parts):
                for name in names:
                    ours[name].copy_(own[name])
                found[number] |= grams_of(merged, layers, batches[number])
            for name in names:
                ours[name].copy_(averages[name])
            for layer in layers:
                left: Any = 0.0
                right: Any = 0.0
                for number, own in enumerate(parts):
                    gram = found[number][layer]
                    shrunk = coefficients[number] * (ALPHA * gram + (1 - ALPHA) * torch.diag(gram.diagonal()))
                    left, right = left + shrunk, right + own[f"{layer}.weight"] @ shrunk
                unused = left.diagonal() == 0  # a unit that is never on: nothing is known of its weights
                left[unused, unused] = 1
                right[:, unused] = averages[f"{layer}.weight"][:, unused]
                ours[f"{layer}.weight"].copy_(torch.linalg.solve(left, right.T).T)
    return {name: parameter.detach() for name, parameter in merged.named_parameters()}, found


@pytest.mark.parametrize(("architecture", "model_class", "config", "stacks"), MODELS)
def test_it_is_layer_after_layer(
    save_ready: Save, tmp_path: Path, architecture: str, model_class: Any, config: Any, stacks: list[str]
) -> None:
    folders, files = make(save_ready, tmp_path, architecture, model_class, config)
    result = merge_regmean_pp(folders, files, tmp_path / "out", coefficients=[1, 2], options={"batch_size": 3})
    expected, grams = brute_force(folders, architecture, model_class, stacks, [1, 2])
    model = model_class.from_pretrained(tmp_path / "out")
    for name, parameter in model.named_parameters():
        size = float(expected[name].abs().max())
        assert float((parameter.detach().double() - expected[name]).abs().max()) <= 2e-3 * size, name
    for number in range(2):
        statistics = Statistics.open(tmp_path / "out-statistics" / f"{number + 1}-m{number}.safetensors")
        checked = 0
        for layer in statistics.header.layers:
            if layer.input is not None and layer.module in grams[number]:
                theirs = grams[number][layer.module]
                ours = statistics.gram(layer.input).double()
                assert float((ours - theirs).norm()) <= 1e-3 * float(theirs.norm()), layer.module
                checked += 1
        assert checked == len(grams[number]) > 4
    assert result.method == "regmean"


def test_it_is_another_merge_than_regmean(save_ready: Save, tmp_path: Path) -> None:
    """The first block sees what every model's own would see but for the embeddings; later ones see other inputs."""
    from merganser.collection import collect
    from merganser.merging import merge

    folders, files = make(save_ready, tmp_path, *MODELS[0][:3])
    merge_regmean_pp(folders, files, tmp_path / "out")
    for folder, file in zip(folders, files, strict=True):
        collect(folder, file)
    options = {"alpha": ALPHA, "augment_bias": False, "embeddings": False}
    merge(folders, tmp_path / "plain", method="regmean", options=options)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    name = "bert.encoder.layer.1.output.dense.weight"
    assert float((one[name] - two[name]).norm()) > 0.01 * float(two[name].norm())
    torch.testing.assert_close(
        one["bert.embeddings.word_embeddings.weight"], two["bert.embeddings.word_embeddings.weight"]
    )


def test_the_same_bytes_again_and_anywhere(save_ready: Save, tmp_path: Path) -> None:
    """On any number of threads, from the disk as from memory; and what it left can be verified and made again."""
    from merganser.merging import RunSettings

    folders, files = make(save_ready, tmp_path, *MODELS[0][:3])
    for name, threads, where in (("one", 1, "memory"), ("two", 2, "disk")):
        settings = RunSettings.make(threads=threads)
        merge_regmean_pp(folders, files, tmp_path / name, options={"activations": where}, settings=settings)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    provenance = json.loads((tmp_path / "one" / "provenance.json").read_text())
    assert provenance["recipe"]["method"] == "regmean"
    labels = [parent["statistics"]["label"] for parent in provenance["parents"]]
    assert all(label.startswith("RegMean++ of m0, m1: inputs of") for label in labels)
    assert not verify(tmp_path / "one").absent
    reproduce(tmp_path / "one", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == one


def test_each_text_goes_twice_through_each_block_however_many_there_are(save_ready: Save, tmp_path: Path) -> None:
    """Beyond what finding the stages takes, which runs the first texts alone."""
    blocks, calls = 5, 0

    def count(module: nn.Module, _: Any) -> None:
        nonlocal calls
        calls += isinstance(module, transformers.models.bert.modeling_bert.BertSelfAttention)

    folders = [save_ready(f"m{n}", "bert", n, num_hidden_layers=blocks) for n in (0, 1)]
    counted = []
    hook = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        for number, texts in enumerate((TEXTS[0], TEXTS[0] * 3)):
            before = calls
            merge_regmean_pp(folders, [texts, texts], tmp_path / str(number), options={"batch_size": 1})
            counted.append(calls - before)
    finally:
        hook.remove()
    more = 2 * 2 * len(TEXTS[0])  # texts, of both contributors
    assert counted[1] - counted[0] == 2 * more * blocks


def test_heads_of_their_own_stay_apart(save_ready: Save, tmp_path: Path) -> None:
    folders = [
        save_ready(f"m{n}", "bert", n, transformers.BertForSequenceClassification, num_labels=labels)
        for n, labels in enumerate((2, 3))
    ]
    files = []
    for number, texts in enumerate(TEXTS):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text("\n".join(texts))
    with pytest.raises(UserError, match=r"classifier"):
        merge_regmean_pp(folders, files, tmp_path / "out")
    merge_regmean_pp(folders, files, tmp_path / "out", keep_separate=["classifier*"])
    for number, labels in enumerate((2, 3)):
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out" / "heads" / f"m{number}")
        assert model.classifier.weight.shape[0] == labels


def test_the_command(save_ready: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders, files = make(save_ready, tmp_path, *MODELS[0][:3])
    out = tmp_path / "out"
    arguments = ["merge", *folders, "--method", "regmean_pp", "-o", out, "--option", "examples=2"]
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in (*arguments, "--data", files[0], "--data", files[1])])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == str(out)
    transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert Statistics.open(tmp_path / "out-statistics" / "1-m0.safetensors").header.examples == 2
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in (*arguments, "--data", files[0], "--overwrite")])
    assert ended.value.code == 2 and "1 data for 2 models" in capsys.readouterr().err
    for said, words in ((str(files[0]), "1 data for 2 models"), (3, "data are a list"), ({"a": 1}, "data are a list")):
        recipe = {"method": "regmean_pp", "contributors": [str(one) for one in folders], "options": {"data": said}}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        with pytest.raises(SystemExit) as ended:
            main(["merge", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "other")])
        assert ended.value.code == 2 and words in capsys.readouterr().err


def test_what_cannot_be_is_said_before_any_work(save_ready: Save, tmp_path: Path, monkeypatch: Any) -> None:
    folders, files = make(save_ready, tmp_path, *MODELS[0][:3])

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("merganser.sequential.regmean_pp.placed_model", refuse)
    for options, message in (({"alpha": 2}, "alpha"), ({"example": 3}, "examples"), ({"task": "sorting"}, "sorting")):
        with pytest.raises(UserError, match=message):
            merge_regmean_pp(folders, files, tmp_path / "out", options=options)
    (tmp_path / "out-statistics").mkdir()
    (tmp_path / "out-statistics" / "1-m0.safetensors").write_text("mine")
    with pytest.raises(UserError, match="1-m0"):
        merge_regmean_pp(folders, files, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").exists()


def test_it_is_explained_and_no_part_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["methods"], ["methods", "regmean_pp"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "regmean_pp" in capsys.readouterr().out
    for name in ("regmean_pp", "RegMean++"):
        with pytest.raises(UserError, match=r"--method regmean_pp --data FILE"):
            make_recipe({"contributors": ["a", "b"], "method": name})


def test_a_model_without_a_chain_of_blocks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block for all layers, as ALBERT has, is no stack that could be merged in turn."""
    folders, files = [], []
    for number, texts in enumerate(TEXTS):
        torch.manual_seed(number)
        config = transformers.AlbertConfig(
            vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=40,
        )  # fmt: skip
        folders.append(tmp_path / f"m{number}")
        transformers.AlbertForSequenceClassification(config).save_pretrained(folders[-1])
        save_tokenizer(folders[-1], "bert")
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text("\n".join(texts))
    with pytest.raises(UserError, match=r"albert_layer_groups.0 is called 2 times"):
        merge_regmean_pp(folders, files, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-statistics").exists()
