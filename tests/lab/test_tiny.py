"""The tiny pretrained models open as the published ones do: by transformers' own classes, text coming back whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lab.tiny import ARCHITECTURES

TEXT = "Anna Smith lives near the North Sea, really happy"
CLASSES = {
    "roberta": (transformers.RobertaForMaskedLM, transformers.AutoModelForMaskedLM),
    "distilbert": (transformers.DistilBertForMaskedLM, transformers.AutoModelForMaskedLM),
    "deberta-v3": (transformers.DebertaV2ForSequenceClassification, transformers.AutoModelForSequenceClassification),
    "t5-v1.1": (transformers.T5ForConditionalGeneration, transformers.AutoModelForSeq2SeqLM),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.AutoModelForCausalLM),
}
#: What each tokenizer puts around a text.
AROUND = {
    "roberta": ("<s>", "</s>"), "distilbert": ("[CLS]", "[SEP]"), "deberta-v3": ("[CLS]", "[SEP]"),
    "t5-v1.1": (None, "</s>"), "gpt2": (None, None),
}  # fmt: skip


@pytest.mark.parametrize("published", [{}, {"pickled": True}, {"pickled": True, "half": True}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_opens_and_computes(architecture: str, published: dict[str, bool], pretrained: Callable[..., Path]) -> None:
    folder = pretrained(architecture, **published)
    weights = {path.name for path in folder.glob("*model.*") if path.suffix in (".bin", ".safetensors")}
    assert weights == {"pytorch_model.bin" if published.get("pickled") else "model.safetensors"}
    kind, auto = CLASSES[architecture]
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert type(model) is kind and not report["mismatched_keys"]
    assert all(name.startswith(("classifier.", "pooler.")) for name in report["missing_keys"])
    assert model.dtype == (torch.float16 if published.get("half") else torch.float32)
    inputs: dict[str, Any] = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    if architecture == "t5-v1.1":
        inputs = {**inputs, "decoder_input_ids": torch.zeros(1, 1, dtype=torch.int64)}
    assert model.float()(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_comes_back(architecture: str, pretrained: Callable[..., Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained(architecture))
    assert tokenizer.is_fast
    ids = tokenizer(TEXT)["input_ids"]
    expected = TEXT.lower() if architecture == "distilbert" else TEXT
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected
    before, after = AROUND[architecture]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert (before in (None, tokens[0])) and (after in (None, tokens[-1]))
    assert len(tokenizer) <= transformers.AutoConfig.from_pretrained(pretrained(architecture)).vocab_size


def test_byte_level_tokenizers_take_anything(pretrained: Callable[..., Path]) -> None:
    for architecture in ("roberta", "gpt2"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained(architecture))
        assert tokenizer.decode(tokenizer("déjà ❤")["input_ids"], skip_special_tokens=True) == "déjà ❤"


def test_t5_has_its_hundred_sentinels_and_a_head_of_its_own(pretrained: Callable[..., Path]) -> None:
    folder = pretrained("t5-v1.1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(100)])
    assert len(set(sentinels)) == 100 and tokenizer.unk_token_id not in sentinels
    ids = tokenizer("does the sentence express joy? <extra_id_0> happy")["input_ids"]
    assert ids.count(sentinels[0]) == 1 and tokenizer.unk_token_id not in ids
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert hasattr(model.encoder.block[0].layer[1].DenseReluDense, "wi_1")


def test_deberta_is_a_version_3(pretrained: Callable[..., Path]) -> None:
    model = transformers.AutoModel.from_pretrained(pretrained("deberta-v3"))
    names = dict(model.named_parameters())
    assert "encoder.rel_embeddings.weight" in names and "encoder.LayerNorm.weight" in names
    assert not any("pos_key_proj" in name or "position_embeddings" in name or "token_type" in name for name in names)
    assert type(transformers.AutoTokenizer.from_pretrained(pretrained("deberta-v3"))).__name__ == "DebertaV2Tokenizer"
