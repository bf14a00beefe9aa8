"""What merganser computes, computed again: slowly, one example at a time and in float64, by the published definitions.

Nothing here knows merganser. Corpora are read as :mod:`json` and lines of text, models are opened by transformers,
scores are scikit-learn's and seqeval's. An example is run alone, so that there is no padding to be left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from seqeval.metrics import f1_score as entity_f1
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn

from lab.tiny import EMOTIONS, VAD

State = dict[str, Tensor]
#: log p or an output, and its weight: Fisher information is the sum of the weighted squares of their gradients.
Terms = list[tuple[float, Tensor]]

LABELS = (*EMOTIONS, *VAD)
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG")
_BRACKETS = {"-LRB-": "(", "-RRB-": ")"}


@dataclass(frozen=True)
class Example:
    """A tokenised row.

    Attributes:
        inputs: of the model, a batch of one.
        truth: labels (NaN: not annotated), tags or a number.
        cut: whether it was longer than the maximum length.
        firsts: for each word the place of its first sub-word, -1 where it was cut off.
    """

    inputs: dict[str, Tensor]
    truth: Any
    cut: bool
    firsts: tuple[int, ...] = ()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def open_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, add_prefix_space=True)


def open_plain_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


# -- data and metrics, suite by suite ----------------------------------------------------------------------


@dataclass(frozen=True)
class Emotion:
    """Many labels a text. ``splits`` of a set are read one after the other."""

    root: Path
    tokenizer: Any
    length: int
    threshold: float

    auto = transformers.AutoModelForSequenceClassification

    def examples(self, name: str, *splits: str) -> list[Example]:
        rows = [row for split in splits for row in read_lines(self.root / name / f"{split}.jsonl")]
        return [encoded(self.tokenizer, self.length, [row["text"]], _marks(row)) for row in rows]

    def known(self, name: str) -> np.ndarray:
        """Which labels the training data annotate."""
        return ~np.isnan([example.truth for example in self.examples(name, "train")]).all(axis=0)

    def score(self, name: str, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> float:
        """Macro-F1 over the annotated labels."""
        return float(np.mean(list(self.by_label(outputs, examples).values())))

    def by_label(self, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> dict[str, float]:
        """F1 of each label that is annotated; a logit of minus infinity is never a yes."""
        logits, truths = np.array(outputs), np.array([example.truth for example in examples])
        found = {}
        for column, label in enumerate(LABELS):
            there = ~np.isnan(truths[:, column])
            if there.any():
                said = 1 / (1 + np.exp(-logits[there, column])) > self.threshold
                found[label] = float(f1_score(truths[there, column], said, zero_division=0))
        return found

    def terms(self, logits: Tensor, example: Example) -> Terms:
        """Each annotated label is yes or no by itself: E[(y − p)²] = p (1 − p) of its logit's gradient squared."""
        p = torch.sigmoid(logits[0]).detach()
        return [(float(p[j] * (1 - p[j])), logits[0, j]) for j in np.flatnonzero(~np.isnan(example.truth))]


def _marks(row: Mapping[str, Any]) -> np.ndarray:
    values = {**row["emotions"], **row["VAD"]}
    return np.array([np.nan if values[label] is None else values[label] > 0.1 for label in LABELS], float)


@dataclass(frozen=True)
class Entities:
    """A tag for each word; the first sub-word speaks for its word."""

    root: Path
    tokenizer: Any
    length: int

    auto = transformers.AutoModelForTokenClassification

    def examples(self, name: str, *splits: str) -> list[Example]:
        found = []
        for split in splits:
            for words, tags in self._sentences(name, split):
                words = [_BRACKETS.get(word, word) for word in words]
                tags = ["O" if tag[2:] not in ("PER", "LOC", "ORG") else tag for tag in tags]
                found.append(self._encoded(words, tags))
        return found

    def _sentences(self, name: str, split: str) -> Iterator[tuple[list[str], list[str]]]:
        if name == "twitter":
            for row in read_lines(self.root / name / f"{split}.json"):
                yield row["tokens"], row["labels"]
            return
        if name == "conll2003":
            path = self.root / name / {"train": "eng.train", "dev": "eng.testa", "test": "eng.testb"}[split]
        else:
            part = {"dev": "development"}.get(split, split)
            path = self.root / f"onto.{part}.{name.removeprefix('onto-')}.ner"
        for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
            columns = [line.split() for line in block.splitlines()]
            if columns[0][0] != "-DOCSTART-":
                tags = [column[-1].replace("PERSON", "PER") for column in columns]
                if name == "conll2003":  # IOB1: an I- that continues nothing begins an entity
                    before = ["O", *tags[:-1]]
                    tags = [
                        "B" + t[1:] if t != "O" and b[2:] != t[2:] else t for b, t in zip(before, tags, strict=True)
                    ]
                yield [column[0] for column in columns], tags

    def _encoded(self, words: list[str], tags: list[str]) -> Example:
        options = {"is_split_into_words": True, "return_tensors": "pt"}
        inputs = self.tokenizer(words, truncation=True, max_length=self.length, **options)
        of_words = inputs.word_ids(0)
        firsts = tuple(of_words.index(i) if i in of_words else -1 for i in range(len(words)))
        cut = len(self.tokenizer(words, **options)["input_ids"][0]) > self.length
        return Example(dict(inputs), tags, cut, firsts)

    def known(self, name: str) -> None:
        return None

    def score(self, name: str, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> float:
        said = []
        for logits, example in zip(outputs, examples, strict=True):
            best = logits.argmax(axis=1)
            said.append([TAGS[k] if first >= 0 else "O" for k, first in zip(best, example.firsts, strict=True)])
        return float(entity_f1([example.truth for example in examples], said))

    def terms(self, logits: Tensor, example: Example) -> Terms:
        """Of the true tags (empirical): the log-likelihood of the whole sentence."""
        log = torch.log_softmax(logits[0], -1)
        pairs = zip(example.firsts, example.truth, strict=True)
        return [(1.0, torch.stack([log[first, TAGS.index(tag)] for first, tag in pairs if first >= 0]).sum())]


@dataclass(frozen=True)
class Glue:
    """One class, or for STS-B one number, of a text or a pair."""

    root: Path
    tokenizer: Any
    length: int

    auto = transformers.AutoModelForSequenceClassification

    def examples(self, name: str, split: str) -> list[Example]:
        """``test`` is the validation file; ``dev`` is a tenth of the training file, drawn with seed 0."""
        if split == "test":
            rows = read_lines(self.root / name / f"validation{'_matched' if name == 'mnli' else ''}.jsonl")
        else:
            rows = read_lines(self.root / name / "train.jsonl")
            held_out = set(np.random.default_rng(0).permutation(len(rows))[: len(rows) // 10].tolist())
            rows = [row for i, row in enumerate(rows) if (i in held_out) == (split == "dev")]
        return [
            encoded(self.tokenizer, self.length, [v for v in row.values() if isinstance(v, str)], row["label"])
            for row in rows
        ]

    def known(self, name: str) -> None:
        return None

    def score(self, name: str, outputs: Sequence[np.ndarray], examples: Sequence[Example]) -> float:
        truths = [example.truth for example in examples]
        if name == "stsb":
            return float(np.corrcoef(np.array(outputs)[:, 0], truths)[0, 1])
        said = np.array(outputs).argmax(axis=1)
        return float((matthews_corrcoef if name == "cola" else accuracy_score)(truths, said))

    def terms(self, logits: Tensor, example: Example) -> Terms:
        """The expectation over all classes; a number is Gaussian with variance 1."""
        if logits.shape[1] == 1:
            return [(1.0, logits[0, 0])]
        log = torch.log_softmax(logits[0], -1)
        return [(float(one.detach().exp()), one) for one in log]


def encoded(tokenizer: Any, length: int, texts: Sequence[str], truth: Any) -> Example:
    inputs = tokenizer(*texts, truncation="longest_first", max_length=length, return_tensors="pt")
    return Example(dict(inputs), truth, len(tokenizer(*texts)["input_ids"]) > length)


def non_iid(labels: Sequence[float], total: int, seed: int, *, numbers: bool = False) -> list[list[int]]:
    """PAPER: of two parts the first has 80% of its main label and a fifth of each other one, the second the rest.

    Labels that are ``numbers`` count as those below the middle of their range and those from there on.
    """
    draw = np.random.default_rng(seed)
    drawn = draw.permutation(len(labels))[:total].tolist()
    chosen = [labels[i] for i in drawn]
    if numbers:
        chosen = [value >= (min(chosen) + max(chosen)) / 2 for value in chosen]
    names = sorted(set(chosen))
    main = names[int(draw.permutation(len(names))[0])]
    first: list[int] = []
    for name in names:
        own = [i for i, label in zip(drawn, chosen, strict=True) if label == name]
        first += own[: len(own) * 4 // 5 if name == main else len(own) // 5]
    return [sorted(first), sorted(set(drawn) - set(first))]


# -- models ------------------------------------------------------------------------------------------------


def open_model(suite: Any, folder: Path) -> nn.Module:
    network: nn.Module = suite.auto.from_pretrained(folder, dtype=torch.float64)
    return network.eval()


def predict(network: nn.Module, examples: Sequence[Example]) -> list[np.ndarray]:
    """The logits of each example: (labels,), or (words, tags)."""
    found = []
    for example in examples:
        with torch.no_grad():
            logits = network(**example.inputs).logits[0].numpy()
        found.append(logits[list(example.firsts)] if example.firsts else logits)
    return found


@dataclass
class Moments:
    """Of the inputs of a linear layer: how many, their sum, and the sum of x xᵀ. Of an embedding: the ids' counts."""

    rows: int = 0
    total: Any = 0.0
    gram: Any = 0.0


def moments(network: nn.Module, examples: Sequence[Example]) -> dict[str, Moments]:
    """What every linear layer and embedding is given, by the name of the module."""
    found: dict[str, Moments] = {}

    def watch(name: str, module: nn.Module) -> Any:
        kept = found.setdefault(name, Moments())

        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if isinstance(module, nn.Embedding):
                ids = inputs[0].reshape(-1)
                kept.total = kept.total + torch.bincount(ids, minlength=module.num_embeddings).double()
                kept.rows += len(ids)
                return
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            kept.rows, kept.total, kept.gram = kept.rows + len(x), kept.total + x.sum(0), kept.gram + x.T @ x

        return module.register_forward_pre_hook(look)

    watched = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    handles = [watch(name, module) for name, module in watched]
    predict(network, examples)
    for handle in handles:
        handle.remove()
    return found


def fisher_information(
    network: nn.Module, examples: Sequence[Example], terms: Callable[[Tensor, Example], Terms]
) -> State:
    """The diagonal: squared for each example, then averaged over the examples."""
    parameters = dict(network.named_parameters())
    found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for example in examples:
        for weight, output in terms(network(**example.inputs).logits, example):
            gradients = torch.autograd.grad(output, list(parameters.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    found[name] += weight * gradient**2 / len(examples)
    return found


# -- merges ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Contributor:
    """A model to merge: its weights, its statistics, and for each row of its head whether it was trained."""

    weights: State
    moments: dict[str, Moments]
    fisher: State
    known: np.ndarray | None


def merged(contributors: Sequence[Contributor], method: str, *, head_averaged: bool = False, **options: Any) -> State:
    """Every parameter of a merge; a row of a multi-label head is merged from those that have trained it alone.

    With ``head_averaged`` such a row is their average (PAPER.md), whatever merges the rest.
    """
    rule = {"simple": _simple, "fisher": _fisher, "regmean": _regmean}[method]
    whole = rule(contributors, **options)
    if all(one.known is None for one in contributors):
        return whole
    voters_of = [tuple(one for one in contributors if one.known[row]) for row in range(len(LABELS))]
    for_head = _simple if head_averaged else partial(rule, **options)
    of_voters = {voters: for_head(voters) for voters in set(voters_of) if voters}
    for row, voters in enumerate(voters_of):
        for name in whole:
            if voters and name.startswith("classifier.out_proj."):
                whole[name][row] = of_voters[voters][name][row]
    return whole


def _simple(contributors: Sequence[Contributor]) -> State:
    return {name: _mean(contributors, name) for name in contributors[0].weights}


def _mean(contributors: Sequence[Contributor], name: str) -> Tensor:
    return torch.stack([one.weights[name] for one in contributors]).mean(0)


def _fisher(contributors: Sequence[Contributor], ridge: float = 1e-6) -> State:
    """Weighted by information; the ridge is a share of its mean, and pulls toward the average."""
    found = {}
    for name in contributors[0].weights:
        weights = torch.stack([one.weights[name] for one in contributors])
        information = torch.stack([one.fisher[name] for one in contributors])
        pull = ridge * information.sum(0).mean()
        found[name] = ((information * weights).sum(0) + pull * weights.mean(0)) / (information.sum(0) + pull)
    return found


def _regmean(
    contributors: Sequence[Contributor], alpha: float = 0.9, augment_bias: bool = True, embeddings: bool = True
) -> State:
    """W = (Σ WᵢGᵢ)(Σ Gᵢ)⁻¹, and the average along inputs that never occur; all that is no linear map is averaged."""
    found = _simple(contributors)
    for module, first in contributors[0].moments.items():
        weight, bias = f"{module}.weight", f"{module}.bias"
        if isinstance(first.gram, float):
            if embeddings:
                counts = torch.stack([p.moments[module].total / p.moments[module].rows for p in contributors])[
                    :, :, None
                ]
                seen = counts.sum(0) > 0
                rows = sum(c * p.weights[weight] for c, p in zip(counts, contributors, strict=True))
                found[weight] = torch.where(seen, rows / counts.sum(0).where(seen, 1), found[weight])
            continue
        with_bias = augment_bias and bias in contributors[0].weights
        shift, system = 0.0, 0.0
        middle = torch.cat([found[weight], found[bias][:, None]], 1) if with_bias else found[weight]
        for one in contributors:
            known = one.moments[module]
            gram, w = known.gram / known.rows, one.weights[weight]
            if with_bias:
                mean = (known.total / known.rows)[:, None]
                gram = torch.cat([torch.cat([gram, mean], 1), torch.cat([mean.T, torch.ones(1, 1)], 1)])
                w = torch.cat([w, one.weights[bias][:, None]], 1)
            gram = alpha * gram + (1 - alpha) * gram.diagonal().diag()
            shift, system = shift + (w - middle) @ gram, system + gram
        solved = middle + shift @ torch.linalg.pinv(system, hermitian=True)
        found[weight] = solved[:, :-1] if with_bias else solved
        if with_bias:
            found[bias] = solved[:, -1]
    return found
