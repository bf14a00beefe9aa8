"""Adapters as PEFT saves them, against PEFT itself: the model that is scored, and the merge, are what PEFT computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from architectures.tiny import SETTINGS, Tiny
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect
from merganser.errors import Problems, UserError
from merganser.evaluation import evaluate
from merganser.merging import merge
from merganser.statistics import Statistics
from merganser.tasks.models import load_model, load_tokenizer, open_model

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'merganser[test]'")

IDS = torch.tensor([[11, 12, 13, 20, 30, 47, 12, 2]])
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True)
class Case:
    """An adapter: of which model, and PEFT's settings."""

    model_class: str
    settings: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None  # to which the vocabulary is resized before training


def linear(*names: str, **more: Any) -> dict[str, Any]:
    return {"target_modules": [*names], **more}


PACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "packed experts": Case(
        "MixtralForCausalLM",
        linear("q_proj", target_parameters=PACKED, rank_pattern={"layers.0.mlp.experts.down_proj": 2}, use_rslora=True),
    ),
    "one packed parameter": Case("Qwen3MoeForCausalLM", linear(target_parameters=["experts.down_proj"])),
    "all of a router's": Case("MixtralForCausalLM", linear("v_proj", target_parameters=["gate.weight"])),
    "experts stored packed": Case("GptOssForCausalLM", linear("k_proj", target_parameters=PACKED)),
    "modules of experts": Case("MixtralForCausalLM", linear("w1", "w2", "w3")),
    "a whole stack": Case("Qwen3MoeForCausalLM", linear("q_proj", modules_to_save=["mlp.experts"])),
    "pictures": Case("Gemma3ForConditionalGeneration", linear("q_proj", "fc1")),
    "pictures, older": Case("LlavaForConditionalGeneration", linear("v_proj", "linear_1")),
    "fused": Case("Phi3ForCausalLM", linear("qkv_proj", "gate_up_proj")),
    "a head of its own": Case("LlamaForCausalLM", linear("q_proj", modules_to_save=["lm_head"]), TIED),
    "an embedding of its own": Case("LlamaForCausalLM", linear("q_proj", modules_to_save=["embed_tokens"]), TIED),
    "still tied": Case(
        "LlamaForCausalLM", linear("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True), TIED
    ),
    "factors of an embedding": Case("LlamaForCausalLM", linear("embed_tokens"), TIED),
    "factors, still tied": Case("LlamaForCausalLM", linear("embed_tokens", ensure_weight_tying=True), TIED),
    "factors of a head": Case("LlamaForCausalLM", linear("lm_head"), TIED),
    "both": Case("Qwen2ForCausalLM", linear("lm_head", "embed_tokens"), TIED),
    "a head of pictures": Case("Gemma3ForConditionalGeneration", linear("k_proj", modules_to_save=["lm_head"])),
    "tokens": Case("LlamaForCausalLM", linear("q_proj", trainable_token_indices=[12, 30])),
    "tied tokens": Case("LlamaForCausalLM", linear("q_proj", trainable_token_indices=[12, 30]), TIED),
    "other tokens of a head": Case(
        "LlamaForCausalLM", linear("q_proj", trainable_token_indices={"embed_tokens": [12], "lm_head": [30, 11]}), TIED
    ),
    "resized": Case("LlamaForCausalLM", linear("q_proj"), rows=52),
    "resized and tied": Case("LlamaForCausalLM", linear("q_proj"), TIED, rows=52),
    "resized with factors": Case("LlamaForCausalLM", linear("q_proj", "embed_tokens", "lm_head"), rows=52),
    "resized with a tied head": Case("LlamaForCausalLM", linear("q_proj", modules_to_save=["lm_head"]), TIED, rows=52),
    "resized for tokens": Case("LlamaForCausalLM", linear("q_proj", trainable_token_indices=[48, 49]), TIED, rows=52),
    "a seq2seq model": Case("T5ForConditionalGeneration", linear("q", "wo", modules_to_save=["lm_head"])),
}


def make(case: Case, folder: Path, numbers: tuple[int, ...] = (1,)) -> tuple[Path, list[Path]]:
    """A base, and adapters of it that PEFT saved after every part of them was changed."""
    tiny = Tiny(case.model_class, "text", {**SETTINGS.get(case.model_class, {}), **case.model})
    base = tiny.save(folder / "base")
    adapters = []
    for number in numbers:
        model = peft.get_peft_model(opened(case, base), peft.LoraConfig(r=3, lora_alpha=7, **dict(case.settings)))
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            if case.rows:
                weight = model.get_input_embeddings().weight
                weight[48:] = 0.1 * torch.randn_like(weight[48:])
        adapters.append(folder / f"adapter-{number}")
        model.save_pretrained(adapters[-1])
    return base, adapters


def opened(case: Case, base: Path) -> Any:
    """The base as a user of PEFT opens it."""
    model = getattr(transformers, case.model_class).from_pretrained(base)
    if case.rows:
        model.resize_token_embeddings(case.rows)
    return model.eval()


def in_peft(case: Case, base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(opened(case, base), adapter).eval()


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_is_scored_is_what_peft_computes(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, (adapter,) = make(case, tmp_path)
    expected = logits(in_peft(case, base, adapter))
    found = logits(load_model(open_model(f"{base}+{adapter}"), case.model_class))
    same(found, expected)
    assert not torch.allclose(logits(opened(case, base)), expected, rtol=1e-3, atol=1e-3)  # the test can fail


def renamed(folder: Path, adapter: Path, names: Callable[[str], str], **config: Any) -> Path:
    """The same adapter under the names that another version of transformers gave."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert all(names(name) != name for name in tensors)
    save_file({names(name): tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


@pytest.mark.parametrize("model_class", ["Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration"])
@pytest.mark.parametrize("stored_newly", [False, True])
def test_models_of_pictures_by_older_names(model_class: str, stored_newly: bool, tmp_path: Path) -> None:
    case = Case(model_class, linear("q_proj", "fc1", "fc2"))
    base, (adapter,) = make(case, tmp_path)
    if stored_newly:
        store_as_in_memory(case, base)
    older = renamed(
        tmp_path / "older",
        adapter,
        lambda name: name.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.vision_tower.", "model.vision_tower.vision_model."
        ),
    )
    expected = logits(in_peft(case, base, adapter))
    for one in (adapter, older):
        same(logits(load_model(open_model(f"{base}+{one}"), model_class)), expected)


def store_as_in_memory(case: Case, base: Path) -> None:
    """Write a base's weights by the names and in the shapes that this version of transformers has in memory."""
    model = opened(case, base)
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(state, base / "model.safetensors", {"format": "pt"})
    assert set(load_file(base / "model.safetensors")) == set(state)


def separate_experts(folder: Path, base: Path, names: Mapping[str, tuple[int, int]], stem: str, rank: int = 3) -> Path:
    """An adapter of every expert, as older versions saved them."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for layer in range(2):
        for expert in range(4):
            for name, (out, width) in names.items():
                module = f"base_model.model.model.layers.{layer}.{stem}.experts.{expert}.{name}"
                tensors[f"{module}.lora_A.weight"] = 0.3 * torch.randn(rank, width, generator=generator)
                tensors[f"{module}.lora_B.weight"] = 0.3 * torch.randn(out, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 7, "target_modules": [*names], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base.name}))
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("model_class", "names", "stem"),
    [
        ("MixtralForCausalLM", {"w1": (40, 32), "w2": (32, 40), "w3": (40, 32)}, "block_sparse_moe"),
        ("Qwen3MoeForCausalLM", {"gate_proj": (24, 32), "down_proj": (32, 24), "up_proj": (24, 32)}, "mlp"),
    ],
)
def test_separate_experts_as_older_versions_saved_them(
    model_class: str, names: dict[str, tuple[int, int]], stem: str, packed: bool, tmp_path: Path
) -> None:
    case = Case(model_class, {})
    base = Tiny(model_class, "text", SETTINGS.get(model_class, {})).save(tmp_path / "base")
    if packed:
        store_as_in_memory(case, base)
    adapter = separate_experts(tmp_path / "adapter", base, names, stem)
    expected = logits(in_peft(case, base, adapter))
    same(logits(load_model(open_model(adapter), model_class)), expected)
    assert not torch.allclose(logits(opened(case, base)), expected, rtol=1e-3, atol=1e-3)


def test_tied_tensors_that_are_both_stored_change_together(tmp_path: Path) -> None:
    case = CASES["factors, still tied"]
    base, (adapter,) = make(case, tmp_path)
    state = load_file(base / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, base / "model.safetensors", {"format": "pt"})
    same(logits(load_model(open_model(f"{base}+{adapter}"), case.model_class)), logits(in_peft(case, base, adapter)))
    checkpoint = open_checkpoint(f"{base}+{adapter}")
    assert torch.equal(checkpoint.read("lm_head.weight"), checkpoint.read("model.embed_tokens.weight"))


#: Whose parameters PEFT merges wrongly in memory: it puts an embedding's change on the head that is tied to it, too.
_WRONG_IN_PEFT = {
    "factors of an embedding", "factors of a head", "both", "factors, still tied", "other tokens of a head",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if name not in _WRONG_IN_PEFT])
def test_the_average_is_that_of_the_parameters_that_peft_merges(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, adapters = make(case, tmp_path, (1, 2))
    states = [in_peft(case, base, adapter).merge_and_unload().state_dict() for adapter in adapters]
    out = merge([f"{base}+{adapter}" for adapter in adapters], tmp_path / "out", method="simple", coefficients=[1, 3])
    model, info = getattr(transformers, case.model_class).from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = model.state_dict()
    assert set(found) == set(states[0])
    for parameter, tensor in found.items():
        expected = (states[0][parameter].double() + 3 * states[1][parameter].double()) / 4
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6, msg=parameter)


def save_words(folder: Path, count: int) -> None:
    """A tokenizer of so many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({f"w{number}": number for number in range(count)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(folder)


def test_the_tokenizer_is_that_of_the_adapter_s_training(tmp_path: Path) -> None:
    case = CASES["resized and tied"]
    base, adapters = make(case, tmp_path, (1, 2))
    save_words(base, 48)
    for adapter in adapters:
        save_words(adapter, 52)
    opened_model = open_model(f"{base}+{adapters[0]}")
    assert load_tokenizer(opened_model)("w50 w51 w3")["input_ids"] == [50, 51, 3]
    assert opened_model.config["vocab_size"] == 52 and opened_model.config["tie_word_embeddings"]
    out = merge([f"{base}+{adapter}" for adapter in adapters], tmp_path / "out", method="simple")
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == 52
    assert transformers.AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().weight.shape == (52, 32)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 52


def test_a_head_of_its_own_and_a_tied_one_are_a_choice(tmp_path: Path) -> None:
    """An adapter with a head of its own and one without are merged as two tensors, if that is asked for."""
    own, tied = CASES["a head of its own"], Case("LlamaForCausalLM", linear("v_proj"), TIED)
    base, (first,) = make(own, tmp_path)
    _, (second,) = make(tied, tmp_path, (2,))
    models = [f"{base}+{first}", f"{base}+{second}"]
    with pytest.raises(UserError, match="tie_word_embeddings: adapter-1 False, adapter-2 True"):
        merge(models, tmp_path / "none", method="simple")
    out = merge(models, tmp_path / "out", method="simple", config_from="adapter-1")
    states = [in_peft(own, base, one).merge_and_unload().state_dict() for one in (first, second)]
    for name, tensor in transformers.AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        expected = (states[0][name].double() + states[1][name].double()) / 2
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def test_problems_of_one_cause_are_one(tmp_path: Path) -> None:
    base = Tiny("MixtralForCausalLM", "text", SETTINGS.get("MixtralForCausalLM", {})).save(tmp_path / "base")
    names = {"w1": (40, 32), "w2": (32, 40), "w3": (40, 32)}
    adapter = separate_experts(tmp_path / "adapter", base, names, "no_such_place")
    with pytest.raises(UserError) as caught:
        open_checkpoint(adapter)
    assert not isinstance(caught.value, Problems)
    assert "no_such_place.experts.0.w1.weight" in str(caught.value) and "and 16 more" in str(caught.value)


def test_ranks_and_rows_that_do_not_fit(tmp_path: Path) -> None:
    base, (adapter,) = make(CASES["packed experts"], tmp_path)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "r": 4, "rank_pattern": {}}))
    with pytest.raises(UserError, match=r"is of rank 3 for each of 4 experts, adapter_config\.json says 4"):
        open_checkpoint(f"{base}+{adapter}")
    base, (adapter,) = make(CASES["tokens"], tmp_path / "tokens")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for rows, says in (([12, 99], "token 99 is trained"), ([12], "for 1 tokens"), ([12, 12], "one token twice")):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, "trainable_token_indices": rows}))
        with pytest.raises(UserError, match=says):
            open_checkpoint(f"{base}+{adapter}")


@pytest.mark.parametrize("name", ["packed experts", "experts stored packed", "tokens", "a whole stack"])
def test_the_same_bits_however_a_tensor_is_cut(name: str, tmp_path: Path) -> None:
    base, (adapter,) = make(CASES[name], tmp_path)
    checkpoint = open_checkpoint(f"{base}+{adapter}")
    for tensor in checkpoint.changes:
        whole, rows = checkpoint.read(tensor), checkpoint.tensors[tensor].shape[0]
        for start, stop in ((0, 1), (1, rows), (rows // 2, rows // 2 + 1)):
            assert torch.equal(checkpoint.read(tensor, start, stop), whole[start:stop])


@pytest.mark.parametrize("name", ["packed experts", "a head of its own"])
def test_collecting_and_scoring_see_the_model_that_peft_merges(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, (adapter,) = make(case, tmp_path)
    save_words(base, 48)
    full = tmp_path / "full"
    in_peft(case, base, adapter).merge_and_unload().save_pretrained(full)
    save_words(full, 48)
    texts = tmp_path / "texts.jsonl"
    rows = (" ".join(f"w{(7 * row + 3 * n) % 48}" for n in range(12)) for row in range(6))
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    reference = f"{base}+{adapter}"
    losses = [evaluate(model, texts, task="causal-lm").rows[0].key for model in (reference, full, base)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] != pytest.approx(losses[2], rel=1e-3)
    mine, theirs = (Statistics.open(collect(model, texts, task="causal-lm")) for model in (reference, full))
    assert {layer.weight for layer in mine.header.layers} == {layer.weight for layer in theirs.header.layers}
    assert mine.check_binding(open_checkpoint(reference)) == []
    for layer in mine.header.layers:
        other = theirs.layer(layer.weight)
        if layer.input is not None and other is not None:
            torch.testing.assert_close(mine.gram(layer.input), theirs.gram(other.input), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["packed experts", "modules of experts", "experts stored packed", "a head of its own"])
def test_methods_treat_adapters_as_the_full_models(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, adapters = make(case, tmp_path, (1, 2))
    full = [tmp_path / "full-1", tmp_path / "full-2"]
    for folder, adapter in zip(full, adapters, strict=True):
        in_peft(case, base, adapter).merge_and_unload().save_pretrained(folder)
    for method in ("actmat", "task_arithmetic", "ties"):
        found = merge([f"{base}+{adapter}" for adapter in adapters], tmp_path / f"a-{method}", method=method)
        expected = merge(full, tmp_path / f"f-{method}", method=method, base=base)
        assert found.coverage.share == expected.coverage.share
        states = [
            getattr(transformers, case.model_class).from_pretrained(one).state_dict() for one in (found, expected)
        ]
        for parameter, tensor in states[0].items():
            torch.testing.assert_close(tensor, states[1][parameter], rtol=1e-3, atol=1e-4, msg=f"{method} {parameter}")
