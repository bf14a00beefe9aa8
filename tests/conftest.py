"""Tiny models of each architecture, made on the spot: nothing is downloaded, nothing is committed."""

from __future__ import annotations

import own_home as own_home  # before all that reads the environment when it is imported

# isort: split
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ray_cluster import cluster as cluster

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VOCABULARY = 40

#: architecture → (configuration, model class); every one that merganser promises.
ARCHITECTURES: dict[str, tuple[Callable[..., Any], Any]] = {
    "bert": (
        lambda **k: transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **(SMALL | k)),
        transformers.BertForSequenceClassification,
    ),
    "roberta": (
        lambda **k: transformers.RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=36, **(SMALL | k)),
        transformers.RobertaForSequenceClassification,
    ),
    "distilbert": (
        lambda **k: transformers.DistilBertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=32, dim=16, hidden_dim=24, n_layers=2, n_heads=2, **k
        ),
        transformers.DistilBertForSequenceClassification,
    ),
    "deberta-v2": (
        lambda **k: transformers.DebertaV2Config(
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            **(SMALL | k),
        ),
        transformers.DebertaV2ForSequenceClassification,
    ),
    "mpnet": (
        lambda **k: transformers.MPNetConfig(vocab_size=VOCABULARY, max_position_embeddings=36, **(SMALL | k)),
        transformers.MPNetForSequenceClassification,
    ),
    "t5": (
        lambda **k: transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            **k,
        ),
        transformers.T5ForConditionalGeneration,
    ),
    "gpt2": (
        lambda **k: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1, **k
        ),
        transformers.GPT2LMHeadModel,
    ),
    "llama": (
        lambda **k: transformers.LlamaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=32, num_key_value_heads=1, **(SMALL | k)
        ),
        transformers.LlamaForCausalLM,
    ),
    "qwen2": (
        lambda **k: transformers.Qwen2Config(
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            **(SMALL | k),
        ),
        transformers.Qwen2ForCausalLM,
    ),
}


def make_model(architecture: str = "bert", seed: int = 0, **config: Any) -> Any:
    """A randomly initialised model in float32 and eval mode; ``config`` goes to its configuration."""
    torch.manual_seed(seed)
    make_config, model_class = ARCHITECTURES[architecture]
    model = model_class(make_config(**config))
    with torch.no_grad():  # initialisation leaves biases at zero and norms at one: give them something to merge
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """``save_model(name, architecture, seed, **config)`` writes a tiny model folder and returns it."""

    def save(name: str, architecture: str = "bert", seed: int = 0, **config: Any) -> Path:
        folder = tmp_path / name
        make_model(architecture, seed, **config).save_pretrained(folder)
        return folder

    return save


#: Special tokens of each kind of tokenizer, from id 0, and what it puts around one text and around two.
_TOKENIZERS: dict[str, tuple[list[str], dict[str, str], str, str]] = {
    "bert": (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
    ),
    "roberta": (
        ["<s>", "<pad>", "</s>", "<unk>"],
        {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"},
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
    ),
    "t5": (
        ["<pad>", "</s>", "<unk>"],
        {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"},
        "$A </s>",
        "$A </s> $B </s>",
    ),
    "gpt2": (["<unk>", "<end>"], {"unk_token": "<unk>", "eos_token": "<end>"}, "$A", "$A $B"),
    "llama": (
        ["<unk>", "<s>", "</s>"],
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        "<s> $A",
        "<s> $A $B",
    ),
}
WORDS = "the a good bad movie food was is not very I liked it yes no - , . ! ? Anna Paris Acme saw in".split()  # noqa: SIM905


def save_tokenizer(folder: Path, architecture: str) -> None:
    """Write a tokenizer of the right kind: words and punctuation of :data:`WORDS`, all else unknown.

    Not for qwen2, whose tokenizer transformers always rebuilds as a byte-level one.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    kind = {"mpnet": "roberta"}.get(architecture, architecture)
    specials, names, single, pair = _TOKENIZERS.get(kind, _TOKENIZERS["bert"])
    tokens = [*specials, *WORDS]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=names["unk_token"]))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    if " " in single:
        inner.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(token, vocabulary[token]) for token in specials]
        )
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


@pytest.fixture
def save_ready(tmp_path: Path) -> Callable[..., Path]:
    """``save_ready(name, architecture, seed, model_class, **config)``: a tiny model with a tokenizer."""

    def save(name: str, architecture: str = "bert", seed: int = 0, model_class: Any = None, **config: Any) -> Path:
        folder = tmp_path / name
        torch.manual_seed(seed)
        make_config, usual_class = ARCHITECTURES[architecture]
        model = (model_class or usual_class)(make_config(**config))
        with torch.no_grad():  # as initialised, such a model says nearly the same of every text
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        save_tokenizer(folder, architecture)
        return folder

    return save


@pytest.fixture(scope="session")
def resources() -> Path:
    """The real corpora beside the repository, where this machine has them."""
    folder = Path(os.environ.get("MERGANSER_RESOURCES", Path(__file__).parents[2] / "shared" / "resources"))
    if not folder.is_dir():
        pytest.skip(f"no corpora at {folder}: set MERGANSER_RESOURCES to run this")
    return folder
