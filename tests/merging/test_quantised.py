"""Merging quantised checkpoints: as if the plain models that they mean had been there, through every verb."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from adapter_examples import adapt_linears, factors, write_adapter
from conftest import SMALL, make_model, save_tokenizer
from ledger_examples import fill
from merganser.checkpoints import CodedCheckpoint, QuantisedCheckpoint, QuantisedWeights, open_checkpoint
from merganser.cli import main
from merganser.collection import collect
from merganser.engines import SerialEngine
from merganser.errors import CheckpointError, Problems, UserError
from merganser.evaluation import evaluate
from merganser.merging import ledger, make_plan, make_recipe, merge, reproduce, verify
from merganser.tasks.models import load_model, open_model
from quantised_examples import bfloat16, configure, dequantised, fp8, mxfp4, write_quantised, write_shards

Save = Callable[..., Path]
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
TEXTS = ["the movie was good", "bad food !", "I liked it very much . it was not bad", "no"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


IDS = torch.tensor([[3, 5, 7, 9, 11, 13]])


def make_fp8(folder: Path, source: Path, enlarge: float = 1.0, **more: Any) -> dict[str, np.ndarray]:
    """An FP8 copy of a folder, its scales enlarged; returns what its tensors mean."""
    return write_quantised(folder, source, partial(fp8, enlarge=enlarge), BLOCKS, **more)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def is_average(found: Mapping[str, torch.Tensor], parts: list[Mapping[str, np.ndarray]], weights: list[float]) -> None:
    """Every tensor is the average of what the contributors' mean, rounded once to BF16 on the way in and out."""
    assert set(found) == set(parts[0])
    for name, tensor in found.items():
        wanted = sum(w * part[name] for w, part in zip(weights, parts, strict=True)) / sum(weights)
        assert tensor.dtype == torch.bfloat16
        size = sum(np.abs(part[name]) for part in parts).max()
        np.testing.assert_allclose(tensor.double().numpy(), wanted, rtol=0, atol=size * 2**-7, err_msg=name)


def opens_as(folder: Path, parts: list[Path], weights: list[float]) -> None:
    """What opens has no quantisation and computes what the average in memory of the opened parts computes."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert "quantization_config" not in (folder / "config.json").read_text()
    states = [transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).state_dict() for p in parts]
    mean = {n: sum(w * s[n].double() for w, s in zip(weights, states, strict=True)) / sum(weights) for n in states[0]}
    expected = transformers.AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float32)
    expected.load_state_dict({name: tensor.float() for name, tensor in mean.items()})
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=0.02, atol=0.02)
        alone = transformers.AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.float32)(IDS).logits
        assert not torch.allclose(model(IDS).logits, alone, rtol=0.02, atol=0.02)  # the test can fail


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("shards", [1, 3])
def test_scales_are_part_of_the_weights(save_model: Save, tmp_path: Path, order: int, shards: int) -> None:
    one, two = save_model("one", "llama", 1), save_model("two", "llama", 2)
    meanings = [make_fp8(tmp_path / "q1", one, 4.0, shards=shards)]
    meanings.append(write_quantised(tmp_path / "q2", two, partial(fp8), None, which=lambda _: False))
    folders = [tmp_path / "q1", tmp_path / "q2"]
    (tmp_path / "q1" / "hf_quant_config.json").write_text("{}")
    plain = [
        dequantised(tmp_path / f"plain-{n}", s, m) for n, (s, m) in enumerate(zip((one, two), meanings, strict=True))
    ]
    out = merge(folders[::order], tmp_path / "out", method="simple", coefficients=[1, 3][::order])
    is_average(stored(out), [meanings[0], meanings[1]], [1, 3])
    opens_as(Path(out), plain, [1, 3])
    assert [note for note in out.notes if "is quantised (fp8)" in note and "q1" in note]
    assert not (Path(out) / "hf_quant_config.json").exists()
    assert verify(out).parents == 2 and reproduce(out) == []


def test_both_quantised_are_merged_as_both_dequantised(save_model: Save, tmp_path: Path) -> None:
    sources = [save_model(f"s{n}", "llama", n) for n in range(3)]
    meanings = [make_fp8(tmp_path / f"q{n}", s, 1.0 + n) for n, s in enumerate(sources)]
    plain = [dequantised(tmp_path / f"p{n}", s, m) for n, (s, m) in enumerate(zip(sources, meanings, strict=True))]
    for method, base in (("simple", None), ("task_arithmetic", 0), ("ties", 0), ("actmat", 0)):
        found, wanted = [
            stored(
                Path(
                    merge(
                        [tmp_path / f"{kind}1", tmp_path / f"{kind}2"],
                        tmp_path / f"{method}-{kind}",
                        method=method,
                        base=None if base is None else tmp_path / f"{kind}{base}",
                        max_shard_size="5KB",
                    )
                )
            )
            for kind in ("q", "p")
        ]
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), method
    is_average(stored(tmp_path / "simple-q"), meanings[1:], [1, 1])
    opens_as(tmp_path / "simple-q", plain[1:], [1, 1])


def test_the_bytes_depend_neither_on_threads_nor_on_the_engine(save_model: Save, tmp_path: Path) -> None:
    sources = [save_model(f"s{n}", "llama", n) for n in range(2)]
    folders = [tmp_path / f"q{n}" for n in range(2)]
    for folder, source in zip(folders, sources, strict=True):
        make_fp8(folder, source)
    one = merge(folders, tmp_path / "one", method="simple", threads=1)
    two = merge(folders, tmp_path / "two", method="simple", threads=2)
    three = merge(folders, tmp_path / "three", method="simple", engine=SerialEngine())
    files = [(Path(out) / "model.safetensors").read_bytes() for out in (one, two, three)]
    assert files[0] == files[1] == files[2]
    assert verify(three).parents == 2


def gpt_oss(folder: Path, seed: int, quantised: bool) -> dict[str, np.ndarray]:
    """A tiny gpt-oss with MXFP4 experts, or the BF16 release of the same; returns what its tensors mean."""
    torch.manual_seed(seed)
    config = transformers.GptOssConfig(
        vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, sliding_window=8, pad_token_id=0,
        layer_types=["full_attention"], max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    meaning = {}
    for name, weight in list(tensors.items()):
        if name.endswith("_proj") and weight.dim() == 3:
            codes, meaning[name] = mxfp4(tuple(weight.shape), seed)  # type: ignore[arg-type]
            own = (
                {f"{name}{end}": t for end, t in codes.items()}
                if quantised
                else {name: torch.from_numpy(meaning[name]).bfloat16()}
            )
            tensors = {n: t for n, t in tensors.items() if n != name} | own
        else:
            meaning[name] = weight.double().numpy()
    configure(folder, {"quant_method": "mxfp4"} if quantised else None)
    write_shards(folder, tensors, 2 if quantised else 1)
    (folder / "model.safetensors").unlink() if quantised else None
    return meaning


def test_mxfp4_experts_merge_into_the_packed_experts_of_the_plain_release(tmp_path: Path) -> None:
    meanings = [gpt_oss(tmp_path / "q", 1, True), gpt_oss(tmp_path / "p", 2, False)]
    gpt_oss(tmp_path / "plain", 1, False)
    out = Path(merge([tmp_path / "q", tmp_path / "p"], tmp_path / "out", method="simple"))
    is_average(stored(out), meanings, [1, 1])
    opens_as(out, [tmp_path / "plain", tmp_path / "p"], [1, 1])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16).state_dict()
    ours = open_checkpoint(tmp_path / "q")
    assert all(torch.equal(ours.read(name), tensor) for name, tensor in theirs.items())


def test_experts_of_deepseek_whose_last_blocks_are_short(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=40, hidden_size=32, intermediate_size=24, moe_intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
        first_k_dense_replace=1, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    meanings, plain = [], []
    for n in range(2):
        torch.manual_seed(n)
        transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / f"s{n}")
        which = lambda name: "proj" in name and name.endswith(".weight")  # noqa: E731
        meanings.append(make_fp8(tmp_path / f"q{n}", tmp_path / f"s{n}", 1.0 + 3 * n, which=which, shards=3))
        plain.append(dequantised(tmp_path / f"p{n}", tmp_path / f"s{n}", meanings[n]))
    with torch.no_grad():
        ours, theirs = [
            load_model(open_model(folder), "AutoModelForCausalLM")(IDS).logits for folder in (tmp_path / "q0", plain[0])
        ]
    assert torch.equal(ours, theirs)
    out = Path(merge([tmp_path / "q0", tmp_path / "q1"], tmp_path / "out", method="simple"))
    is_average(stored(out), meanings, [1, 1])
    opens_as(out, plain, [1, 1])


def test_a_language_model_inside_another_that_is_quantised(tmp_path: Path) -> None:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=40, **SMALL),
        vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=4, **SMALL),
        image_token_index=39,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "s")
    meaning = write_quantised(tmp_path / "q", tmp_path / "s", partial(fp8), None)
    configure(tmp_path / "q", BLOCKS, inside="text_config")
    plain = dequantised(tmp_path / "p", tmp_path / "s", meaning)
    name = "AutoModelForImageTextToText"
    ours, theirs = (load_model(open_model(folder), name).state_dict() for folder in (tmp_path / "q", plain))
    assert set(ours) == set(theirs) and all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    out = Path(merge([tmp_path / "q", plain], tmp_path / "out", method="simple"))
    assert "quantization_config" not in (out / "config.json").read_text()
    is_average(stored(out), [meaning, meaning], [1, 1])


def test_adapters_on_a_quantised_base(save_model: Save, tmp_path: Path) -> None:
    source = save_model("base", "llama")
    meaning = make_fp8(tmp_path / "q", source)
    plain = dequantised(tmp_path / "plain", source, meaning)
    adapters = [
        adapt_linears(tmp_path / f"adapter-{n}", source, ("q_proj", "down_proj"), seed=n, base_model_name_or_path="q")
        for n in (1, 2)
    ]
    found = stored(Path(merge(adapters, tmp_path / "out")))
    wanted = stored(Path(merge([f"{plain}+{a}" for a in adapters], tmp_path / "wanted")))
    assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        ours = load_model(open_model(adapters[0]), "AutoModelForCausalLM")(IDS).logits
        theirs = load_model(open_model(f"{plain}+{adapters[0]}"), "AutoModelForCausalLM")(IDS).logits
    assert torch.equal(ours, theirs)


def test_the_model_that_is_scored_and_collected_from_is_the_one_that_is_merged(
    save_ready: Save, tmp_path: Path, texts: Path
) -> None:
    folders: dict[str, list[Path]] = {"q": [], "p": []}
    for n in (1, 2):
        source = save_ready(f"s{n}", "llama", n)
        meaning = make_fp8(tmp_path / f"q{n}", source, float(n))
        folders["q"].append(tmp_path / f"q{n}")
        folders["p"].append(dequantised(tmp_path / f"p{n}", source, meaning))
    losses = {k: [evaluate(f, texts, bootstrap=0).rows[0].scores for f in own] for k, own in folders.items()}
    assert losses["q"] == losses["p"] and losses["q"][0] != losses["q"][1]
    for own in folders.values():
        for folder in own:
            collect(folder, texts)
    results = [Path(merge(own, tmp_path / f"out-{k}", method="regmean")) for k, own in folders.items()]
    found, wanted = (stored(out) for out in results)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    used = json.loads((results[0] / "provenance.json").read_text())["tensors"]
    assert sum(entry["method"] == "regmean" for entry in used.values()) >= 14
    scale = load_file(folders["q"][0] / "model.safetensors")
    name = next(name for name in scale if name.endswith("_scale_inv"))
    scale[name] *= 2
    write_shards(folders["q"][0], scale)
    with pytest.raises(UserError, match="weights"):  # the statistics are of other scales
        merge(folders["q"], tmp_path / "again", method="regmean")


def test_a_limit_of_memory_asks_for_a_plain_copy(save_ready: Save, tmp_path: Path, texts: Path) -> None:
    meaning = make_fp8(tmp_path / "q", save_ready("s", "llama"))
    with pytest.raises(UserError, match="dequantised in memory") as caught:
        collect(tmp_path / "q", texts, max_memory="2GB")
    assert f"merganser merge {tmp_path / 'q'} --method simple -o COPY" in str(caught.value.mend)
    copy = Path(merge([tmp_path / "q"], tmp_path / "copy", method="simple"))
    assert all(torch.equal(tensor, bfloat16(meaning[name])) for name, tensor in stored(copy).items())
    assert collect(copy, texts, max_memory="2GB").path.is_file()


def test_training_starts_from_what_the_codes_mean(save_ready: Save, tmp_path: Path) -> None:
    from merganser.tasks import TASKS
    from merganser.training.heads import load_start, open_start

    for model_class in (transformers.LlamaForSequenceClassification, transformers.LlamaForCausalLM):
        source = save_ready(f"s-{model_class.__name__}", "llama", 1, model_class)
        meaning = make_fp8(tmp_path / f"q-{model_class.__name__}", source)
        dequantised(tmp_path / f"p-{model_class.__name__}", source, meaning)
        states = []
        for kind in ("q", "p"):
            folder = tmp_path / f"{kind}-{model_class.__name__}"
            start = open_start(folder, TASKS["text-classification"], ("a", "b"))
            states.append(load_start(start, 0).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_a_ledger_of_quantised_contributors(save_ready: Save, tmp_path: Path, texts: Path) -> None:
    folders = []
    for n in (1, 2):
        make_fp8(tmp_path / f"q{n}", save_ready(f"s{n}", "llama", n))
        folders.append(tmp_path / f"q{n}")
        collect(folders[-1], texts)
    base = save_ready("base", "llama", 0)
    meaning = write_quantised(tmp_path / "plain", base, partial(fp8), None, which=lambda _: False)
    book = tmp_path / "sums"
    fill(book, tmp_path / "plain", folders, [1, 1])
    found = stored(Path(ledger.solve(book, tmp_path / "out")))
    wanted = stored(Path(merge(folders, tmp_path / "wanted", method="regmean")))
    assert set(found) == set(meaning) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0.02, atol=0.02)


def gptq(folder: Path) -> Path:
    """A folder with GPTQ's names and configuration."""
    make_model("llama").save_pretrained(folder)
    save_tokenizer(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        stem = name.removesuffix("weight")
        del tensors[name]
        tensors |= {f"{stem}qweight": torch.zeros(2, 16).int(), f"{stem}qzeros": torch.zeros(1, 2).int()}
        tensors |= {f"{stem}scales": torch.ones(1, 16), f"{stem}g_idx": torch.zeros(16).int()}
    configure(folder, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    write_shards(folder, tensors)
    return folder


def test_codes_are_refused_before_any_work_once_a_checkpoint(
    save_model: Save, tmp_path: Path, texts: Path, capsys: Any
) -> None:
    plain, coded = save_model("plain", "llama"), gptq(tmp_path / "coded")
    for models, base in (([plain, coded], None), ([coded, plain], None), ([plain, plain], coded)):
        with pytest.raises(QuantisedWeights, match="gptq, 4 bits"):
            make_plan(make_recipe({"contributors": [str(m) for m in models], **({"base": str(base)} if base else {})}))
    with pytest.raises(Problems) as caught:
        merge([coded, gptq(tmp_path / "other")], tmp_path / "out")
    assert len(caught.value.problems) == 2 and not (tmp_path / "out").exists()
    adapters = [adapt_linears(tmp_path / f"a{n}", plain, ("q_proj",), seed=n) for n in range(3)]
    with pytest.raises(QuantisedWeights, match="the base of an adapter"):  # one problem, however many adapters
        merge([f"{coded}+{adapter}" for adapter in adapters], tmp_path / "out")
    with pytest.raises(QuantisedWeights, match="gptq"):
        collect(coded, texts)
    with pytest.raises(CheckpointError, match="quantised: gptq, 4 bits") as told:
        evaluate(coded, texts, bootstrap=0)
    assert "full precision" in str(told.value.mend)
    for folder, said in ((coded, "cannot be read as weights"), (tmp_path / "fp8", "read as BF16")):
        if folder != coded:
            make_fp8(folder, plain)
        with pytest.raises(SystemExit) as stop:
            main(["inspect", str(folder), "--json"])
        assert stop.value.code in (0, None)
        assert said in json.loads(capsys.readouterr()[0])["quantisation"]


def test_codes_that_no_configuration_declares_are_not_scored_either(
    save_model: Save, tmp_path: Path, texts: Path
) -> None:
    folder = save_model("m", "llama")
    save_tokenizer(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    write_shards(folder, {n: t.to(torch.float8_e4m3fn) if "_proj" in n else t for n, t in tensors.items()})
    assert isinstance(open_checkpoint(folder, codes=True), CodedCheckpoint)
    with pytest.raises(QuantisedWeights, match="F8_E4M3"):
        evaluate(folder, texts, bootstrap=0)


def test_what_a_mend_says_about_plain_numbers_works(save_model: Save, tmp_path: Path) -> None:
    one, two = save_model("one", "llama", 1), save_model("two", "llama", 2)
    configure(two, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(QuantisedWeights, match="plain numbers") as caught:
        merge([one, two], tmp_path / "out", method="simple")
    assert "remove quantization_config" in str(caught.value.mend)
    config = json.loads((two / "config.json").read_text())
    del config["quantization_config"]
    (two / "config.json").write_text(json.dumps(config))
    assert Path(merge([one, two], tmp_path / "out", method="simple")).is_dir()


def test_a_head_of_an_adapter_on_a_quantised_base(save_model: Save, tmp_path: Path) -> None:
    source = save_model("base", "llama")
    meaning = make_fp8(tmp_path / "q", source)
    tensors = {**factors("model.layers.0.self_attn.q_proj", 16, 16), "score.weight": torch.randn(2, 16)}
    settings = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    adapter = write_adapter(tmp_path / "adapter", tensors, tmp_path / "q", **settings)
    plain = dequantised(tmp_path / "plain", source, meaning)
    checkpoint = open_checkpoint(adapter)
    assert isinstance(checkpoint.base, QuantisedCheckpoint)  # type: ignore[attr-defined]
    with torch.no_grad():
        models = [
            load_model(open_model(r), "AutoModelForSequenceClassification") for r in (adapter, f"{plain}+{adapter}")
        ]
        ours, theirs = (
            model(IDS).logits if model.config.pad_token_id is not None else model(IDS[:1]).logits for model in models
        )
    assert torch.equal(ours, theirs)
