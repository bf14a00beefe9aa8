"""Fisher information counts the labels that are annotated, and no statistic an example without any."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from conftest import ARCHITECTURES
from fisher_oracle import brute_force, build
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics, scores
from merganser.collection.per_example import GradientEngine, OneByOne, Separable, SideBySide
from merganser.collection.scores import FISHER_OF_ALL, FISHER_OF_ANNOTATED, cotangents, scored
from merganser.errors import DataError
from merganser.statistics import Statistics
from merganser.statistics.algebra import add
from statistics_examples import Example, batched, make_examples

NAN = float("nan")
#: Five examples' marks of four labels: different ones are annotated, the third label for none.
MARKS = [
    [1.0, 0.0, NAN, NAN],
    [NAN, 1.0, -1.0, 0.0],
    [0.0, NAN, NAN, NAN],
    [1.0, 1.0, -100.0, 1.0],
    [NAN, NAN, NAN, 1.0],
]


def log_chance(logits: Tensor, marks: Tensor) -> Tensor:
    """log p of some marks, each of them 0 or 1."""
    return torch.where(marks == 1, nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)).sum()


def every_mark(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
    """All sets of marks of the annotated labels; the others have no part in the likelihood."""
    known = [label for label, mark in enumerate(example["labels"]) if mark >= 0]
    for marks in itertools.product((0.0, 1.0), repeat=len(known)):
        log_p = log_chance(logits[known], torch.tensor(marks))
        yield log_p.exp().item(), log_p


def true_marks(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
    marks = torch.tensor(example["labels"])
    yield 1.0, log_chance(logits[marks >= 0], marks[marks >= 0])


def probable_marks(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
    known = torch.tensor(example["labels"]) >= 0
    yield 1.0, log_chance(logits[known], (logits[known] > 0).double())


def with_labels(
    model: nn.Module, examples: list[Example], labels: list[Any], size: int
) -> tuple[list[Example], list[dict[str, Tensor]]]:
    """The oracle's examples, and batches of them; what is longer than its row is padded with -100."""
    batches = batched(model, [{"input_ids": example["input_ids"]} for example in examples], size)
    for number, batch in enumerate(batches):
        rows = [torch.tensor(row) for row in labels[number * size : (number + 1) * size]]
        batch["labels"] = nn.utils.rnn.pad_sequence(rows, True, -100) if rows[0].ndim else torch.stack(rows)
    return [{**example, "labels": row} for example, row in zip(examples, labels, strict=True)], batches


def same_as_oracle(tensors: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    largest = max(float(value.max()) for value in truth.values())
    for name, value in truth.items():
        ours = tensors[f"fisher.{name}"].double()
        assert (ours - value).abs().max() <= 1e-4 * value.max() + 1e-9 * largest, name


def multi_label(folder: Path, architecture: str = "bert", labels: int = 4) -> tuple[Any, Any]:
    return build(
        folder,
        architecture,
        ARCHITECTURES[architecture][1],
        num_labels=labels,
        problem_type="multi_label_classification",
    )


@pytest.mark.parametrize("architecture", ["bert", "deberta-v2"])  # in batches and one by one
@pytest.mark.parametrize(
    ("kind", "outcomes"), [("expected", every_mark), ("empirical", true_marks), ("predicted", probable_marks)]
)
def test_multi_label(tmp_path: Path, architecture: str, kind: Any, outcomes: Any) -> None:
    model, checkpoint = multi_label(tmp_path, architecture)
    examples, batches = with_labels(model, make_examples(model, 5), MARKS, 3)
    header, tensors = collect_statistics(model, checkpoint, batches, grams=False, fisher=kind)
    same_as_oracle(tensors, brute_force(model, examples, outcomes))
    assert header.fisher_examples == 5 and FISHER_OF_ANNOTATED in header.notes
    assert not tensors["fisher.classifier.weight"][2].any() and not tensors["fisher.classifier.bias"][2]
    assert all(bool(tensors["fisher.classifier.bias"][label]) for label in (0, 1, 3))


def test_without_labels_every_output_counts_and_the_header_says_so(tmp_path: Path) -> None:
    model, checkpoint = multi_label(tmp_path)
    examples = make_examples(model, 5)
    header, tensors = collect_statistics(model, checkpoint, batched(model, examples, 3), grams=False, fisher="expected")
    all_of_them = [{**example, "labels": [0.0] * 4} for example in examples]
    same_as_oracle(tensors, brute_force(model, all_of_them, every_mark))
    assert FISHER_OF_ALL in header.notes and FISHER_OF_ANNOTATED not in header.notes


def test_rows_of_the_head_that_nobody_annotates_do_not_touch_the_encoder(tmp_path: Path) -> None:
    """Every parameter's Fisher information is that of the model whose head has the annotated rows alone."""
    kept = [0, 3]
    whole, checkpoint = multi_label(tmp_path / "whole")
    small, _ = multi_label(tmp_path / "small", labels=2)
    weights = whole.state_dict()
    heads = {name: weights[name][kept] for name in ("classifier.weight", "classifier.bias")}
    small.load_state_dict(weights | heads)
    small.save_pretrained(tmp_path / "small")
    marks = [[float(n % 2), NAN, NAN, float(n % 3 > 0)] for n in range(5)]
    examples = make_examples(whole, 5)
    _, batches = with_labels(whole, examples, marks, 3)
    _, fewer = with_labels(small, examples, [[row[k] for k in kept] for row in marks], 3)
    _, tensors = collect_statistics(whole, checkpoint, batches, grams=False, fisher="expected")
    _, truth = collect_statistics(small, open_checkpoint(tmp_path / "small"), fewer, grams=False, fisher="expected")
    for name, value in truth.items():
        ours = tensors[name]
        if name.startswith("fisher.classifier."):
            assert not ours[[1, 2]].any()
            ours = ours[kept]
        torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-10)


def tags(model: nn.Module, examples: list[Example]) -> list[list[int]]:
    """Other tokens are annotated in each example, and none but the first in one."""
    found = [
        [-100 if (place + number) % 3 == 0 else place % 3 for place in range(len(example["input_ids"]))]
        for number, example in enumerate(examples)
    ]
    found[1] = [2] + [-100] * (len(found[1]) - 1)
    return found


def true_tags(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
    log_p = torch.log_softmax(logits, -1)
    yield 1.0, sum(log_p[place, tag] for place, tag in enumerate(example["labels"]) if tag != -100)


def probable_tags(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
    log_p = torch.log_softmax(logits, -1).amax(-1)
    yield 1.0, sum(log_p[place] for place, tag in enumerate(example["labels"]) if tag != -100)


@pytest.mark.parametrize(
    ("architecture", "model_class"),
    [("bert", transformers.BertForTokenClassification), ("mpnet", transformers.MPNetForTokenClassification)],
)
@pytest.mark.parametrize(("kind", "outcomes"), [("empirical", true_tags), ("predicted", probable_tags)])
def test_tokens(tmp_path: Path, architecture: str, model_class: Any, kind: Any, outcomes: Any) -> None:
    model, checkpoint = build(tmp_path, architecture, model_class, num_labels=3)
    examples = make_examples(model, 5)
    examples, batches = with_labels(model, examples, tags(model, examples), 3)
    _, tensors = collect_statistics(model, checkpoint, batches, grams=False, fisher=kind)
    same_as_oracle(tensors, brute_force(model, examples, outcomes))


@pytest.mark.parametrize("kind", ["expected", "empirical", "predicted"])
def test_classification_leaves_out_examples_without_a_label(tmp_path: Path, kind: Any) -> None:
    """They are in no Gram matrix, token count or average: all is as if they had not been given."""
    model, checkpoint = build(tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=3)
    examples = make_examples(model, 7)
    labels = [0, -100, 2, -100, -100, 1, 0]
    _, batches = with_labels(model, examples, labels, 3)
    rest = [{**e, "labels": y} for e, y in zip(examples, labels, strict=True) if y != -100]

    def outcomes(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
        log_p = torch.log_softmax(logits, -1)
        chosen = {"empirical": [example["labels"]], "predicted": [int(logits.argmax())]}.get(kind, range(3))
        for label in chosen:
            yield log_p[label].exp().item() if kind == "expected" else 1.0, log_p[label]

    header, tensors = collect_statistics(model, checkpoint, batches, fisher=kind)
    same_as_oracle(tensors, brute_force(model, rest, outcomes))
    alone, truth = collect_statistics(model, checkpoint, batched(model, rest, 2), fisher=kind)
    assert header.examples == header.fisher_examples == alone.examples == 4
    assert header.tokens == alone.tokens == sum(len(example["input_ids"]) for example in rest)
    assert header.layers == alone.layers
    for name in truth:
        if not name.startswith("fisher."):
            torch.testing.assert_close(tensors[name], truth[name], rtol=1e-5, atol=1e-6)
    assert set(header.notes) - set(alone.notes) == {"left out, without an annotated label: 3 examples"}


@pytest.mark.parametrize("kind", [None, "expected"])
def test_examples_without_a_label_are_left_out_of_every_problem(tmp_path: Path, kind: Any) -> None:
    problems: list[tuple[Any, dict[str, Any], list[Any]]] = [
        (transformers.BertForSequenceClassification, {"num_labels": 1}, [0.5, NAN, -2.0, 1.0, NAN]),
        (
            transformers.BertForSequenceClassification,
            {"num_labels": 2, "problem_type": "multi_label_classification"},
            [[1.0, NAN], [NAN, NAN], [NAN, 0.0], [0.0, 0.0], [NAN, NAN]],
        ),
        (transformers.BertForTokenClassification, {"num_labels": 3}, [[1, -100], [-100], [2], [0], [-100] * 3]),
    ]
    for number, (model_class, config, labels) in enumerate(problems):
        model, checkpoint = build(tmp_path / str(number), "bert", model_class, **config)
        examples = make_examples(model, 5)
        if model_class is transformers.BertForTokenClassification:
            labels = [(row + [-100] * 12)[: len(e["input_ids"])] for row, e in zip(labels, examples, strict=True)]
        _, batches = with_labels(model, examples, labels, 5)
        header, _ = collect_statistics(model, checkpoint, batches, fisher=kind)
        assert header.examples == 3 and header.fisher_examples == (3 if kind else 0)
        assert header.tokens == sum(len(examples[kept]["input_ids"]) for kept in (0, 2, 3))
        assert "left out, without an annotated label: 2 examples" in header.notes
        lone = {key: value[1:2] for key, value in batches[0].items()}
        with pytest.raises(DataError, match="none of the 2 examples has an annotated label"):
            collect_statistics(model, checkpoint, [lone, lone], fisher=kind)


def test_tokens_without_a_label_stay_in_the_grams(tmp_path: Path) -> None:
    model, checkpoint = build(tmp_path, "bert", transformers.BertForTokenClassification, num_labels=3)
    examples = make_examples(model, 5)
    _, batches = with_labels(model, examples, tags(model, examples), 3)
    header, tensors = collect_statistics(model, checkpoint, batches)
    plain, truth = collect_statistics(model, checkpoint, batched(model, examples, 3))
    assert header == plain
    assert all(torch.equal(tensors[name], truth[name]) for name in truth)


class Given(nn.Module):
    """A model whose logits are its parameter, so that vectors times the Jacobian are the vectors."""

    def __init__(self, logits: Tensor, **config: Any) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.config = transformers.BertConfig(**config)


def covariance(model: Given, batch: dict[str, Tensor], problem: Any) -> Tensor:
    """(B, n, n): the sum of v vᵀ over the vectors of ``expected``."""
    vectors = list(cotangents(scored(model.logits, batch, model, "expected", problem), "expected"))
    return sum((torch.einsum("bi,bj->bij", v.flatten(1), v.flatten(1)) for v in vectors), torch.zeros(1, 1, 1))


def test_vectors_have_the_covariance_of_the_annotated_labels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the covariance of ∂ log p(y)/∂ logits over all outcomes, written out."""
    torch.manual_seed(0)
    logits = torch.randn(3, 3)
    ids = {"input_ids": torch.arange(12).reshape(3, 4)}
    p = logits.softmax(-1)
    multinomial = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    found = covariance(Given(logits), {**ids, "labels": torch.tensor([2, -100, 0])}, "classification")
    torch.testing.assert_close(found, multinomial * torch.tensor([1.0, 0.0, 1.0])[:, None, None])

    known = torch.tensor([[True, False, False], [False, False, False], [True, False, True]])
    marks = torch.where(known, 1.0, NAN)
    bernoulli = torch.diag_embed(logits.sigmoid() * (1 - logits.sigmoid()) * known)
    torch.testing.assert_close(covariance(Given(logits), {**ids, "labels": marks}, "multi_label"), bernoulli)
    normal = torch.diag_embed(known.float())
    torch.testing.assert_close(covariance(Given(logits), {**ids, "labels": -marks}, "regression"), normal)

    monkeypatch.setattr(scores, "SAMPLES", 4000)
    logits = torch.randn(2, 3, 2)
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    batch["labels"] = torch.tensor([[1, -100, 0], [-100, 1, 1]])
    known = torch.tensor([[True, False, True], [False, True, False]])  # the last token is padding
    p = logits.softmax(-1)
    blocks = (torch.diag_embed(p) - p[..., :, None] * p[..., None, :]) * known[..., None, None]
    truth = torch.stack([torch.block_diag(*example) for example in blocks])
    found = covariance(Given(logits), batch, "tokens")
    assert (found - truth).abs().max() < 0.03
    assert not found[truth.diagonal(dim1=1, dim2=2) == 0].any()


def test_labels_that_nobody_annotates_cost_no_backward_pass() -> None:
    logits, ids = torch.randn(2, 5), {"input_ids": torch.ones(2, 3, dtype=torch.int64)}

    def passes(labels: Tensor, problem: Any, kind: Any = "expected", outputs: Tensor = logits) -> int:
        batch = {**ids, "labels": labels}
        return len(list(cotangents(scored(outputs, batch, Given(outputs), kind, problem), kind)))

    assert passes(torch.tensor([[1, NAN, NAN, 0, NAN], [1, NAN, NAN, NAN, -1]]), "multi_label") == 2
    assert passes(torch.tensor([1, -100]), "classification") == 4
    for kind in ("expected", "empirical", "predicted"):
        assert passes(torch.full((2, 5), NAN), "multi_label", kind) == 0
        assert passes(torch.tensor([-100, -100]), "classification", kind) == 0
        assert passes(torch.full((2, 3), -100), "tokens", kind, torch.randn(2, 3, 5)) == 0
    assert passes(torch.full((2, 5), NAN), "regression", "empirical") == 0


def test_labels_that_do_not_fit_the_outputs_are_an_error() -> None:
    logits, ids = torch.randn(2, 5), {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    for problem, labels in (("multi_label", torch.tensor([0, 1])), ("classification", torch.zeros(2, 5))):
        with pytest.raises(DataError, match=r"labels of shape .* do not fit outputs of shape \[2, 5\]"):
            scored(logits, {**ids, "labels": labels}, Given(logits), "expected", problem)


def test_engines_agree(tmp_path: Path) -> None:
    model, _ = multi_label(tmp_path)
    _, (batch,) = with_labels(model, make_examples(model, 5), MARKS, 5)
    parameters = dict(model.named_parameters())
    for kind in ("expected", "empirical", "predicted"):
        results = []
        for make in (OneByOne, Separable, SideBySide):
            engine: GradientEngine = make(model, parameters)
            sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
            with engine.attached():
                for rows in engine.pieces(batch):

                    def vectors(logits: Tensor, rows: Any = rows, kind: Any = kind) -> Iterator[Tensor]:
                        return cotangents(scored(logits, rows, model, kind, None), kind)

                    engine.add(rows, vectors, sums)
            results.append(sums)
        one, *others = results
        for other in others:
            for name, value in one.items():
                assert (other[name] - value).abs().max() <= 1e-4 * value.max() + 1e-9, (kind, name)


def test_a_sum_says_how_many_files_count_annotated_labels_alone(tmp_path: Path) -> None:
    model, checkpoint = multi_label(tmp_path)
    examples = make_examples(model, 5)
    _, batches = with_labels(model, examples, MARKS, 3)
    new = Statistics.in_memory(*collect_statistics(model, checkpoint, batches, fisher="expected"))
    old = Statistics.in_memory(  # as files were before annotation was looked at: without a note
        new.header.model_copy(update={"notes": ()}), {name: new.packed(name) for name in new.tensors}
    )
    assert FISHER_OF_ANNOTATED in add([new, new])[0].notes
    notes = add([new, old, new])[0].notes
    assert FISHER_OF_ANNOTATED not in notes
    assert f"{FISHER_OF_ANNOTATED} in 2 of the 3 files that were added" in notes
