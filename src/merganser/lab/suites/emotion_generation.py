"""Emotions as generation: one question a label, answered with yes or no by T5 (a text) or GPT-2 (a continuation).

    corpora = EmotionT5(Path("emotion_splits"))
    corpora.read("isear", "test")      # rows {"text": …, "label": "joy", "target": "no"}, one for each label
    corpora.task("isear")              # asks: does the sentence express joy? <extra_id_0> …

Only labels that a record annotates are asked for. Most answers are no, so that a train split keeps its negatives
at random only (``negatives``); dev and test, and ``all`` (a test set), keep every one.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from merganser.errors import CheckpointError, DataError, UserError, did_you_mean
from merganser.lab.suites.base import TRAIN
from merganser.lab.suites.emotion import LABELS, EmotionCorpora, Record, read_records
from merganser.tasks.base import Config, Metric, Task, Truths
from merganser.tasks.batches import IGNORED, Collation, Feature
from merganser.tasks.causal_lm import CausalLM
from merganser.tasks.columns import Columns, option, texts
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace
from merganser.tasks.models import padding_id
from merganser.tasks.seq2seq import Seq2Seq
from merganser.tasks.tokens import Encoded, encode_texts

NO, YES, NEITHER = 0, 1, -1
ANSWERS = ("no", "yes")  # by truth
NEGATIVES = ("sqrt", "linear", "all")
SENTINEL = "<extra_id_0>"  # T5's mark of what is to be filled in
_SENTINELS = re.compile(r"<extra_id_\d+>")

Reference = tuple[str, int]  # a label, and 1 where it holds


def macro_f1(judgements: np.ndarray) -> float:
    """The mean over the labels that were asked for of each label's F1 of yes.

    The definition of :func:`merganser.tasks.multi_label.macro_f1`, whose value is the same where each decision is
    a row. Judgements: int64 (examples, 3), see :meth:`Questions.judge`.
    """
    scores = f1_by_label(judgements)
    return float(np.mean(list(scores.values()))) if scores else 0.0


def f1_by_label(judgements: np.ndarray) -> dict[str, float]:
    """The F1 of yes of each label that was asked for, in the order of labels; 0 where there is no yes at all."""
    found = {}
    for place, label in enumerate(LABELS):
        predicted, true = judgements[judgements[:, 0] == place, 1:].T == YES
        if len(true):
            ones = predicted.sum() + true.sum()
            found[label] = float(2 * (predicted & true).sum() / ones) if ones else 0.0
    return found


def accuracy(judgements: np.ndarray) -> float:
    """The share of right answers; neither yes nor no counts as no."""
    return float(((judgements[:, 1] == YES) == (judgements[:, 2] == YES)).mean()) if len(judgements) else 0.0


def answered(judgements: np.ndarray) -> float:
    """The share of generated texts that are yes or no."""
    return float((judgements[:, 1] != NEITHER).mean()) if len(judgements) else 0.0


def read_references(rows: Rows, columns: Columns) -> list[Reference]:
    """The label of each row, and whether it holds.

    Raises:
        DataError: a label that is not known, or a target that is neither yes nor no, with file and line.
    """
    found = []
    names = texts(rows, columns.label or "label", "label")
    answers = texts(rows, columns.target or "target", "target")
    for index, (name, answer) in enumerate(zip(names, answers, strict=True)):
        if name not in LABELS:
            raise DataError(f"unknown label {name!r}", where=rows.where(index), mend=did_you_mean(name, LABELS))
        if answer not in ANSWERS:
            mend = f"correct the row, or choose another column with {option('target')}"
            what = f"the target is {answer[:40]!r}, neither yes nor no"
            raise DataError(what, where=rows.where(index), mend=mend)
        found.append((name, ANSWERS.index(answer)))
    return found


def encode_prompts(
    rows: Rows, columns: Columns, template: str, tokenizer: Any, config: Mapping[str, Any], max_length: int
) -> Encoded:
    """Tokenise the questions; of one that is too long the end of the sentence is cut, and never the question.

    Args:
        rows: a sentence and a label each.
        columns: where these are.
        template: with ``{sentence}`` and ``{label}``.
        tokenizer: of the model.
        config: of the model.
        max_length: in tokens, special tokens included.

    Raises:
        DataError: a row without a sentence, with file and line.
        UserError: the question alone is longer than ``max_length``.
    """
    sentences = texts(rows, columns.text or "text")
    labels = texts(rows, columns.label or "label", "label")

    def tokenise(indices: Sequence[int], stops: Mapping[int, int]) -> list[Feature]:
        prompts = []
        for i in indices:
            sentence = sentences[i][: stops[i]].rstrip() if i in stops else sentences[i]
            prompts.append(template.format(sentence=sentence, label=labels[i]))
        return encode_texts(rows, prompts, None, tokenizer, config, sys.maxsize).features

    features = tokenise(range(len(rows)), {})
    long = [index for index, feature in enumerate(features) if len(feature.input_ids) > max_length]
    # Cut by characters, halving the interval, and look at the tokens of the whole prompt: right for any tokenizer
    fits, over = dict.fromkeys(long, 0), {index: len(sentences[index]) for index in long}
    for index, feature in zip(long, tokenise(long, fits), strict=True):
        if len(feature.input_ids) > max_length:
            length = len(feature.input_ids)
            what = f"the question alone has {length} tokens, but only {max_length} fit ({rows.where(index)})"
            mend = f"give a maximum length that leaves at least {length - max_length} more"
            raise UserError(what, where="max_length", mend=mend)
        features[index] = feature
    while open_ := [index for index in long if over[index] - fits[index] > 1]:
        middles = {index: (fits[index] + over[index]) // 2 for index in open_}
        for index, feature in zip(open_, tokenise(open_, middles), strict=True):
            if len(feature.input_ids) > max_length:
                over[index] = middles[index]
            else:
                fits[index], features[index] = middles[index], feature
    return Encoded(features, frozenset(long), max_length)


@dataclass(frozen=True)
class Questions(Task):
    """What both ways of asking for yes or no have in common."""

    needs: ClassVar[tuple[str, ...]] = ("text", "label", "target")

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Never by itself: the model's configuration does not tell that it answers questions of this kind."""
        return False

    def references(self, rows: Rows, columns: Columns, space: LabelSpace) -> Any:
        """Label and truth of each row; see :func:`read_references`."""
        return read_references(rows, columns)

    @abstractmethod
    def answers(self, aligned: Any) -> list[int]:
        """The answer of each example: :data:`YES`, :data:`NO` or :data:`NEITHER`."""

    def judge(self, aligned: Any, references: Sequence[Any], space: LabelSpace) -> np.ndarray:
        """int64 (examples, 3): the place of the label in :data:`LABELS`, the answer, and the truth."""
        pairs = zip(self.answers(aligned), references, strict=True)
        rows = [(LABELS.index(label), answer, true) for answer, (label, true) in pairs]
        return np.array(rows, np.int64).reshape(-1, 3)

    def by_label(self, aligned: Any, references: Sequence[Any], space: LabelSpace) -> dict[str, float]:
        """F1 of yes of each label that was asked for; their mean is the key metric."""
        return f1_by_label(self.judge(aligned, references, space))


@dataclass(frozen=True)
class YesNo(Questions, Seq2Seq):
    """An encoder-decoder writes yes or no behind :data:`SENTINEL`; key metric macro-F1 over the labels.

    Attributes:
        max_new_tokens: how many tokens are generated at most: sentinel, answer and end, and one to spare.
    """

    max_new_tokens: int = 4

    name: ClassVar[str] = "yes-no"
    template: ClassVar[str] = f"does the sentence express {{label}}? {SENTINEL} {{sentence}}"
    metrics: ClassVar[Mapping[str, Metric]] = {"macro_f1": macro_f1, "accuracy": accuracy, "answered": answered}
    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def encode(
        self, rows: Rows, tokenizer: Any, config: Config, columns: Columns, max_length: int, references: Truths = None
    ) -> Encoded:
        """Tokenise questions and answers: the answer's tokens are the labels, which the decoder is fed."""
        sources = encode_prompts(rows, columns, self.template, tokenizer, config, max_length)
        wanted = references if references is not None else read_references(rows, columns)
        targets = [f"{SENTINEL} {answer}" for answer in ANSWERS]
        written = encode_texts(rows, targets, None, tokenizer, config, sys.maxsize, target=True).features
        _check_apart([feature.input_ids for feature in written], tokenizer)
        features = [
            replace(feature, labels=list(written[true].input_ids))
            for feature, (_, true) in zip(sources.features, wanted, strict=True)
        ]
        return replace(sources, features=features)

    def align(self, outputs: Sequence[str], own: LabelSpace, space: LabelSpace) -> list[str]:
        """Texts in lower case, without sentinels (not special to every tokenizer), white space evened out."""
        return [" ".join(_SENTINELS.sub(" ", text).lower().split()) for text in outputs]

    def answers(self, aligned: Sequence[str]) -> list[int]:
        """Nothing but yes and no is an answer."""
        return [ANSWERS.index(text) if text in ANSWERS else NEITHER for text in aligned]


@dataclass(frozen=True)
class YesNoContinuation(Questions, CausalLM):
    """A decoder goes on with yes or no, whichever is more likely; key metric macro-F1 over the labels.

    Nothing is generated: the log-likelihoods of both answers after the question are compared. Every question has
    an answer then, no padding stands left of a text, and several models make an ensemble by the mean of them. The
    sentence and the question are no labels (-100): only the answer is learned.
    """

    name: ClassVar[str] = "yes-no-continuation"
    template: ClassVar[str] = "{sentence} The sentence expresses {label}."
    metrics: ClassVar[Mapping[str, Metric]] = {"macro_f1": macro_f1, "accuracy": accuracy}
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    ensembles: ClassVar[bool] = True

    def encode(
        self, rows: Rows, tokenizer: Any, config: Config, columns: Columns, max_length: int, references: Truths = None
    ) -> Encoded:
        """Tokenise questions with their answers behind them; the labels are -100, and the answer's tokens."""
        answers = _answer_tokens(tokenizer)
        room = max_length - max(map(len, answers))
        prompts = encode_prompts(rows, columns, self.template, tokenizer, config, room)
        wanted = references if references is not None else read_references(rows, columns)
        features = []
        for prompt, (_, true) in zip(prompts.features, wanted, strict=True):
            ids, answer = _without_end(prompt.input_ids, tokenizer), answers[true]
            features.append(Feature(ids + answer, labels=[IGNORED] * len(ids) + answer))
        return Encoded(features, prompts.cut, max_length)

    def outputs(
        self, model: nn.Module, inputs: dict[str, Tensor], features: Sequence[Feature], tokenizer: Any
    ) -> list[np.ndarray]:
        """Log-likelihoods of no and yes after each question: float64 (2,). The true answers are not shown."""
        prompts = [_prompt(feature) for feature in features]
        device = inputs["input_ids"].device
        found = np.zeros((len(prompts), len(ANSWERS)), np.float64)
        scored: dict[tuple[int, ...], list[Tensor]] = {}
        for place, answer in enumerate(_answer_tokens(tokenizer)):
            begun = tuple(answer[:-1])  # empty where answers are single tokens: one forward pass serves both
            if begun not in scored:
                scored[begun] = _next_tokens(model, prompts, begun, padding_id(tokenizer), device)
            for row, scores in enumerate(scored[begun]):
                found[row, place] = sum(scores[step, token].item() for step, token in enumerate(answer))
        return list(found)

    def align(self, outputs: Sequence[np.ndarray], own: LabelSpace, space: LabelSpace) -> np.ndarray:
        """Log-likelihoods of no and yes (examples, 2)."""
        return np.stack(list(outputs))

    def answers(self, aligned: np.ndarray) -> list[int]:
        """The likelier answer."""
        return [int(yes > no) for no, yes in aligned]


def _answer_tokens(tokenizer: Any) -> list[list[int]]:
    """The tokens of `` no`` and `` yes`` as they stand behind a question's full stop."""
    bare = tokenizer(".", add_special_tokens=False)["input_ids"]
    found = []
    for answer in ANSWERS:
        whole = tokenizer(f". {answer}", add_special_tokens=False)["input_ids"]
        if whole[: len(bare)] == bare and len(whole) > len(bare):
            found.append(list(whole[len(bare) :]))
        else:
            found.append(list(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]))
    _check_apart(found, tokenizer)
    return found


def _check_apart(answers: Sequence[Sequence[int]], tokenizer: Any) -> None:
    if list(answers[NO]) == list(answers[YES]) or not all(answers):
        what, place = "the tokenizer makes the same tokens of yes and no", getattr(tokenizer, "name_or_path", None)
        raise CheckpointError(what, where=place, mend="choose a model whose vocabulary has these words")


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Without the end-of-text token that some tokenizers append: the answer follows."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == getattr(tokenizer, "eos_token_id", None) else list(ids)


def _prompt(feature: Feature) -> list[int]:
    """The tokens of the question: those that are no labels."""
    if not isinstance(feature.labels, list):
        raise ValueError("the feature was not encoded by this task")
    learned = next(place for place, label in enumerate(feature.labels) if label != IGNORED)
    return feature.input_ids[:learned]


def _next_tokens(
    model: nn.Module, prompts: Sequence[list[int]], begun: tuple[int, ...], pad_id: int, device: torch.device
) -> list[Tensor]:
    """For each prompt float64 (1 + begun, vocabulary): log-probabilities of the token after it, and so on.

    Logits are asked for at these places only: those of a whole batch would be hundreds of megabytes.
    """
    batch = Collation(pad_id)([Feature([*prompt, *begun]) for prompt in prompts])
    wanted = [range(len(prompt) - 1, len(prompt) + len(begun)) for prompt in prompts]
    places = sorted({place for steps in wanted for place in steps})
    network: Any = model
    asked = {name: value.to(device) for name, value in batch.items()}
    if "logits_to_keep" in inspect.signature(network.forward).parameters:
        asked["logits_to_keep"] = torch.tensor(places, device=device)
    else:
        places = list(range(batch["input_ids"].shape[1]))
    column = {place: number for number, place in enumerate(places)}
    with torch.inference_mode():
        logits = network(**asked).logits
        return [
            torch.log_softmax(logits[row, [column[place] for place in steps]].double(), -1).cpu()
            for row, steps in enumerate(wanted)
        ]


@dataclass(frozen=True)
class EmotionQuestions(EmotionCorpora):
    """A row for each record and annotated label; a suite over it brings the task that asks.

    Attributes:
        negatives: the chance that a train split keeps a row whose label does not hold: ``sqrt``, the square root
            of p; ``linear``, p; ``all``, always; where p is the share of the label's annotated records for
            which it holds.
        seed: of that choice. It depends on seed, data set, label and the record's number alone.
    """

    negatives: str = "sqrt"
    seed: int = 1

    def __post_init__(self) -> None:
        if self.negatives not in NEGATIVES:
            what = f"keeping negatives by {self.negatives!r} is unknown"
            raise UserError(what, where="negatives", mend=did_you_mean(str(self.negatives), NEGATIVES))

    def _rows(self, set_name: str, split: str, asked: str) -> Rows:
        path = self.file(set_name, split)
        records = read_records(path)
        chances = self.chances(records) if asked == TRAIN else {}
        rows: list[dict[str, Any]] = []
        places = []
        for number, record in enumerate(records):
            for label, true in record.labels.items():
                dropped = true == NO and _draw(self.seed, set_name, label, number) >= chances.get(label, 1.0)
                if true is None or dropped:
                    continue
                rows.append({"text": record.text, "label": label, "target": ANSWERS[true]})
                places.append(record.place)
        if not rows:
            what = "no record has an annotated label to ask for"
            if chances:
                what = "no label holds for any record, so that there is nothing to learn"
            raise DataError(what, where=path, mend="give records with a 1 for some emotion, or keep all negatives")
        return Rows(f"{set_name}[{split}]", tuple(rows), tuple(places))

    def chances(self, records: Sequence[Record]) -> dict[str, float]:
        """For each annotated label the probability with which a train split of these records keeps a negative."""
        found = {}
        for label in LABELS:
            marks = [record.labels[label] for record in records if record.labels[label] is not None]
            if marks:
                rate = sum(mark or 0 for mark in marks) / len(marks)
                found[label] = {"sqrt": math.sqrt(rate), "linear": rate, "all": 1.0}[self.negatives]
        return found


def _draw(seed: int, set_name: str, label: str, number: int) -> float:
    """A number between 0 and 1 (never 1) that looks random, and depends on the arguments alone."""
    digest = hashlib.blake2b(f"{seed}\n{set_name}\n{label}\n{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True)
class EmotionT5(EmotionQuestions):
    """Emotions as yes and no written by an encoder-decoder."""

    name: ClassVar[str] = "emotion-t5"

    def task(self, set_name: str) -> Task:
        """Questions to an encoder-decoder."""
        return YesNo()


@dataclass(frozen=True)
class EmotionGPT2(EmotionQuestions):
    """Emotions as yes and no that a decoder goes on with."""

    name: ClassVar[str] = "emotion-gpt2"

    def task(self, set_name: str) -> Task:
        """Questions to a decoder."""
        return YesNoContinuation()
