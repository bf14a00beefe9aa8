"""Embeddings: how alike two texts are, and which document answers a query, by sentence-transformers' own encoding.

merganser evaluate merged --data stsb.csv --task sts
merganser evaluate merged --data pairs.jsonl --task retrieval
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from merganser.checkpoints import AdapterCheckpoint
from merganser.checkpoints.json_files import read_json
from merganser.errors import CheckpointError, DataError, UserError, require
from merganser.tasks.base import Metric, Task
from merganser.tasks.columns import PAIRS, Columns, option, texts
from merganser.tasks.data import Rows
from merganser.tasks.labels import LabelSpace
from merganser.tasks.models import Opened
from merganser.tasks.regression import Regression, pearson, spearman
from merganser.tasks.tokens import Encoded

_BLOCK = 256  # queries that are compared with all documents at once
_CUT = 10  # ranks that count
_PLACES = (1, 5, 10)  # at which recall is told

#: Encodes texts: float32 (texts, width), on the model's device. ``side`` is ``query``, ``document`` or empty.
Encode = Callable[[Sequence[str], str], Tensor]


@dataclass(frozen=True)
class Embedding(Task):
    """Two texts, encoded one without the other. What is compared is what sentence-transformers gives.

    Attributes:
        pairs: usual names of the two columns, the first that are there are taken.
    """

    auto_class = "AutoModel"
    heads = ()
    metrics: ClassVar[Mapping[str, Metric]] = {}
    pairs: ClassVar[Sequence[tuple[str, str]]] = PAIRS

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Never by itself: every encoder makes embeddings, and its configuration does not tell for what."""
        return False

    def check_head(self, opened: Opened) -> None:
        """Refuse models that read both texts at once and make no embeddings.

        Raises:
            CheckpointError: a cross-encoder.
        """
        if saved_type(opened) == "CrossEncoder":
            what = "a cross-encoder scores pairs and makes no embeddings"
            raise CheckpointError(what, where=opened.where, mend="choose --task regression or text-classification")

    def check_scoring(self, opened: Opened) -> None:
        """The library that encodes is there.

        Raises:
            UserError: it is not installed.
        """
        require("embeddings", "scoring embeddings", "sentence_transformers", where=f"--task {self.name}")

    def columns(self, rows: Rows, given: Columns, *, labelled: bool = True) -> Columns:
        """The columns of the two texts, and of the label where the task has one."""
        lower = {name.lower(): name for name in reversed(rows.columns)}
        usual = next((pair for pair in self.pairs if all(name in lower for name in pair)), None)
        if usual is not None and given.text is None and given.text_pair is None:
            given = replace(given, text=lower[usual[0]], text_pair=lower[usual[1]])
        if given.text is None or given.text_pair is None:
            what = f"no two columns of texts were found; the columns are {', '.join(rows.columns) or 'none'}"
            known = ", ".join(" and ".join(pair) for pair in self.pairs)
            mend = f"name them with {option('text')} and {option('text_pair')} (found by themselves: {known})"
            raise DataError(what, where=rows.source, mend=mend)
        return super().columns(rows, given, labelled=labelled)

    def encode(
        self,
        rows: Rows,
        tokenizer: Any,
        config: Mapping[str, Any],
        columns: Columns,
        max_length: int,
        references: Sequence[Any] | None = None,
    ) -> Encoded:
        """Not here: the model's own pipeline reads the texts, each alone.

        Raises:
            UserError: always.
        """
        what = f"task {self.name} scores embeddings, and makes no batches of tokens"
        raise UserError(what, where="--task", mend="choose --task feature-extraction")

    def compare(self, encode: Encode, similarity: Callable[[Tensor, Tensor], Tensor], rows: Rows, read: Columns) -> Any:
        """What the embeddings say of the rows.

        Args:
            encode: of the model.
            similarity: the model's own: (queries, width) and (documents, width) to (queries, documents).
            rows: the data.
            read: as :meth:`columns` found them.
        """
        raise NotImplementedError


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """The cosine of each row of the one with the same row of the other: float32 (rows,)."""
    return torch.nn.functional.cosine_similarity(first.float(), second.float(), dim=1)


@dataclass(frozen=True)
class STS(Embedding):
    """Semantic textual similarity: cosines beside the scores that people gave; key metric Spearman's correlation."""

    name = "sts"
    needs = ("text", "text_pair")
    wants = ()
    metrics: ClassVar[Mapping[str, Metric]] = {"spearman": spearman, "pearson": pearson}
    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "label": ("score", "similarity_score", "relatedness_score", "similarity", "label", "labels", "rating")
    }

    def references(self, rows: Rows, columns: Columns, space: LabelSpace) -> np.ndarray:
        """The scores: float64 (rows,), in any unit."""
        texts(rows, columns.text or "text")
        texts(rows, columns.text_pair or "text_pair", "text_pair")
        return Regression().references(rows, columns, space)

    def compare(self, encode: Encode, similarity: Callable[[Tensor, Tensor], Tensor], rows: Rows, read: Columns) -> Any:
        """The cosine of each pair: float64 (rows,)."""
        first, second = (texts(rows, column or "") for column in (read.text, read.text_pair))
        return cosine(encode(first, ""), encode(second, "")).double().cpu().numpy()

    def judge(self, aligned: np.ndarray, references: Sequence[Any], space: LabelSpace) -> np.ndarray:
        """Cosine and score: float64 (rows, 2)."""
        return np.stack([aligned, np.asarray(references, np.float64)], axis=1)


def _mean_of(column: int, judgements: np.ndarray) -> float:
    return float(judgements[:, column].mean())


@dataclass(frozen=True)
class Retrieval(Embedding):
    """Find the documents that belong to a query among all of the file's; key metric nDCG of the first ten."""

    name = "retrieval"
    needs = ("text", "text_pair")
    wants = ()
    label_role = None
    ensembles = False
    pairs = (
        ("query", "document"),
        ("query", "positive"),
        ("anchor", "positive"),
        ("query", "passage"),
        ("question", "answer"),
        ("question", "passage"),
        ("question", "context"),
        ("question", "document"),
        ("query", "answer"),
        *PAIRS,
    )
    metrics: ClassVar[Mapping[str, Metric]] = {
        f"ndcg@{_CUT}": partial(_mean_of, 0),
        f"mrr@{_CUT}": partial(_mean_of, 1),
        **{f"recall@{place}": partial(_mean_of, 2 + number) for number, place in enumerate(_PLACES)},
    }

    def references(self, rows: Rows, columns: Columns, space: LabelSpace) -> list[set[int]]:
        """Of each query the numbers of its documents; both numbered as they first occur."""
        queries, _, relevant = _numbered(rows, columns)
        return [relevant[number] for number in range(len(queries))]

    def compare(self, encode: Encode, similarity: Callable[[Tensor, Tensor], Tensor], rows: Rows, read: Columns) -> Any:
        """The documents of the first ranks: int64 (queries, ranks); of equals the one that occurs first."""
        queries, documents, _ = _numbered(rows, read)
        asked, found = encode(queries, "query"), encode(documents, "document")
        ranked = []
        for start in range(0, len(queries), _BLOCK):
            scores = similarity(asked[start : start + _BLOCK], found)
            order = scores.to_dense() if scores.is_sparse else scores
            ranked.append(order.sort(dim=1, descending=True, stable=True).indices[:, : max(_CUT, *_PLACES)].cpu())
        return torch.cat(ranked).numpy()

    def judge(self, aligned: np.ndarray, references: Sequence[set[int]], space: LabelSpace) -> np.ndarray:
        """nDCG, reciprocal rank and recalls of each query: float64 (queries, metrics)."""
        return np.array([_judged(list(row), wanted) for row, wanted in zip(aligned, references, strict=True)])


def _judged(ranked: Sequence[int], relevant: set[int]) -> list[float]:
    """One query's share of each metric; every document of ``relevant`` is as good as the others."""
    hits = np.array([document in relevant for document in ranked], np.float64)
    gains = 1 / np.log2(np.arange(2, _CUT + 2))
    ideal = gains[: len(relevant)].sum()
    first = next((rank for rank, hit in enumerate(hits[:_CUT], 1) if hit), None)
    recalls = [hits[:place].sum() / len(relevant) for place in _PLACES]
    return [float((hits[:_CUT] * gains[: len(hits)]).sum() / ideal), 1 / first if first else 0.0, *recalls]


def _numbered(rows: Rows, columns: Columns) -> tuple[list[str], list[str], dict[int, set[int]]]:
    """The queries, the documents, and the documents of each query by their numbers; each text once."""
    asked = texts(rows, columns.text or "text")
    answers = texts(rows, columns.text_pair or "text_pair", "text_pair")
    queries = {text: number for number, text in enumerate(dict.fromkeys(asked))}
    documents = {text: number for number, text in enumerate(dict.fromkeys(answers))}
    relevant: dict[int, set[int]] = {}
    for query, document in zip(asked, answers, strict=True):
        relevant.setdefault(queries[query], set()).add(documents[document])
    return list(queries), list(documents), relevant


def saved_type(opened: Opened) -> str | None:
    """The class of sentence-transformers that a model was saved by, such as ``SparseEncoder``, where it says one."""
    place = opened.checkpoint.modules_path if isinstance(opened.checkpoint, AdapterCheckpoint) else opened.root
    found = read_json(place / "config_sentence_transformers.json", missing={}).get("model_type")
    return found if isinstance(found, str) else None
