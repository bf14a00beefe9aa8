"""Named entities: every layout, every malformed file with its line, and the real corpora."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import merganser
from merganser.errors import DataError
from merganser.lab.suites.ner import LABELS, NER
from merganser.tasks.conll import as_bio
from merganser.tasks.data import read_rows
from merganser.tasks.entities import spans
from merganser.tasks.token_classification import TokenClassification


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def tags(root: Path, text: str, **options: bool) -> list[list[str]]:
    write(root / "x" / "train.conll", text)
    return [row["tags"] for row in NER(root, **options).read("x", "train")]


def lines(found: list[str]) -> str:
    return "".join(f"w\t{tag}\n" for tag in found)


def message(root: Path, name: str, text: str) -> str:
    path = write(root / "x" / name, text)
    with pytest.raises(DataError) as caught:
        NER(root).read("x", name.split(".")[0])
    return str(caught.value).replace(str(path), "FILE")


def test_sentences_and_their_places(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x" / "train.conll",
        "-DOCSTART-\tO\tnews\n\nAnna\tB-PER\tnews\r\nin\tO\tnews\n\n \n\n"
        "-LRB-\tO\tnews\nNew York\tB-LOC\tnews\n"
        "-RRB-\tO\tnews\n-DOCSTART- -X- O O\nParis\tB-LOC\tnews",
    )
    rows = NER(tmp_path).read("x", "train")
    assert rows.source == "x[train]"
    assert list(rows) == [
        {"tokens": ["Anna", "in"], "tags": ["B-PER", "O"]},
        {"tokens": ["(", "New York", ")"], "tags": ["O", "B-LOC", "O"]},
        {"tokens": ["Paris"], "tags": ["B-LOC"]},
    ]
    assert [rows.where(i) for i in range(3)] == [f"{path}:3", f"{path}:8", f"{path}:12"]


def test_every_bracket_escape_and_nothing_else(tmp_path: Path) -> None:
    words = ["-LRB-", "-RRB-", "-LSB-", "-RSB-", "-LCB-", "-RCB-", "-lrb-", "x-LRB-"]
    write(tmp_path / "x" / "dev.conll", "".join(f"{word} O\n" for word in words))
    assert NER(tmp_path).read("x", "dev")[0]["tokens"] == [*"()[]{}", "-lrb-", "x-LRB-"]


def test_a_byte_order_mark_is_no_word(tmp_path: Path) -> None:
    write(tmp_path / "x" / "dev.conll", "\ufeffAnna\tB-PER\n")
    assert NER(tmp_path).read("x", "dev")[0]["tokens"] == ["Anna"]


def test_other_types_are_outside(tmp_path: Path) -> None:
    given = ["B-MISC", "I-MISC", "B-PERSON", "I-PERSON", "B-GPE", "I-GPE", "I-DATE", "B-ORG", "I-ORG", "O"]
    assert tags(tmp_path, lines(given)) == [["O", "O", "B-PER", "I-PER", "O", "O", "O", "B-ORG", "I-ORG", "O"]]
    assert tags(tmp_path, lines(["B-GPE", "I-GPE", "B-LOC"]), gpe_as_loc=True) == [["B-LOC", "I-LOC", "B-LOC"]]


def test_what_continues_another_type_is_outside(tmp_path: Path) -> None:
    assert tags(tmp_path, lines(["B-MISC", "I-PER", "I-PER", "B-PER", "I-PER"])) == [["O", "O", "O", "B-PER", "I-PER"]]
    # a sentence is not continued by the next one, and an I- after O is conlleval's beginning
    assert tags(tmp_path, lines(["O", "B-MISC"]) + "\n" + lines(["I-PER", "B-LOC"])) == [["O", "O"], ["I-PER", "B-LOC"]]


def test_iob1_becomes_bio(tmp_path: Path) -> None:
    given = ["I-PER", "I-PER", "B-PER", "I-LOC", "O", "I-MISC", "I-ORG", "I-ORG"]
    expected = ["B-PER", "I-PER", "B-PER", "B-LOC", "O", "O", "B-ORG", "I-ORG"]
    assert tags(tmp_path, lines(given)) == [expected]


TAG = st.sampled_from(["O", *(f"{place}-{kind}" for place in "BI" for kind in ("PER", "LOC", "MISC"))])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(TAG, max_size=8), max_size=4))
def test_turning_into_bio_moves_no_entity(sentences: list[list[str]]) -> None:
    found = as_bio(sentences)
    assert [spans(after) for after in found] == [spans(before) for before in sentences]
    assert as_bio(found) == found


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(TAG, max_size=8), max_size=4))
def test_iob1_of_any_entities_is_found_out(sentences: list[list[str]]) -> None:
    def encode(found: list[str], iob1: bool) -> list[str]:
        result, last = ["O"] * len(found), ("", 0, -2)
        for span in sorted(spans(found), key=lambda span: span[1]):
            kind, start, end = span
            result[start : end + 1] = [f"I-{kind}"] * (end + 1 - start)
            if not iob1 or (last[2] == start - 1 and last[0] == kind):
                result[start] = f"B-{kind}"
            last = span
        return result

    assert as_bio([encode(found, True) for found in sentences]) == [encode(found, False) for found in sentences]


def test_every_layout(tmp_path: Path) -> None:
    row = {"tokens": ["Anna", "left"], "labels": ["B-PER", "O"], "domain": "TWT"}
    write(tmp_path / "tweets" / "test.json", json.dumps(row) + "\n" + json.dumps(row) + "\n")
    write(tmp_path / "lines" / "dev.jsonl", json.dumps({"tokens": ["-LRB-"], "tags": ["O"]}))
    write(tmp_path / "plain" / "dev.conll", "Anna B-PER\n")
    write(tmp_path / "classic" / "eng.testa", "-DOCSTART- -X- O O\n\nAnna NNP I-NP I-PER\nleft VBD I-VP O\n")
    for split in ("train", "development", "test"):
        write(tmp_path / f"onto.{split}.bc.ner", f"{split}\tNN\t(TOP*\tB-PERSON\n")
    write(tmp_path / "ontonotes" / "onto.train.mz.ner", "Anna\tB-PERSON\n")
    write(tmp_path / "notes" / "readme.txt", "nothing here")
    suite = NER(tmp_path)
    assert suite.sets() == ("classic", "lines", "onto-bc", "onto-mz", "plain", "tweets")
    tweets = suite.read("tweets", "test")
    assert list(tweets) == [{"tokens": ["Anna", "left"], "tags": ["B-PER", "O"]}] * 2
    assert tweets.where(1) == f"{tmp_path / 'tweets' / 'test.json'}:2"
    assert suite.read("lines", "dev")[0] == {"tokens": ["("], "tags": ["O"]}
    assert suite.read("plain", "dev")[0] == {"tokens": ["Anna"], "tags": ["B-PER"]}
    assert list(suite.read("classic", "dev")) == [{"tokens": ["Anna", "left"], "tags": ["B-PER", "O"]}]
    assert [suite.read("onto-bc", split)[0]["tokens"] for split in ("train", "dev", "test")] == [
        ["train"],
        ["development"],
        ["test"],
    ]
    assert [row["tokens"] for row in suite.read("onto-bc", "all")] == [["train"], ["development"], ["test"]]
    assert suite.read("onto-bc", "all").source == "onto-bc[all]"
    assert suite.read("onto-mz", "train")[0]["tags"] == ["B-PER"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("train.conll", "Anna\tB-PER\nleft\n", "FILE:2: a word without a tag: 'left'"),
        ("train.conll", "Anna\tB-PER\n\nleft\tO\tnews\n", "FILE:3: 3 columns, but the lines before have 2"),
        ("train.conll", "Anna\tB-PER\n\tO\n", "FILE:2: a tag without a word"),
        ("train.conll", "Anna\t\n", "FILE:1: '' is a tag of no known scheme"),
        ("train.conll", "Anna\tB-PER\nleft\tS-LOC\n", "FILE:2: 'S-LOC' is a tag of another scheme"),
        ("train.conll", "a O\nb U-LOC\n", "FILE:2: 'U-LOC' is a tag of another scheme"),
        ("train.conll", "a O\nb E-LOC\n", "FILE:2: 'E-LOC' is a tag of another scheme"),
        ("train.conll", "a O\nb L-LOC\n", "FILE:2: 'L-LOC' is a tag of another scheme"),
        ("train.conll", "a O\nb PER\n", "FILE:2: 'PER' is a tag of no known scheme"),
        ("train.conll", "a O\nb B-\n", "FILE:2: 'B-' is a tag of no known scheme"),
        ("train.conll", "Anna NNP B-PER\n", "FILE:1: 'NNP' is a tag of no known scheme"),
        ("train.conll", "\n-DOCSTART- O\n", "FILE: no data: not a single sentence"),
        ("train.json", '{"tokens": ["a"], "labels": ["O"]}\n{"tokens": ["a"]}', "FILE:2: 'labels' is not a list"),
        ("train.json", '{"tokens": ["a", "b"], "labels": ["O"]}', "FILE:1: 2 tokens but 1 labels"),
        ("train.json", '{"tokens": "ab", "labels": ["O"]}', "FILE:1: 'tokens' is not a list of texts"),
        ("train.json", '{"tokens": ["a", ""], "labels": ["O", "O"]}', "FILE:1: 'tokens' is not a list of texts"),
        ("train.json", '{"tokens": [], "labels": []}', "FILE:1: 'tokens' is not a list of texts"),
        ("train.json", '{"tokens": ["a"], "labels": [3]}', "FILE:1: 'labels' is not a list of texts"),
        ("train.json", '\n{"tokens": ["a"], "labels": ["S-PER"]}', "FILE:2: 'S-PER' is a tag of another"),
        ("train.json", '{"tokens"', "FILE:1: unreadable JSON"),
    ],
)
def test_malformed(tmp_path: Path, name: str, text: str, says: str) -> None:
    found = message(tmp_path, name, text)
    assert found.startswith(says)
    assert "to mend" in found


def test_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "x" / "train.conll", "")
    path.write_bytes(b"a\tO\ncaf\xe9\tO\n")
    with pytest.raises(DataError, match=r"train\.conll:2: not UTF-8"):
        NER(tmp_path).read("x", "train")


def test_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "x" / "train.conll", "a\tO\n")
    suite = NER(tmp_path)
    with pytest.raises(
        DataError, match=r"no data set 'y' of the suite ner \(found: x\)(.|\n)*y/\{train,dev,test\}.conll"
    ):
        suite.read("y", "train")
    with pytest.raises(DataError, match="'x' has no file of the split 'dev'"):
        suite.read("x", "dev")
    with pytest.raises(DataError, match="'x' has no file of the split 'dev'"):
        suite.read("x", "all")
    with pytest.raises(DataError, match="there is no split 'validation'"):
        suite.read("x", "validation")
    for empty in (NER(), NER(tmp_path / "nowhere")):
        assert empty.sets() == ()
        with pytest.raises(DataError, match="no such folder"):
            empty.read("x", "train")


def test_task_labels_and_metric() -> None:
    suite = NER()
    assert suite.task("x") == TokenClassification()
    assert (suite.metric("x"), suite.labels("x"), suite.votes("x")) == ("f1", LABELS, None)


def test_conll_files_are_data_of_every_command(tmp_path: Path, save_ready: Callable[..., Path]) -> None:
    names = dict(enumerate([*LABELS, "B-MISC", "I-MISC"]))
    model = save_ready(
        "model", model_class=transformers.BertForTokenClassification, id2label=names, num_labels=len(names)
    )
    text = "Anna\tB-PER\nsaw\tO\nParis\tB-MISC\n\nAcme\tB-ORG\n"
    path = write(tmp_path / "data" / "test.conll", text)
    rows = read_rows(path)  # types stay as they are: the model's labels say which there are
    assert [row["tags"] for row in rows] == [["B-PER", "O", "B-MISC"], ["B-ORG"]]
    assert [rows.where(i) for i in range(2)] == [f"{path}:1", f"{path}:5"]
    assert list(read_rows(path.parent, split="test")) == list(rows)
    result = merganser.evaluate(model, path)
    assert result.rows[0].key_metric == "f1"
    bad = write(tmp_path / "bad.conll", "Anna\tB-PER\nsaw\n")
    with pytest.raises(DataError, match=r"bad\.conll:2: a word without a tag"):
        merganser.evaluate(model, bad)


def test_real_corpora(resources: Path) -> None:
    suite = NER(resources / "ner")
    assert {"twitter", "wnut17", "wikigold", "gum", "crossner-ai"} <= set(suite.sets())
    sentences = {"wnut17": (3394, 1009, 1287), "wikigold": (1187, 254, 255), "twitter": (6338, 1000, 2001)}
    for name, sizes in sentences.items():
        for split, size in zip(("train", "dev", "test"), sizes, strict=True):
            rows = suite.read(name, split)
            assert len(rows) == size
            assert {tag for row in rows for tag in row["tags"]} == set(LABELS)
            assert all(len(row["tokens"]) == len(row["tags"]) for row in rows)
            begun = sum(tag.startswith("B-") for row in rows for tag in row["tags"])
            assert sum(len(spans(row["tags"])) for row in rows) == begun > 0


@pytest.mark.parametrize("folder", ["twitter", "."])
def test_twitter_under_its_published_names(tmp_path: Path, folder: str) -> None:
    for split in ("train", "dev", "test"):
        line = json.dumps({"tokens": ["Anna", split], "labels": ["B-PER", "O"]})
        write(tmp_path / folder / f"annotated.twitter-ner-20-21-tweet-{split}-withcleaned.json", line + "\n")
    suite = NER(tmp_path)
    assert suite.sets() == ("twitter",)
    for split in ("train", "dev", "test"):
        assert list(suite.read("twitter", split)) == [{"tokens": ["Anna", split], "tags": ["B-PER", "O"]}]
    assert len(suite.read("twitter", "all")) == 3
    assert "annotated.twitter-ner-20-21-tweet-{train,dev,test}-withcleaned.json" in str(suite.missing("other"))
