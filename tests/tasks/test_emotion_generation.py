"""Emotions as yes and no: which rows there are, what the models are shown, what is learned, and the scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn import metrics as sklearn_metrics

from merganser.errors import CheckpointError, DataError, UserError
from merganser.statistics import Statistics
from merganser.tasks import multi_label
from merganser.tasks.base import Task
from merganser.tasks.batches import IGNORED
from merganser.tasks.collect import collect
from merganser.tasks.columns import Columns
from merganser.tasks.data import Rows
from merganser.tasks.emotion import LABELS, Emotion, read_records
from merganser.tasks.emotion_generation import (
    SENTINEL,
    EmotionGPT2,
    EmotionT5,
    YesNo,
    YesNoContinuation,
    f1_by_label,
)
from merganser.tasks.labels import LabelSpace
from merganser.tasks.predict import predict

Save = Callable[..., Path]
NONE = LabelSpace(())
TEXTS = ["the movie was good", "bad food !", "I liked it very much . it was not bad", "no"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def corpus(root: Path, set_name: str = "made", count: int = 400) -> Path:
    """``joy`` holds for a quarter of the records, ``fear`` for 4 %, ``love`` for none, ``guilt`` for all of half."""
    for split in ("train", "dev", "test"):
        records = [
            {
                "text": f"text {n}",
                "emotions": {
                    "joy": int(n % 4 == 0),
                    "fear": int(n % 25 == 0),
                    "love": 0,
                    "guilt": 1 if n % 2 else None,
                },
            }
            for n in range(count)
        ]
        write(root / set_name / f"{split}.jsonl", records)
    return root


def asked(rows: Rows) -> set[tuple[str, str, str]]:
    return {(row["text"], row["label"], row["target"]) for row in rows}


def questions(*pairs: tuple[str, str, str]) -> Rows:
    rows = tuple({"text": text, "label": label, "target": target} for text, label, target in pairs)
    return Rows("made", rows, tuple(("made.jsonl", n) for n in range(1, len(rows) + 1)))


def encoded(task: Task, rows: Rows, tokenizer: Any, max_length: int = 128, **more: Any) -> Any:
    return task.encode(rows, tokenizer, {}, task.columns(rows, Columns()), max_length, **more)


EXAMPLES = questions(
    (TEXTS[0], "joy", "yes"), (TEXTS[1], "anger", "no"), (TEXTS[2], "joy", "no"), (TEXTS[3], "fear", "yes")
)


# --- which rows there are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [EmotionT5, EmotionGPT2])
def test_a_row_for_each_record_and_annotated_label(suite: Any, tmp_path: Path) -> None:
    corpora = suite(corpus(tmp_path, count=4))
    assert corpora.sets() == ("made",) and corpora.labels("made") == () and corpora.votes("made") is None
    assert corpora.metric("made") == "macro_f1"
    rows = corpora.read("made", "dev")
    assert rows.source == "made[dev]" and len(rows) == 4 * 3 + 2
    assert rows[0] == {"text": "text 0", "label": "joy", "target": "yes"}
    assert [row["label"] for row in rows.rows[3:7]] == ["joy", "fear", "love", "guilt"]
    assert rows[3] == {"text": "text 1", "label": "joy", "target": "no"}
    assert rows.where(3) == f"{tmp_path / 'made' / 'dev.jsonl'}:2"


@pytest.mark.parametrize(("negatives", "power"), [("sqrt", 0.5), ("linear", 1.0)])
def test_negatives_of_train_are_kept_at_the_promised_rate(
    tmp_path: Path, negatives: str, power: float
) -> None:
    count = 4000
    rows = EmotionT5(corpus(tmp_path, count=count), negatives=negatives).read("made", "train")
    found = Counter((row["label"], row["target"]) for row in rows)
    for label, rate in (("joy", 1 / 4), ("fear", 1 / 25)):
        assert found[label, "yes"] == count * rate  # no positive is lost
        chance, trials = rate**power, count * (1 - rate)
        deviation = math.sqrt(trials * chance * (1 - chance))
        assert abs(found[label, "no"] - trials * chance) < 4 * deviation
    assert found["love", "no"] == 0  # nothing to weigh them against
    assert found["guilt", "yes"] == count / 2  # annotated in every other record, where it holds
    everything = EmotionT5(tmp_path, negatives="all").read("made", "train")
    assert len(everything) == 3 * count + count / 2 and asked(rows) < asked(everything)


def test_the_rate_is_that_of_the_annotated_records(tmp_path: Path) -> None:
    records = [{"text": str(n), "emotions": {"joy": 1 if n % 2 else None}} for n in range(200)]
    path = write(tmp_path / "a" / "train.jsonl", [*records, {"text": "x", "emotions": {"joy": 0}}])
    suite = EmotionT5(tmp_path)
    assert suite.chances(read_records(path)) == {"joy": pytest.approx(math.sqrt(100 / 101))}


def test_the_choice_depends_on_seed_set_label_and_record_only(tmp_path: Path) -> None:
    corpus(tmp_path)
    corpus(tmp_path, "other")
    first = EmotionT5(tmp_path).read("made", "train")
    assert first == EmotionT5(tmp_path).read("made", "train")
    assert first.rows == EmotionGPT2(tmp_path).read("made", "train").rows
    assert asked(first) != asked(EmotionT5(tmp_path, seed=2).read("made", "train"))
    assert asked(first) != asked(EmotionT5(tmp_path).read("other", "train"))  # the same records, another name
    # a label less, and none of the others changes
    path = tmp_path / "made" / "train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        del record["emotions"]["joy"]
        record["emotions"] = dict(reversed(record["emotions"].items()))  # whatever the order
    write(path, records)
    without = EmotionT5(tmp_path).read("made", "train")
    assert asked(without) == {row for row in asked(first) if row[1] != "joy"}


def test_dev_test_and_all_keep_every_negative(tmp_path: Path) -> None:
    suite = EmotionT5(corpus(tmp_path))
    whole = 3 * 400 + 200
    assert len(suite.read("made", "train")) < whole
    assert len(suite.read("made", "dev")) == len(suite.read("made", "test")) == whole
    assert len(suite.read("made", "all")) == 3 * whole  # a test set, its train split included


def test_options_and_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keeping negatives by 'root' is unknown"):
        EmotionT5(tmp_path, negatives="root")
    with pytest.raises(DataError, match="there is no data set 'made' of the suite emotion-gpt2"):
        EmotionGPT2(tmp_path).read("made", "train")
    write(tmp_path / "a" / "train.jsonl", [{"text": "a", "emotions": {"joy": 0}}])
    write(tmp_path / "a" / "dev.jsonl", [{"text": "a", "emotions": {"joy": None}}])
    write(tmp_path / "a" / "test.jsonl", [{"text": "a", "emotions": {"joi": 1}}])
    with pytest.raises(DataError, match="no label holds for any record"):
        EmotionT5(tmp_path).read("a", "train")
    with pytest.raises(DataError, match="no record has an annotated label"):
        EmotionT5(tmp_path).read("a", "dev")
    with pytest.raises(DataError, match=r"a/test\.jsonl:1: unknown emotion 'joi'"):
        EmotionT5(tmp_path).read("a", "test")


def test_the_real_corpora(resources: Path) -> None:
    root = resources / "emotion_splits"
    multi, single = Emotion(root).read("ssec", "dev"), EmotionT5(root).read("ssec", "dev")
    marks = [mark for row in multi for mark in row["labels"].values() if mark is not None]
    assert len(single) == len(marks) and sum(row["target"] == "yes" for row in single) == sum(marks)
    train = EmotionT5(root).read("isear", "train")
    holds = [mark for row in Emotion(root).read("isear", "train") for mark in row["labels"].values()]
    assert sum(row["target"] == "yes" for row in train) == holds.count(1)
    assert sum(row["target"] == "no" for row in train) == pytest.approx(
        sum(math.sqrt(1 / 7) for mark in holds if mark == 0), rel=0.05
    )  # each of seven emotions in a seventh of the records


# --- references and scores --------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [YesNo(), YesNoContinuation()])
def test_references_are_checked(task: Task) -> None:
    columns = task.columns(EXAMPLES, Columns())
    assert task.references(EXAMPLES, columns, NONE) == [("joy", 1), ("anger", 0), ("joy", 0), ("fear", 1)]
    for row, says in ((("a", "joi", "yes"), "unknown label 'joi'"), (("a", "joy", "yep"), "neither yes nor")):
        with pytest.raises(DataError, match=says) as caught:
            task.references(questions(("a", "joy", "no"), row), columns, NONE)
        assert caught.value.where == "made.jsonl:2"
    assert not task.fits({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"})
    assert not task.fits({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})


def test_macro_f1_is_that_of_scikit_learn_and_of_the_classifier() -> None:
    generator, task = np.random.default_rng(2), YesNo()
    for _ in range(20):
        true = generator.integers(0, 2, (30, 16)).astype(np.float64)
        true[generator.random((30, 16)) < 0.4] = np.nan
        true[:, generator.random(16) < 0.4] = np.nan
        predicted = generator.integers(0, 2, (30, 16)) * (generator.random(16) < 0.8)
        cells = list(zip(*np.nonzero(np.isfinite(true)), strict=True))
        if not cells:
            continue
        references = [(LABELS[label], int(true[row, label])) for row, label in cells]
        texts = [("no", "yes")[predicted[row, label]] for row, label in cells]
        judged = task.judge(texts, references, NONE)
        assert judged.shape == (len(cells), 3)
        scores = task.score(judged)
        by_label = {
            LABELS[label]: sklearn_metrics.f1_score(
                [t for name, t in references if name == LABELS[label]],
                [x == "yes" for (name, _), x in zip(references, texts, strict=True) if name == LABELS[label]],
                zero_division=0,
            )
            for label in sorted({label for _, label in cells})
        }
        assert task.by_label(texts, references, NONE) == f1_by_label(judged)
        assert f1_by_label(judged) == pytest.approx(by_label) and list(f1_by_label(judged)) == list(by_label)
        assert scores["macro_f1"] == pytest.approx(np.mean(list(by_label.values())))
        marks = np.stack([predicted, np.where(np.isnan(true), -1, true).astype(int)], axis=1)
        assert scores["macro_f1"] == pytest.approx(multi_label.macro_f1(marks))
        assert scores["accuracy"] == pytest.approx(multi_label.accuracy(marks))
        assert scores["answered"] == 1


def test_neither_yes_nor_no_counts_as_no() -> None:
    task = YesNo()
    generated = [f"{SENTINEL} yes", f" {SENTINEL}  no ", "maybe", "", "Yes <extra_id_1>", "yes no"]
    aligned = task.align(generated, NONE, NONE)
    assert aligned == ["yes", "no", "maybe", "", "yes", "yes no"]
    truth = [("joy", 1), ("joy", 0), ("joy", 0), ("fear", 1), ("fear", 1), ("fear", 0)]
    judged = task.judge(aligned, truth, NONE)
    joy, fear = LABELS.index("joy"), LABELS.index("fear")
    expected = [[joy, 1, 1], [joy, 0, 0], [joy, -1, 0], [fear, -1, 1], [fear, 1, 1], [fear, -1, 0]]
    assert judged.tolist() == expected
    scores = task.score(judged)
    assert scores == pytest.approx({"macro_f1": (1 + 2 / 3) / 2, "accuracy": 5 / 6, "answered": 0.5})
    assert task.key_metric == YesNoContinuation().key_metric == "macro_f1"
    assert not YesNoContinuation().lower_is_better


def test_ensembles_vote_or_average() -> None:
    votes = YesNo().combine([["yes", "no"], ["no", "no"], ["yes", "maybe"]])
    assert votes == ["yes", "no"]
    task = YesNoContinuation()
    first, second = np.array([[-1.0, -2.0], [-3.0, -1.0]]), np.array([[-5.0, -1.0], [-1.0, -2.0]])
    joint = task.combine([first, second])
    np.testing.assert_allclose(joint, [[-3, -1.5], [-2, -1.5]])
    assert task.judge(joint, [("joy", 1), ("joy", 0)], NONE)[:, 1].tolist() == [1, 1]
    assert task.ensembles


# --- T5 ---------------------------------------------------------------------------------------------------


def ready(save_ready: Save, architecture: str, seed: int = 0) -> tuple[Path, Any, Any]:
    folder = save_ready(f"m{seed}", architecture, seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if architecture == "t5":
        tokenizer.add_tokens([SENTINEL], special_tokens=True)
        tokenizer.save_pretrained(folder)
        model: Any = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    else:
        model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    return folder, model.eval(), tokenizer


def test_t5_is_asked_and_taught_the_papers_texts(save_ready: Save) -> None:
    _, _, tokenizer = ready(save_ready, "t5")
    features = encoded(YesNo(), EXAMPLES, tokenizer).features
    whole = tokenizer(f"does the sentence express joy? {SENTINEL} the movie was good")["input_ids"]
    assert features[0].input_ids == whole and tokenizer.convert_tokens_to_ids(SENTINEL) in whole
    assert features[0].labels == tokenizer(f"{SENTINEL} yes")["input_ids"]
    assert features[1].labels == tokenizer(f"{SENTINEL} no")["input_ids"]
    assert len(features[1].labels) == 3 and YesNo().max_new_tokens == 4
    given = encoded(YesNo(), EXAMPLES, tokenizer, references=[("joy", 0)] * 4).features
    assert given[0].labels == features[1].labels
    batch = YesNo().collation(tokenizer, {"is_encoder_decoder": True})(features)
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1]] * 4


def test_t5_end_to_end(save_ready: Save) -> None:
    _, model, tokenizer = ready(save_ready, "t5")
    task = YesNo()
    columns = task.columns(EXAMPLES, Columns())
    config = model.config.to_dict()
    found = predict(model, tokenizer, config, task, EXAMPLES, columns, batch_size=3, max_length=64)
    for row, text in zip(EXAMPLES, found.aligned, strict=True):
        prompt = f"does the sentence express {row['label']}? {SENTINEL} {row['text']}"
        with torch.inference_mode():
            ids = model.generate(
                **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False),
                max_new_tokens=4,
                do_sample=False,
            )
        assert " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).lower().split()) == text
        assert ids.shape[1] <= 5  # the start token, and four
    other = questions(*((row["text"], row["label"], "no") for row in EXAMPLES))
    again = predict(model, tokenizer, config, task, other, columns, batch_size=1, max_length=64)
    assert again.aligned == found.aligned  # truths are not seen
    scores = task.score(task.judge(found.aligned, task.references(EXAMPLES, columns, NONE), NONE))
    assert set(scores) == {"macro_f1", "accuracy", "answered"} and all(0 <= v <= 1 for v in scores.values())


def test_t5_statistics_are_of_teacher_forcing(save_ready: Save, tmp_path: Path) -> None:
    folder, model, tokenizer = ready(save_ready, "t5")
    data = write(tmp_path / "rows.jsonl", [dict(row) for row in EXAMPLES])
    statistics = Statistics.open(collect(folder, data, task=YesNo(), fisher="empirical", batch_size=3))
    sources = [f.input_ids for f in encoded(YesNo(), EXAMPLES, tokenizer).features]
    assert statistics.header.tokens == sum(map(len, sources)) + 3 * len(EXAMPLES)
    name = "decoder.block.1.layer.0.SelfAttention.q"
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _, x, __: seen.append(x[0].detach().double()[0]))
    with torch.no_grad():
        for feature in encoded(YesNo(), EXAMPLES, tokenizer).features:
            model(input_ids=torch.tensor([feature.input_ids]), labels=torch.tensor([feature.labels]))
    x = torch.cat(seen)
    entry = statistics.layer(f"{name}.weight")
    assert entry is not None and entry.input is not None and entry.rows == len(x) == 12
    torch.testing.assert_close(statistics.gram(entry.input).double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


# --- GPT-2 ------------------------------------------------------------------------------------------------


def test_gpt2_learns_the_answer_only(save_ready: Save) -> None:
    _, model, tokenizer = ready(save_ready, "gpt2")
    task = YesNoContinuation()
    features = encoded(task, EXAMPLES, tokenizer, references=[("joy", 1), ("joy", 0), ("joy", 0), ("joy", 1)])
    assert tokenizer.convert_ids_to_tokens(features.features[0].input_ids)[-2:] == [".", "yes"]
    for feature, row in zip(features.features, EXAMPLES, strict=True):
        text = f"{row['text']} The sentence expresses {row['label']}. {row['target']}"
        assert feature.input_ids == tokenizer(text)["input_ids"]
        assert feature.labels == [IGNORED] * (len(feature.input_ids) - 1) + feature.input_ids[-1:]
    batch = task.collation(tokenizer, {})(features.features)
    assert ((batch["labels"] != IGNORED).sum(1) == 1).all() and "decoder_attention_mask" not in batch
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = model(**batch).loss
    ends = batch["attention_mask"].sum(1) - 1
    by_hand = -torch.log_softmax(logits, -1)[range(4), ends - 1, batch["input_ids"][range(4), ends]].mean()
    torch.testing.assert_close(loss, by_hand)


def test_gpt2_end_to_end(save_ready: Save) -> None:
    _, model, tokenizer = ready(save_ready, "gpt2")
    task = YesNoContinuation()
    columns = task.columns(EXAMPLES, Columns())
    config = model.config.to_dict()
    found = predict(model, tokenizer, config, task, EXAMPLES, columns, batch_size=3)
    assert found.truncated == 0 and found.max_length == 32
    words = tokenizer.convert_tokens_to_ids(["no", "yes"])
    for row, scores in zip(EXAMPLES, found.aligned, strict=True):
        prompt = tokenizer(f"{row['text']} The sentence expresses {row['label']}.", return_tensors="pt")
        with torch.inference_mode():
            logits = model(input_ids=prompt["input_ids"]).logits[0, -1]
        np.testing.assert_allclose(scores, torch.log_softmax(logits.double(), -1)[words], rtol=1e-4)
    other = questions(*((row["text"], row["label"], "no") for row in EXAMPLES))
    again = predict(model, tokenizer, config, task, other, columns, batch_size=1)
    np.testing.assert_allclose(again.aligned, found.aligned, rtol=1e-4)  # neither truths nor padding are seen
    truth = task.references(EXAMPLES, columns, NONE)
    assert list(task.by_label(found.aligned, truth, NONE)) == ["joy", "anger", "fear"]
    judged = task.judge(found.aligned, truth, NONE)
    assert judged[:, 1].tolist() == (found.aligned[:, 1] > found.aligned[:, 0]).astype(int).tolist()


def byte_tokenizer() -> Any:
    """A byte-level tokenizer without merges, as GPT-2's: every answer has several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<|endoftext|>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


@pytest.mark.parametrize("keep", [True, False])
def test_answers_of_several_tokens(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, task = byte_tokenizer(), YesNoContinuation()
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=128, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    if not keep:  # an architecture that always gives all logits
        whole = model.forward

        def forward(input_ids: Any, attention_mask: Any) -> Any:
            return whole(input_ids=input_ids, attention_mask=attention_mask)

        monkeypatch.setattr(model, "forward", forward)
    features = encoded(task, EXAMPLES, tokenizer).features
    columns = task.columns(EXAMPLES, Columns())
    found = predict(model, tokenizer, config.to_dict(), task, EXAMPLES, columns, batch_size=3)
    for row, feature, scores in zip(EXAMPLES, features, found.aligned, strict=True):
        prompt = f"{row['text']} The sentence expresses {row['label']}."
        start = len(tokenizer(prompt)["input_ids"])
        assert feature.labels[:start] == [IGNORED] * start and IGNORED not in feature.labels[start:]
        for answer, score in zip(("no", "yes"), scores, strict=True):
            ids = torch.tensor([tokenizer(f"{prompt} {answer}")["input_ids"]])
            with torch.inference_mode():
                steps = torch.log_softmax(
                    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double(), -1
                )
            places = range(start, ids.shape[1])
            assert score == pytest.approx(sum(steps[p - 1, ids[0, p]].item() for p in places), rel=1e-4)


def test_gpt2_statistics_count_each_text_once(save_ready: Save, tmp_path: Path) -> None:
    folder, _, tokenizer = ready(save_ready, "gpt2")
    data = write(tmp_path / "rows.jsonl", [dict(row) for row in EXAMPLES])
    path = collect(folder, data, task=YesNoContinuation(), fisher="empirical", batch_size=3)
    statistics = Statistics.open(path)
    sizes = [len(feature.input_ids) for feature in encoded(YesNoContinuation(), EXAMPLES, tokenizer).features]
    assert statistics.header.tokens == sum(sizes)  # sentence, question and answer; no padding, no second pass
    alone = collect(
        folder,
        data,
        task=YesNoContinuation(),
        fisher="empirical",
        batch_size=1,
        output=tmp_path / "a.safetensors",
    )
    name = "transformer.h.1.mlp.c_fc.weight"
    torch.testing.assert_close(
        statistics.fisher(name), Statistics.open(alone).fisher(name), rtol=1e-3, atol=1e-7
    )


# --- truncation -------------------------------------------------------------------------------------------


def test_t5_cuts_the_sentence_and_counts_it(save_ready: Save) -> None:
    _, _, tokenizer = ready(save_ready, "t5")
    rows = questions(("good bad " * 30, "joy", "yes"), ("good", "joy", "no"), ("movie " * 9, "guilt", "no"))
    found = encoded(YesNo(), rows, tokenizer, 15)
    assert found.truncated == 2 and found.cut == {0, 2}
    question = tokenizer(f"does the sentence express joy? {SENTINEL}", add_special_tokens=False)["input_ids"]
    sentence = tokenizer("good bad " * 4, add_special_tokens=False)["input_ids"]
    assert len(question) == 7
    assert found.features[0].input_ids == [*question, *sentence[:7], tokenizer.eos_token_id]  # not one wasted
    assert (
        found.features[1].input_ids == tokenizer(f"does the sentence express joy? {SENTINEL} good").input_ids
    )
    assert [len(f.labels) for f in found.features] == [3, 3, 3]
    with pytest.raises(UserError, match=r"the question alone has 8 tokens, but only 7 fit \(made.jsonl:1\)"):
        encoded(YesNo(), rows, tokenizer, 7)


@pytest.mark.parametrize("words", [True, False])
def test_gpt2_cuts_the_sentence_and_counts_it(words: bool, save_ready: Save) -> None:
    tokenizer = ready(save_ready, "gpt2")[2] if words else byte_tokenizer()
    task, limit = YesNoContinuation(), 12 if words else 60
    rows = questions(("good bad " * 30, "joy", "yes"), ("good", "joy", "no"), ("movie é " * 30, "love", "no"))
    found = encoded(task, rows, tokenizer, limit)
    assert found.cut == {0, 2} and found.max_length == limit
    for row, feature in zip(rows, found.features, strict=True):
        tail = f" The sentence expresses {row['label']}."
        end = tokenizer(f"{tail} {row['target']}")["input_ids"]
        assert feature.input_ids[-len(end) :] == end  # question and answer are whole
        kept = feature.input_ids[: -len(end)]
        assert kept and kept == tokenizer(row["text"])["input_ids"][: len(kept)]
        assert len(feature.input_ids) <= limit
        learned = len(end) - len(tokenizer(tail)["input_ids"])
        assert feature.labels == [IGNORED] * (len(feature.input_ids) - learned) + end[-learned:]
    if words:
        assert [len(feature.input_ids) for feature in found.features] == [12, 7, 12]
        prediction = predict(
            ready(save_ready, "gpt2", 1)[1], tokenizer, {}, task, rows,
            task.columns(rows, Columns()), max_length=12,
        )  # fmt: skip
        assert prediction.truncated == 2


def test_answers_that_the_tokenizer_confuses_are_refused(save_ready: Save) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"<unk>": 0, ".": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    for task in (YesNo(), YesNoContinuation()):
        with pytest.raises(CheckpointError, match="the same tokens of yes and no"):
            encoded(task, EXAMPLES, tokenizer)
