"""Tokens, cutting, token types; opening models and what their configurations say of the task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from merganser.errors import CheckpointError, DataError, UserError
from merganser.tasks import TASKS, task_for
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace
from merganser.tasks.models import choose_length, length_limit, load_model, load_tokenizer, open_model
from merganser.tasks.tokens import encode_texts, encode_words

Save = Callable[..., Path]


def rows_of(*rows: dict[str, Any]) -> Rows:
    return Rows("d.jsonl", rows, tuple(("d.jsonl", n) for n in range(1, len(rows) + 1)))


def test_cutting_keeps_special_tokens_and_is_counted(save_ready: Save) -> None:
    opened = open_model(save_ready("m"))
    tokenizer = load_tokenizer(opened)
    texts = ["the movie was good", "bad", "I liked it very much !"]
    rows = rows_of(*({"text": text} for text in texts))
    encoded = encode_texts(rows, texts, None, tokenizer, opened.config, 5)
    assert [len(feature.input_ids) for feature in encoded.features] == [5, 3, 5]
    assert encoded.truncated == 2 and encoded.cut == {0, 2}
    for feature in encoded.features:
        assert feature.input_ids[0] == tokenizer.cls_token_id and feature.input_ids[-1] == tokenizer.sep_token_id
    whole = encode_texts(rows, texts, None, tokenizer, opened.config, 30)
    assert whole.truncated == 0
    assert [feature.input_ids for feature in whole.features] == [tokenizer(text)["input_ids"] for text in texts]


def test_pairs_keep_their_token_types_where_the_model_has_them(save_ready: Save) -> None:
    rows = rows_of({"sentence1": "good movie", "sentence2": "bad food"})
    for architecture, kept in (("bert", True), ("roberta", False), ("distilbert", False), ("mpnet", False)):
        options = {"type_vocab_size": 1} if architecture == "roberta" else {}  # as published
        opened = open_model(save_ready(architecture, architecture, **options))
        tokenizer = load_tokenizer(opened)
        task = task_for("auto", opened.config)
        columns = task.columns(rows, Columns(), labelled=False)
        (feature,) = task.encode(rows, tokenizer, opened.config, columns, 20).features
        assert feature.input_ids == tokenizer("good movie", "bad food")["input_ids"]
        assert feature.token_type_ids == ([0, 0, 0, 0, 1, 1, 1] if kept else None), architecture


def test_the_first_sub_word_carries_the_label(save_ready: Save) -> None:
    model_class = transformers.BertForTokenClassification
    folder = save_ready("m", "bert", 0, model_class, id2label={0: "O", 1: "B-LOC", 2: "I-LOC"})
    opened = open_model(folder)
    tokenizer = load_tokenizer(opened)
    task = task_for("auto", opened.config)
    assert task.name == "token-classification"
    rows = rows_of(
        {"tokens": ["in", "Paris-Acme", "\u200b", "!"], "ner_tags": ["O", "B-LOC", "O", "O"]},
        {"tokens": ["the", "food", "was", "good"], "ner_tags": [0, 0, 0, 2]},
    )
    columns = task.columns(rows, Columns())
    truth = task.references(rows, columns, task.space(opened.config))
    assert truth[1] == ["O", "O", "O", "I-LOC"]
    encoded = task.encode(rows, tokenizer, opened.config, columns, 5, truth)
    first, second = encoded.features
    assert first.words == [1, 2, -1, -1] and encoded.cut == {0, 1}  # [CLS] in Paris - [SEP]
    assert first.labels == [-100, 0, 1, -100, -100]
    assert second.words == [1, 2, 3, -1] and second.labels == [-100, 0, 0, 0, -100]
    whole = task.encode(rows, tokenizer, opened.config, columns, 30, truth).features[0]
    assert whole.labels[:4] == [-100, 0, 1, -100] and whole.words[:2] == [1, 2]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "d.jsonl:1: 2 words but 1 tags"),
        ({"tokens": ["a"], "ner_tags": ["B-ORG"]}, "d.jsonl:1: label 'B-ORG' is outside"),
        ({"tokens": "a", "ner_tags": ["O"]}, "d.jsonl:1: 'tokens' and 'ner_tags' must both be lists"),
    ],
)
def test_tags_that_do_not_fit(row: dict[str, Any], says: str) -> None:
    task, rows = TASKS["token-classification"], rows_of(row)
    with pytest.raises(DataError) as caught:
        task.references(rows, task.columns(rows, Columns()), LabelSpace(("O", "B-LOC", "I-LOC")))
    assert str(caught.value).startswith(says)


def test_byte_level_tokenizers_get_the_space_before_words_back() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: n for n, token in enumerate(sorted(alphabet))}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    joined = tokenizer(" ab c")["input_ids"]
    encoded = encode_words(rows_of({}), [["ab", "c"]], tokenizer, {}, 10)
    assert encoded.features[0].input_ids == joined
    assert encoded.features[0].words == [0, 3]


def test_a_text_without_tokens_names_its_row(save_ready: Save) -> None:
    opened = open_model(save_ready("m", "gpt2"))
    with pytest.raises(DataError, match=r"^d\.jsonl:2: the text has no tokens"):
        encode_texts(rows_of({}, {}), ["a", "  "], None, load_tokenizer(opened), opened.config, 8)


def test_length_limits(save_ready: Save) -> None:
    limits = {}
    for architecture in ("bert", "roberta", "mpnet", "t5", "gpt2", "llama"):
        opened = open_model(save_ready(architecture, architecture))
        limits[architecture] = length_limit(opened.config, load_tokenizer(opened))
    assert limits == {"bert": 32, "roberta": 34, "mpnet": 34, "t5": None, "gpt2": 32, "llama": 32}
    tokenizer = load_tokenizer(open_model(save_ready("b")))
    assert choose_length(None, {}, tokenizer, pairs=False) == 128
    assert choose_length(None, {"max_position_embeddings": 32}, tokenizer, pairs=False) == 32
    assert choose_length(9, {"max_position_embeddings": 32}, tokenizer, pairs=False) == 9
    with pytest.raises(UserError, match="maximum length of 3 leaves no room beside 3 special tokens"):
        choose_length(3, {}, tokenizer, pairs=True)


def test_texts_at_the_limit_run(save_ready: Save) -> None:
    for architecture in ("bert", "roberta", "mpnet", "distilbert"):
        opened = open_model(save_ready(architecture, architecture))
        tokenizer = load_tokenizer(opened)
        length = length_limit(opened.config, tokenizer)
        assert length is not None
        text = "good " * 100
        feature = encode_texts(rows_of({}), [text], None, tokenizer, opened.config, length).features[0]
        model = load_model(opened, "AutoModelForSequenceClassification")
        assert len(feature.input_ids) == length
        assert model(input_ids=torch.tensor([feature.input_ids])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "text-classification"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}}, "regression"),
        (
            {"architectures": ["XForSequenceClassification"], "problem_type": "multi_label_classification"},
            "multi-label",
        ),
        ({"architectures": ["XForSequenceClassification"], "problem_type": "regression"}, "regression"),
        ({"architectures": ["BertForTokenClassification"]}, "token-classification"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "seq2seq"),
        ({"architectures": ["GPT2LMHeadModel"]}, "causal-lm"),
        ({"architectures": ["LlamaForCausalLM"]}, "causal-lm"),
        ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, "causal-lm"),
        ({"architectures": ["BertModel"]}, "feature-extraction"),
        ({"architectures": ["RobertaForMaskedLM"]}, "feature-extraction"),
    ],
)
def test_auto_goes_by_the_configuration(config: dict[str, Any], name: str) -> None:
    assert task_for("auto", config).name == name


def test_unknown_tasks_and_architectures() -> None:
    with pytest.raises(UserError) as caught:
        task_for("text-clasification", {})
    assert "unknown task 'text-clasification'" in str(caught.value)
    assert "did you mean 'text-classification'" in str(caught.value)
    with pytest.raises(UserError, match="no task is known for the architecture WhisperForAudioClassification"):
        task_for("auto", {"architectures": ["WhisperForAudioClassification"]})


def test_models_load_in_float32_and_eval_mode(save_ready: Save) -> None:
    folder = save_ready("m")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = load_model(open_model(folder), "AutoModelForSequenceClassification")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert not loaded.training


def test_a_missing_head_is_refused_not_made_up(save_ready: Save) -> None:
    base = open_model(save_ready("base", "bert", 0, transformers.BertModel))
    with pytest.raises(CheckpointError, match="a BertModel, which has no head for text-classification"):
        task_for("text-classification", base.config).check_head(base)
    with pytest.raises(CheckpointError, match=r"no weights for classifier\.bias, classifier\.weight"):
        load_model(base, "AutoModelForSequenceClassification")
    with pytest.raises(CheckpointError, match="regression needs a head with one output, this one has 2"):
        TASKS["regression"].check_head(open_model(save_ready("two")))


def test_a_missing_tokenizer_is_told(save_model: Save) -> None:
    folder = save_model("bare")  # transformers would make up a tokenizer without words, and not say so
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded: there is none") as caught:
        load_tokenizer(open_model(folder))
    assert "tokenizer.json" in str(caught.value)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded: it has no vocabulary"):
        load_tokenizer(open_model(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load_tokenizer(open_model(folder))


def test_subfolders(save_ready: Save) -> None:
    root, head = save_ready("m", seed=1), save_ready("other", seed=2)
    place = root / "heads" / "other"
    place.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (place / name).write_bytes((head / name).read_bytes())
    opened = open_model(f"{root}::heads/other")
    wanted = transformers.AutoModelForSequenceClassification.from_pretrained(head).state_dict()
    found = load_model(opened, "AutoModelForSequenceClassification").state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert load_tokenizer(opened)("good")["input_ids"] == load_tokenizer(open_model(place))("good")["input_ids"]
    with pytest.raises(CheckpointError, match="there is no 'heads/none'") as caught:
        open_model(f"{root}::heads/none")
    assert "heads/other" in str(caught.value)
    with pytest.raises(CheckpointError, match="leaves the model folder"):
        open_model(f"{root}::../other")
