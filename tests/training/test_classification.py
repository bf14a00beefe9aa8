"""Fine-tuning: it learns, it repeats itself, it writes whole folders, it refuses what cannot work."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from merganser.errors import CheckpointError, DataError, FileError, UserError
from merganser.tasks import Rows
from merganser.tasks.classification import TextClassification
from merganser.training import TrainingSettings, prepare_base
from merganser.training import train as train_task
from merganser.training.outputs import MARK
from merganser.training.settings import make_settings

GOOD, BAD, PLAIN = (["good", "fine", "great"], ["bad", "poor", "awful"], ["the", "a", "film", "was", "it", "very"])
NAMES = ["negative", "positive"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT without a head, and a tokenizer of the toy words."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLAIN]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def toy(count: int, seed: int) -> tuple[list[str], list[int]]:
    """Texts of plain words with one word that decides the label."""
    chosen = random.Random(seed)
    labels = [chosen.randrange(2) for _ in range(count)]
    texts = []
    for label in labels:
        words = [*chosen.choices(PLAIN, k=chosen.randint(2, 8)), chosen.choice([BAD, GOOD][label])]
        chosen.shuffle(words)
        texts.append(" ".join(words))
    return texts, labels


def accuracy(folder: Path, texts: list[str], labels: list[int]) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        predicted = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(-1)
    return float((predicted == torch.tensor(labels)).float().mean())


def train(base: Path | str, output: Path, *, texts: int = 256, labels: list[str] = NAMES, **options: Any) -> Path:
    """Train on the toy texts; options of the settings and of the function together."""
    settings = {"epochs": 6, "learning_rate": 1e-2, "batch_size": 32, "warmup": 0.06, "batching": "by-length"}
    settings.update({name: options.pop(name) for name in list(options) if name in TrainingSettings.model_fields})
    rows = tuple({"text": text, "label": NAMES[label]} for text, label in zip(*toy(texts, seed=1), strict=True))
    return train_task(
        base,
        TextClassification(),
        Rows("toy", rows, tuple(("toy", number) for number in range(1, len(rows) + 1)), by_line=False),
        labels=labels,
        output=output,
        settings=make_settings(**settings),
        **options,
    ).path


def test_learns_a_separable_set_and_saves_a_plain_folder(base: Path, tmp_path: Path, capfd) -> None:
    steps: list[tuple[int, int]] = []
    folder = train(base, tmp_path / "out", on_step=lambda done, total: steps.append((done, total)))
    assert accuracy(folder, *toy(200, seed=2)) > 0.95
    assert accuracy(folder, *toy(200, seed=2)) > accuracy(
        prepare_base(base, label_names=NAMES, output=tmp_path / "b"), *toy(200, seed=2)
    )
    assert steps == [(step, 48) for step in range(1, 49)]
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"} and config["label2id"]["positive"] == 1
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", MARK, "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    assert capfd.readouterr().out == ""  # standard output is for data


def test_same_seed_same_weights_other_seed_others(base: Path, tmp_path: Path) -> None:
    first, again, other = (
        load_file(train(base, tmp_path / name, seed=seed, epochs=0.5) / "model.safetensors")
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_specialists_of_a_prepared_base_start_from_its_head(base: Path, tmp_path: Path) -> None:
    start = prepare_base(base, label_names=NAMES, output=tmp_path / "base", seed=7)
    expected = load_file(start / "model.safetensors")
    for seed in (1, 2):  # a learning rate of almost nothing leaves the start visible
        tuned = load_file(
            train(start, tmp_path / f"tuned{seed}", seed=seed, epochs=0.2, learning_rate=1e-12) / "model.safetensors"
        )
        assert tuned.keys() == expected.keys()
        torch.testing.assert_close(tuned["classifier.weight"], expected["classifier.weight"], rtol=0, atol=1e-9)
    other = load_file(prepare_base(base, label_names=NAMES, output=tmp_path / "other", seed=8) / "model.safetensors")
    assert not torch.equal(other["classifier.weight"], expected["classifier.weight"])
    assert (start / "tokenizer.json").read_bytes() == (tmp_path / "tuned1" / "tokenizer.json").read_bytes()


def test_a_head_of_other_labels_is_replaced(base: Path, tmp_path: Path) -> None:
    start = prepare_base(base, label_names=NAMES, output=tmp_path / "two")
    three = prepare_base(start, label_names=["a", "b", "c"], output=tmp_path / "three")
    assert load_file(three / "model.safetensors")["classifier.weight"].shape == (3, 16)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"texts": 0}, DataError, "no rows"),
        ({"labels": ["one", "one"]}, DataError, "distinct"),
        ({"learning_rate": 0.0}, UserError, "learning_rate"),
        ({"epochs": 0}, UserError, "epochs"),
        ({"base": "no-such-folder"}, CheckpointError, "no-such-folder"),
    ],
)
def test_refusals_name_the_mistake_and_write_nothing(
    base: Path, tmp_path: Path, change: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        train(**{"base": base, **change}, output=tmp_path / "deep" / "out")
    if "labels" in change:
        with pytest.raises(error, match=words):
            prepare_base(base, label_names=change["labels"], output=tmp_path / "deep" / "out")
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "deep"])


def test_an_existing_output_is_kept_unless_it_may_be_replaced(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    for overwrite, words in ((False, "exists"), (True, "no training")):
        with pytest.raises(FileError, match=words):
            train(base, tmp_path / "out", epochs=0.2, overwrite=overwrite)
        assert (tmp_path / "out" / "config.json").read_text() == "{}"
    for seed in (1, 2):
        train(base, tmp_path / "new", epochs=0.2, seed=seed, overwrite=True)
    (tmp_path / "new" / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"no part of the training as it was written: config.json"):
        train(base, tmp_path / "new", epochs=0.2, overwrite=True)


def test_an_error_in_the_middle_leaves_nothing(base: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, tmp_path / "out", on_step=stop)
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_an_error_not_a_folder(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="diverged"):
        train(base, tmp_path / "out", learning_rate=1e30)
    assert list(tmp_path.iterdir()) == []
