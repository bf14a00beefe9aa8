"""Tiny random pretrained models, each a folder as a user gets it from the Hub: true architecture, true tokenizer.

    write_pretrained(folder, "roberta")                          as FacebookAI/roberta-base is published
    write_pretrained(folder, "deberta-v3", pickled=True, half=True)          as microsoft/deberta-v3-large is
    write_pretrained(folder, "t5-v1.1", pickled=True)                        as google/t5-v1_1-base is

Files, names of tensors and settings are those of the published models; only the sizes differ. What their files hold
beside the weights that a fine-tuning uses (heads of the pre-training, buffers of old versions) is there, too. The
tokenizers are trained on the texts of :mod:`lab.tiny_corpora`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor

from lab.tiny_corpora import EMOTIONS, VAD, texts, write_resources

__all__ = ["ARCHITECTURES", "EMOTIONS", "VAD", "write_pretrained", "write_resources"]

WIDTH, DEPTH, HEADS, INNER, POSITIONS = 32, 2, 4, 48, 128
SPREAD = 0.1  # of the initial weights: with the usual 0.02 so narrow a model learns slowly

State = dict[str, Tensor]
Files = dict[str, str | bytes]


@dataclass(frozen=True)
class Architecture:
    """How a model is published.

    Attributes:
        tokenizer: the tokenizer's files by name.
        settings: the ``config.json`` for a number of tokens.
        model: its class.
        published: from the model's tensors to those of the published file.
        generates: whether a ``generation_config.json`` lies beside it.
    """

    tokenizer: Callable[[], Files]
    settings: Callable[[int], dict[str, Any]]
    model: Any
    published: Callable[[State], State]
    generates: bool = False


def write_pretrained(
    folder: Path, architecture: str, *, pickled: bool = False, half: bool = False, seed: int = 0
) -> Path:
    """Write a model folder, which is returned.

    Args:
        folder: to make.
        architecture: one of :data:`ARCHITECTURES`.
        pickled: the weights are in ``pytorch_model.bin`` and nowhere else.
        half: the weights are in float16.
        seed: of the weights.
    """
    kind = ARCHITECTURES[architecture]
    files = dict(kind.tokenizer())
    settings = kind.settings(_vocabulary(files))
    files["config.json"] = json.dumps(settings, indent=2) + "\n"
    if kind.generates:
        ids = {name: value for name, value in settings.items() if name.endswith("_token_id")}
        files["generation_config.json"] = json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n"
    torch.manual_seed(seed)
    model = kind.model(transformers.AutoConfig.for_model(**settings))
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, biases are 0 and norms are 1
            parameter.add_(SPREAD * torch.randn_like(parameter))
    tensors = {name: tensor.clone().contiguous() for name, tensor in kind.published(model.state_dict()).items()}
    if half:
        tensors = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# -- tokenizers --------------------------------------------------------------------------------------------


@cache
def _byte_level(*specials: str) -> Files:
    """``vocab.json`` and ``merges.txt``: byte pairs over bytes, the special tokens first."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts(), vocab_size=520, min_frequency=2, special_tokens=list(specials), show_progress=False
    )
    with TemporaryDirectory() as folder:
        trained.save_model(folder)
        return {name: (Path(folder) / name).read_text(encoding="utf-8") for name in ("vocab.json", "merges.txt")}


@cache
def _roberta_tokenizer() -> Files:
    files = dict(_byte_level("<s>", "<pad>", "</s>", "<unk>"))
    vocabulary: dict[str, int] = json.loads(files["vocab.json"])
    vocabulary["<mask>"] = len(vocabulary)
    files["vocab.json"] = json.dumps(vocabulary, ensure_ascii=False)
    return _with_fast(transformers.RobertaTokenizer, files, {"model_max_length": POSITIONS})


@cache
def _gpt2_tokenizer() -> Files:
    files = dict(_byte_level())
    vocabulary: dict[str, int] = json.loads(files["vocab.json"])
    vocabulary["<|endoftext|>"] = len(vocabulary)
    files["vocab.json"] = json.dumps(vocabulary, ensure_ascii=False)
    return _with_fast(transformers.GPT2Tokenizer, files, {"model_max_length": POSITIONS})


@cache
def _distilbert_tokenizer() -> Files:
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(texts(), vocab_size=400, min_frequency=2, show_progress=False)
    with TemporaryDirectory() as folder:
        trained.save_model(folder)
        files: Files = {"vocab.txt": (Path(folder) / "vocab.txt").read_text(encoding="utf-8")}
    settings = {"do_lower_case": True, "model_max_length": POSITIONS}
    return _with_fast(transformers.DistilBertTokenizer, files, settings)


def _with_fast(kind: Any, files: Files, settings: dict[str, Any]) -> Files:
    """The files with ``tokenizer_config.json`` and the ``tokenizer.json`` that transformers makes of them."""
    config = json.dumps(settings)
    with TemporaryDirectory() as folder:
        for name, content in {**files, "tokenizer_config.json": config}.items():
            (Path(folder) / name).write_text(str(content), encoding="utf-8")
        backend = kind.from_pretrained(folder).backend_tokenizer
        return {**files, "tokenizer_config.json": config, "tokenizer.json": backend.to_str(pretty=True)}


@cache
def _pieces(**pieces: Any) -> bytes:
    """A SentencePiece model of the Unigram kind."""
    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "texts.txt"
        corpus.write_text("\n".join(texts()), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(Path(folder) / "spm"),
            model_type="unigram",
            vocab_size=300,
            hard_vocab_limit=False,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
            **pieces,
        )
        return (Path(folder) / "spm.model").read_bytes()


def _deberta_tokenizer() -> Files:
    model = _pieces(
        pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
    )  # fmt: skip
    return {"spm.model": model, "tokenizer_config.json": '{"do_lower_case": false, "vocab_type": "spm"}'}


def _t5_tokenizer() -> Files:
    sentinels = [f"<extra_id_{number}>" for number in range(100)]
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": sentinels}
    return {
        "spiece.model": _pieces(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
        "special_tokens_map.json": json.dumps(names),
        "tokenizer_config.json": json.dumps({**names, "extra_ids": 100}),
    }


def _vocabulary(files: Files) -> int:
    if "vocab.json" in files:
        return len(json.loads(files["vocab.json"]))
    if "vocab.txt" in files:
        return len(str(files["vocab.txt"]).splitlines())
    (model,) = (content for name, content in files.items() if name.endswith(".model"))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    return -(-(pieces + 101) // 64) * 64  # as published, there are more rows than pieces, sentinels and [MASK]


# -- models ------------------------------------------------------------------------------------------------


def _roberta_file(tensors: State) -> State:
    """With the pooler of the pre-training and the positions that old versions saved."""
    return {
        **tensors,
        "roberta.embeddings.position_ids": torch.arange(POSITIONS + 2)[None],
        "roberta.pooler.dense.weight": torch.randn(WIDTH, WIDTH),
        "roberta.pooler.dense.bias": torch.randn(WIDTH),
    }


def _deberta_file(tensors: State) -> State:
    """With the heads of generator and discriminator under their own names, and positions of the mask decoder."""
    found = {name: tensor for name, tensor in tensors.items() if name.startswith("deberta.")}
    found["deberta.embeddings.position_embeddings.weight"] = torch.randn(POSITIONS, WIDTH)
    for head in ("lm_predictions.lm_head", "mask_predictions"):
        found[f"{head}.dense.weight"] = torch.randn(WIDTH, WIDTH)
        for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias"):
            found[f"{head}.{name}"] = torch.randn(WIDTH)
    found["lm_predictions.lm_head.bias"] = torch.randn(len(tensors["deberta.embeddings.word_embeddings.weight"]))
    found["mask_predictions.classifier.weight"] = torch.randn(1, WIDTH)
    found["mask_predictions.classifier.bias"] = torch.randn(1)
    return found


def _gpt2_file(tensors: State) -> State:
    """Without the prefix and the tied head, with the causal masks of old versions."""
    found = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
    mask = torch.ones(POSITIONS, POSITIONS).tril()[None, None]
    return {**found, **{f"h.{layer}.attn.bias": mask.clone() for layer in range(DEPTH)}}


def _t5_file(tensors: State) -> State:
    """With a head of its own; transformers ties it to the embedding but where a file has two that differ."""
    return {**tensors, "lm_head.weight": torch.randn_like(tensors["lm_head.weight"])}


def _encoder(vocabulary: int, **more: Any) -> dict[str, Any]:
    """Settings that RoBERTa and DeBERTa share."""
    return {
        "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": INNER,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        "initializer_range": SPREAD, "vocab_size": vocabulary, **more,
    }  # fmt: skip


def _roberta(vocabulary: int) -> dict[str, Any]:
    return _encoder(
        vocabulary, architectures=["RobertaForMaskedLM"], model_type="roberta", bos_token_id=0, pad_token_id=1,
        eos_token_id=2, layer_norm_eps=1e-5, max_position_embeddings=POSITIONS + 2, type_vocab_size=1,
    )  # fmt: skip


def _deberta(vocabulary: int) -> dict[str, Any]:
    return _encoder(
        vocabulary, model_type="deberta-v2", layer_norm_eps=1e-7, max_position_embeddings=POSITIONS,
        relative_attention=True, position_buckets=16, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type="p2c|c2p", max_relative_positions=-1, position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip


def _distilbert(vocabulary: int) -> dict[str, Any]:
    return {
        "activation": "gelu", "architectures": ["DistilBertForMaskedLM"], "attention_dropout": 0.1, "dim": WIDTH,
        "dropout": 0.1, "hidden_dim": INNER, "initializer_range": SPREAD, "max_position_embeddings": POSITIONS,
        "model_type": "distilbert", "n_heads": HEADS, "n_layers": DEPTH, "pad_token_id": 0, "qa_dropout": 0.1,
        "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": vocabulary,
    }  # fmt: skip


def _t5(vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"], "d_ff": INNER, "d_kv": 8, "d_model": WIDTH,
        "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6, "model_type": "t5",
        "num_decoder_layers": DEPTH, "num_heads": HEADS, "num_layers": DEPTH, "output_past": True, "pad_token_id": 0,
        "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "use_cache": True,
        "vocab_size": vocabulary,
    }  # fmt: skip


def _gpt2(vocabulary: int) -> dict[str, Any]:
    return {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": vocabulary - 1, "embd_pdrop": 0.1, "eos_token_id": vocabulary - 1,
        "initializer_range": SPREAD, "layer_norm_epsilon": 1e-5, "model_type": "gpt2", "n_ctx": POSITIONS,
        "n_embd": WIDTH, "n_head": HEADS, "n_layer": DEPTH, "n_positions": POSITIONS, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": vocabulary,
    }  # fmt: skip


ARCHITECTURES = {
    "roberta": Architecture(_roberta_tokenizer, _roberta, transformers.RobertaForMaskedLM, _roberta_file),
    "distilbert": Architecture(_distilbert_tokenizer, _distilbert, transformers.DistilBertForMaskedLM, dict),
    "deberta-v3": Architecture(_deberta_tokenizer, _deberta, transformers.DebertaV2ForMaskedLM, _deberta_file),
    "t5-v1.1": Architecture(_t5_tokenizer, _t5, transformers.T5ForConditionalGeneration, _t5_file, generates=True),
    "gpt2": Architecture(_gpt2_tokenizer, _gpt2, transformers.GPT2LMHeadModel, _gpt2_file, generates=True),
}
