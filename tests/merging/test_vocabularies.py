"""Vocabularies are matched by token: what opens has, for each token, the rows that the contributors have for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from merganser.checkpoints import open_checkpoint, tokenizer_files
from merganser.cli import cli
from merganser.collection import collect_statistics
from merganser.errors import UserError
from merganser.merging import make_plan, make_recipe, memory, merge, reproduce, verify
from merganser.merging.vocabulary import vocabulary_tensors
from merganser.statistics import FILE_NAME, write_statistics
from vocabulary_examples import TOKENS, give_tokenizer, write_model


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """``save(name, seed, rows, tokens, added)``: a tiny untied Llama with a tokenizer, or none."""
    return lambda name, *args, **more: write_model(tmp_path / name, *args, **more)


def tables(folder: Path, kind: Any = transformers.AutoModelForCausalLM) -> tuple[dict[str, tuple[Tensor, Tensor]], Any]:
    """What opens: for each token of the tokenizer, its rows of the input and output embeddings in float64."""
    model, loading = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    into, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert into.shape[0] == out.shape[0] == model.config.get_text_config().vocab_size
    ids = {token: number for token, number in tokenizer.get_vocab().items() if number < into.shape[0]}
    return {token: (into[n].detach().double(), out[n].detach().double()) for token, n in ids.items()}, model


def check(result: Path, contributors: Sequence[Path], missing: Mapping[str, Tensor] | None = None) -> Any:
    """Every token of any contributor has the mean of the rows of those that know it."""
    merged, model = tables(result)
    known = [tables(one)[0] for one in contributors]
    for token in dict.fromkeys(token for table in known for token in table):
        for place in (0, 1):
            rows = [table[token][place] for table in known if token in table]
            torch.testing.assert_close(merged[token][place], torch.stack(rows).mean(0), rtol=1e-6, atol=1e-6)
    return model


def test_each_added_another_token(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = save("a", 1, 41, added=["<a>"]), save("b", 2, 41, added=["<b>", "<beyond>"])
    with pytest.raises(UserError, match=r"a has '<a>' \(id 40\); b has '<b>' \(id 40\).*\n.*--vocabulary union"):
        merge([a, b], tmp_path / "no", method="simple")
    with pytest.raises(UserError, match="--vocabulary union"):
        merge([a, b], tmp_path / "no", method="simple", vocabulary="largest")
    arguments = ["merge", str(a), str(b), "--method", "simple", "--vocabulary", "union", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "'<b>' added to the tokenizer" in done.stderr
    model = check(tmp_path / "out", [a, b])
    assert model.config.vocab_size == 42
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w3 <a>w4 <b>").input_ids == [TOKENS.index("w3"), 40, TOKENS.index("w4"), 41]


def test_the_same_tokens_in_another_order(save: Callable[..., Path], tmp_path: Path) -> None:
    other = [*TOKENS[:1], *reversed(TOKENS[1:])]
    a, b = save("a", 1, pad_token_id=1, eos_token_id=2), save("b", 2, tokens=other, pad_token_id=39, eos_token_id=38)
    out = merge([a, b], tmp_path / "out", method="simple")
    assert any("by token" in note for note in out.notes)
    model = check(tmp_path / "out", [a, b])
    assert (
        model.config.pad_token_id == 1 and (out / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()
    )
    back = merge([a, b], tmp_path / "back", method="simple", tokenizer_from="b")
    model = check(back, [a, b])
    assert (model.config.pad_token_id, model.config.eos_token_id) == (39, 38)
    assert (back / "tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()


def test_padded_rows_are_understood(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = save("a", 1, 40), save("b", 2, 48)
    assert check(merge([a, b], tmp_path / "trimmed", method="simple"), [a, b]).config.vocab_size == 40
    out = merge([b, a], tmp_path / "kept", method="simple")
    assert check(out, [b, a]).config.vocab_size == 48
    ours, theirs = (load_file(one / "model.safetensors")["lm_head.weight"] for one in (out, b))
    assert torch.equal(ours[40:], theirs[40:])
    c = save("c", 3, 48, added=["<c>"])  # new tokens take the place of padding first
    grown = merge([b, save("d", 4, 48, added=["<d>"]), c], tmp_path / "grown", method="simple", vocabulary="union")
    assert check(grown, [b, tmp_path / "d", c]).config.vocab_size == 48


def test_tokens_without_a_row_are_no_difference(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = save("a", 1), save("b", 2, added=["[NEW]"])  # added to the tokenizer, the embedding not resized
    check(merge([a, b], tmp_path / "out", method="simple"), [a, b])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "actmat"])
def test_rows_of_a_resized_embedding_that_the_base_lacks(save, tmp_path: Path, method: str) -> None:
    """The 40 rows of the base are treated as without the new ones; these are averaged, and said so."""
    new = [f"<n{number}>" for number in range(8)]
    base = save("base", 0)
    grown = [save(name, seed, 48, added=new) for seed, name in enumerate("ab", 1)]
    cut = [save(f"{name}40", seed) for seed, name in enumerate("ab", 1)]
    for small, large in zip(cut, grown, strict=True):
        tensors = load_file(large / "model.safetensors")
        tensors = {name: t[:40].clone() if t.shape[0] == 48 else t for name, t in tensors.items()}
        from safetensors.torch import save_file

        save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    out = merge(grown, tmp_path / "out", method=method, base=base)
    whole = merge(cut, tmp_path / "whole", method=method, base=base)
    assert any("8 rows" in note and "not in the base model" in note for note in out.notes)
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        both = [load_file(one / "model.safetensors")[name].double() for one in grown]
        torch.testing.assert_close(ours[name][:40], theirs[name])
        torch.testing.assert_close(ours[name][40:].double(), (both[0] + both[1])[40:] / 2)
    used = json.loads((out / "provenance.json").read_text())["tensors"]["model.embed_tokens.weight"]
    assert method == "actmat" or used["method"] == method
    tables(out)


def test_a_base_whose_tokens_stand_in_another_order(save: Callable[..., Path], tmp_path: Path) -> None:
    base = save("base", 0, tokens=[*TOKENS[:1], *reversed(TOKENS[1:])])
    a, b = save("a", 1), save("b", 2)
    out = merge([a, b], tmp_path / "out", method="task_arithmetic", base=base, options={"scale": 0.5})
    merged, below, first, second = (tables(one)[0] for one in (out, base, a, b))
    for token in TOKENS:
        for place in (0, 1):
            rows = [table[token][place] for table in (below, first, second)]
            expected = rows[0] + 0.5 * (rows[1] + rows[2] - 2 * rows[0])
            torch.testing.assert_close(merged[token][place], expected, rtol=1e-5, atol=1e-5)


def test_whose_rows_stand_where_one_lacks_them(save: Callable[..., Path], tmp_path: Path) -> None:
    base, a, b = save("base", 0, 41, added=["<x>"]), save("a", 1, 41, added=["<x>"]), save("b", 2)
    options = {"method": "simple", "vocabulary": "union"}
    merged = [tables(merge([b, a], tmp_path / "mean", **options))[0]]
    merged.append(tables(merge([b, a], tmp_path / "base-row", base=base, missing_rows="base", **options))[0])
    merged.append(tables(merge([b, a], tmp_path / "named", missing_rows="a", **options))[0])
    first, below = tables(a)[0], tables(base)[0]
    expected = [first["<x>"], below["<x>"], first["<x>"]]
    for found, rows in zip(merged, expected, strict=True):
        torch.testing.assert_close(torch.stack(found["<x>"]), torch.stack(rows))
        torch.testing.assert_close(found["w1"][0], (first["w1"][0] + tables(b)[0]["w1"][0]) / 2)
    with pytest.raises(UserError, match="no base model"):
        merge([b, a], tmp_path / "no", missing_rows="base", **options)


def test_the_tokenizer_that_has_every_token_is_written(tmp_path: Path) -> None:
    """The heads differ in height, too, which says nothing of the vocabulary."""
    folders = []
    for name, rows, count in (("a", 44, 2), ("b", 40, 20)):
        torch.manual_seed(rows)
        labels = {number: f"{name if count == 20 else 'l'}{number}" for number in range(count)}
        config = transformers.BertConfig(
            vocab_size=rows,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            id2label=labels,
            label2id={label: n for n, label in labels.items()},
        )
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        give_tokenizer(tmp_path / name, TOKENS, [f"<{n}>" for n in range(rows - 40)])
        folders.append(tmp_path / name)
    for order in (folders, folders[::-1]):
        out = merge(order, tmp_path / f"out-{order[0].name}", method="simple", vocabulary="largest", labels="union")
        assert len(transformers.AutoTokenizer.from_pretrained(out)) == 44
        model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.vocab_size == 44 and model.config.num_labels == 22
        assert model.bert.embeddings.position_embeddings.weight.shape[0] == 32


def test_an_embedding_that_is_kept_separate_keeps_its_tokenizer(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = save("a", 1, 41, added=["<a>"], pad_token_id=1), save("b", 2, 42, added=["<b>", "<c>"], pad_token_id=40)
    with pytest.raises(UserError, match="keep all of them separate"):
        merge([a, b], tmp_path / "no", method="simple", vocabulary="union", keep_separate=["lm_head*"])
    out = merge([a, b], tmp_path / "out", method="simple", keep_separate=["lm_head*", "*embed_tokens*"])
    for folder, parent in ((out, a), (out / "heads" / "b", b)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained(parent).get_vocab()
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] in (1, 40)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, subfolder="heads/b")
    assert model.config.vocab_size == 42 and model.config.pad_token_id == 40


def test_buffers_with_a_column_for_each_token(tmp_path: Path) -> None:
    """final_logits_bias of BART and Marian is (1, vocabulary); positions have as many rows as tokens here."""
    folders = []
    for seed, tokens in enumerate((TOKENS, [*TOKENS[:3], *reversed(TOKENS[3:])])):
        torch.manual_seed(seed)
        config = transformers.BartConfig(
            vocab_size=40,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=38,
        )
        model = transformers.BartForConditionalGeneration(config)
        model.final_logits_bias.copy_(torch.randn(1, 40))
        model.save_pretrained(tmp_path / str(seed))
        give_tokenizer(tmp_path / str(seed), tokens)
        folders.append(tmp_path / str(seed))
    out = merge(folders, tmp_path / "out", method="simple")
    merged, first, second = (transformers.BartForConditionalGeneration.from_pretrained(f) for f in (out, *folders))
    ids = [transformers.AutoTokenizer.from_pretrained(folder).get_vocab() for folder in folders]
    for token in TOKENS:
        mine, theirs = ids[0][token], ids[1][token]
        for place in (lambda m: m.final_logits_bias[0], lambda m: m.get_input_embeddings().weight):
            torch.testing.assert_close(place(merged)[mine], (place(first)[mine] + place(second)[theirs]) / 2)
    positions = [m.model.encoder.embed_positions.weight for m in (merged, first, second)]
    torch.testing.assert_close(positions[0], (positions[1] + positions[2]) / 2)
    assert make_plan(make_recipe({"contributors": [str(f) for f in folders]})).vocabulary is not None


def test_which_tensors_have_a_row_for_each_token(tmp_path: Path) -> None:
    """Nothing else that is as high as the vocabulary: positions, token types, hidden units."""
    small = {"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    config = transformers.BertConfig(vocab_size=40, max_position_embeddings=40, type_vocab_size=40, **small)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    text = {"vocab_size": 40, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, **small}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={"image_size": 16, "patch_size": 8, **small}, mm_tokens_per_image=4
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "gemma")
    text = transformers.Gemma3nTextConfig(
        vocab_size=48, vocab_size_per_layer_input=40, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        laurel_rank=4, altup_num_inputs=2, layer_types=["full_attention"], activation_sparsity_pattern=[0.0],
        num_key_value_heads=2, head_dim=16, **small,
    )  # fmt: skip
    transformers.Gemma3nForCausalLM(text).save_pretrained(tmp_path / "gemma3n")
    found = {name: vocabulary_tensors(open_checkpoint(str(tmp_path / name))) for name in ("bert", "gemma", "gemma3n")}
    assert set(found["bert"]) == {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}
    (only,) = found["gemma"]
    assert only.endswith("embed_tokens.weight") and "vision" not in only
    assert {name.rpartition("model.")[2] for name in found["gemma3n"]} == {
        "embed_tokens.weight",
        "embed_tokens_per_layer.weight",
    }


def test_models_without_tokenizers_are_merged_row_by_row(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = save("a", 1, tokens=None), save("b", 2)
    out = merge([a, b], tmp_path / "out", method="simple")
    assert any("no vocabulary can be read of a" in note for note in out.notes)
    c, d = save("c", 3, 40, tokens=None), save("d", 4, 44, tokens=None)
    with pytest.raises(UserError, match="no tokenizer to compare tokens by"):
        merge([c, d], tmp_path / "no", method="simple", vocabulary="union")
    grown = merge([c, d], tmp_path / "grown", method="simple", vocabulary="largest")
    assert transformers.AutoModelForCausalLM.from_pretrained(grown).config.vocab_size == 44


def test_statistics_count_by_token(save: Callable[..., Path], tmp_path: Path) -> None:
    """RegMean, whose embedding is weighted by token counts and whose head by Gram matrices, of any order of tokens."""
    order = torch.tensor([0, *reversed(range(1, 40))])
    a, b, c = save("a", 1), save("b", 2), save("c", 3, tokens=[TOKENS[row] for row in order])
    states = load_file(b / "model.safetensors")
    turned = {name: tensor[order].clone() if tensor.shape[0] == 40 else tensor for name, tensor in states.items()}
    save_file(turned, c / "model.safetensors", metadata={"format": "pt"})
    for seed, folder in enumerate((a, b, c)):
        ids = torch.randint(0, 40, (6, 4, 9), generator=torch.Generator().manual_seed(min(seed, 1)))
        ids = order[ids] if folder is c else ids  # the same texts with other ids: the order is its own inverse
        texts = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids]
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        header, tensors = collect_statistics(model, open_checkpoint(folder), texts)
        write_statistics(folder / FILE_NAME, header, tensors)
    straight, matched = (merge([a, other], tmp_path / f"out-{other.name}", method="regmean") for other in (b, c))
    assert matched.plan.counts["regmean"] == straight.plan.counts["regmean"] > 15
    first, second = load_file(straight / "model.safetensors"), load_file(matched / "model.safetensors")
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5)


def test_an_adapter_has_its_bases_vocabulary(save: Callable[..., Path], tmp_path: Path) -> None:
    base, a = save("base", 0), save("a", 1)
    b = save("b", 2, tokens=[*TOKENS[:1], *reversed(TOKENS[1:])])
    out = merge([a, b], tmp_path / "out", method="simple", base=base, as_adapter=32)
    assert (out / "adapter_config.json").is_file()
    with pytest.raises(UserError, match="an adapter has its base's vocabulary"):
        merge([b, a], tmp_path / "no", method="simple", base=base, as_adapter=32)


def test_whose_tokenizer_is_written(save: Callable[..., Path], tmp_path: Path) -> None:
    a, b = save("a", 1), save("b", 2)
    (b / "chat_template.jinja").write_text("{{ messages }}")
    (b / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "do_sample": True}))
    out = merge([a, b], tmp_path / "out", method="simple")
    (note,) = [note for note in out.notes if "tokenizer_from" in note]
    assert note.startswith("chat templates and generation configurations differ: a's are written")
    assert not (out / "chat_template.jinja").exists()
    out = merge([a, b], tmp_path / "theirs", method="simple", tokenizer_from="b")
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5
    with pytest.raises(UserError, match="no model of this merge is called 'c'"):
        merge([a, b], tmp_path / "no", method="simple", tokenizer_from="c")


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "pad_token_id": 1,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40,
}  # fmt: skip
TEXT = {"num_key_value_heads": 2, "head_dim": 16, **SIZES}
MODELS: dict[str, Callable[[int], Any]] = {
    "bert": lambda rows: transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=rows, max_position_embeddings=41, type_vocab_size=41, **SIZES)
    ),
    "t5": lambda rows: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=rows, d_model=32, d_kv=16, d_ff=24, num_layers=1, num_heads=2)
    ),
    "marian": lambda rows: transformers.MarianMTModel(
        transformers.MarianConfig(vocab_size=rows, decoder_vocab_size=rows, decoder_start_token_id=1, **SEQ2SEQ)
    ),
    "gpt2": lambda rows: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=rows, n_positions=41, n_embd=32, n_layer=1, n_head=2)
    ),
    "gemma3": lambda rows: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={"vocab_size": rows, "sliding_window": 8, **TEXT},
            vision_config={"image_size": 16, "patch_size": 8, **SIZES},
            mm_tokens_per_image=4,
        )
    ),
    "gemma3n": lambda rows: transformers.Gemma3nForCausalLM(
        transformers.Gemma3nTextConfig(
            vocab_size=rows,
            vocab_size_per_layer_input=rows,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            altup_num_inputs=2,
            layer_types=["full_attention"] * 2,
            activation_sparsity_pattern=[0.0] * 2,
            **TEXT,
        )
    ),
}


def by_token(model: Any) -> list[Tensor]:
    """Everything of a model that has a row for each token, listed by hand."""
    out = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, out.weight]
    found += [out.bias] if getattr(out, "bias", None) is not None else []
    found += [model.final_logits_bias[0]] if hasattr(model, "final_logits_bias") else []
    return found + [weight for name, weight in model.named_parameters() if "embed_tokens_per_layer" in name]


@pytest.mark.parametrize("name", MODELS)
def test_the_union_of_two_vocabularies(save: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Other orders and other tokens at once, in every kind of tensor that has a row for each token."""

    def build(rows: int) -> Any:
        return MODELS[name](rows)

    a = save("a", 1, 41, added=["<a>"], build=build)
    b = save("b", 2, 42, tokens=[*TOKENS[:3], *reversed(TOKENS[3:])], added=["<b>", "<c>"], build=build)
    out = merge([a, b], tmp_path / "out", method="simple", vocabulary="union")
    kind = type(build(40))
    model, loading = kind.from_pretrained(out, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    merged, *parents = (by_token(one) for one in (model, kind.from_pretrained(a), kind.from_pretrained(b)))
    ids, *known = (transformers.AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (out, a, b))
    assert len(ids) == 43 and all(tensor.shape[0] == 43 for tensor in merged)
    for token, row in ids.items():
        for place, tensor in enumerate(merged):
            rows = [own[place][table[token]] for own, table in zip(parents, known, strict=True) if token in table]
            torch.testing.assert_close(tensor[row], torch.stack(rows).mean(0))
    assert verify(out).files > 3 and reproduce(out) == []


@pytest.mark.parametrize("method", ["simple", "task_arithmetic", "ties"])
def test_matched_rows_are_merged_in_slices_to_the_same_bytes(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """An embedding of a real model does not fit into memory several times over."""
    base, a = save("base", 0), save("a", 1, 41, added=["<a>"])
    b = save("b", 2, 42, tokens=[*TOKENS[:3], *reversed(TOKENS[3:])], added=["<b>", "<c>"])
    settings: dict[str, Any] = {"method": method, "base": base, "vocabulary": "union", "missing_rows": "base"}
    whole = merge([a, b], tmp_path / "whole", **settings)
    monkeypatch.setattr(memory, "SLICE", 32 * 3)  # three rows at a time
    sliced = merge([a, b], tmp_path / "sliced", **settings)
    assert (whole / "model.safetensors").read_bytes() == (sliced / "model.safetensors").read_bytes()
    step = next(s for s in sliced.plan.steps if s.unit.names == ("model.embed_tokens.weight",))
    assert memory._cut(step, None, memory.SLICE)[0] == 3


def test_the_same_files_are_read_once(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of them where all are the same; tokenizer.json once, where only the settings beside it differ."""
    read: list[str] = []
    real = tokenizer_files.read_json

    def noted(path: Path, **settings: Any) -> Any:
        read.append(path.name)
        return real(path, **settings)

    monkeypatch.setattr(tokenizer_files, "read_json", noted)
    models = [save(name, seed) for seed, name in enumerate("abc")]
    recipe = make_recipe({"contributors": list(map(str, models)), "method": "simple"})
    make_plan(recipe)
    assert not read
    settings = models[1] / "tokenizer_config.json"
    said = json.loads(settings.read_text())
    settings.write_text(json.dumps({**said, "padding_side": "left"}))
    make_plan(recipe)
    assert read.count("tokenizer.json") == 1 and read.count("tokenizer_config.json") == 2
    taller = [save(name, seed, 42) for seed, name in enumerate("de")]
    more = {**said, "added_tokens_decoder": {"41": {"content": "<more>"}}}
    (taller[1] / "tokenizer_config.json").write_text(json.dumps(more))
    with pytest.raises(UserError, match="<more>"):  # what is said beside the file is this model's alone
        make_plan(make_recipe({"contributors": list(map(str, taller)), "method": "simple"}))
