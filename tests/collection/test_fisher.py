"""Fisher information against a loop of plain autograd over examples, classes and tokens, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from conftest import ARCHITECTURES
from fisher_oracle import LogLikelihoods, brute_force, build
from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.layers import map_parameters
from merganser.collection import collect_statistics, fisher, per_example, scores
from merganser.errors import DataError, StatisticsError
from merganser.statistics import Statistics
from statistics_examples import Example, batched, make_examples


def check(
    model: nn.Module,
    checkpoint: Any,
    examples: list[Example],
    outcomes: LogLikelihoods,
    kind: Any,
    size: int = 4,
    batches: list[dict[str, Tensor]] | None = None,
) -> Any:
    """The collected Fisher information equals the brute force, for every parameter."""
    batches = batched(model, examples, size) if batches is None else batches
    header, tensors = collect_statistics(model, checkpoint, batches, grams=False, fisher=kind)
    truth = brute_force(model, examples, outcomes)
    names = map_parameters(model, checkpoint)
    largest = max(float(value.max()) for value in truth.values())
    assert header.fisher == kind and header.fisher_examples == len(examples)
    assert set(tensors) == {f"fisher.{names[name]}" for name in truth}
    for name, value in truth.items():
        ours = tensors[f"fisher.{names[name]}"].double()
        assert ours.shape == value.shape
        assert (ours - value).abs().max() <= 1e-4 * value.max() + 1e-9 * largest, name
    return header


def softmax(logits: Tensor, _: Example) -> Iterator[tuple[float, Tensor]]:
    for log_p in torch.log_softmax(logits, -1):
        yield log_p.exp().item(), log_p


def true_label(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
    yield 1.0, torch.log_softmax(logits, -1)[example["labels"]]


def most_probable(logits: Tensor, _: Example) -> Iterator[tuple[float, Tensor]]:
    yield 1.0, torch.log_softmax(logits, -1).max()


def with_labels(examples: list[Example], count: int) -> list[Example]:
    return [{**example, "labels": number % count} for number, example in enumerate(examples)]


CLASSIFIERS = [
    ("bert", transformers.BertForSequenceClassification, {}, True),
    ("roberta", transformers.RobertaForSequenceClassification, {}, True),
    ("distilbert", transformers.DistilBertForSequenceClassification, {}, True),
    ("deberta-v2", transformers.DebertaV2ForSequenceClassification, {}, False),
    ("mpnet", transformers.MPNetForSequenceClassification, {}, False),
    ("gpt2", transformers.GPT2ForSequenceClassification, {"pad_token_id": 0}, True),
    ("llama", transformers.LlamaForSequenceClassification, {"pad_token_id": 0}, True),
]


@pytest.mark.parametrize(("architecture", "model_class", "config", "fast"), CLASSIFIERS)
def test_expected_sums_over_all_classes(
    tmp_path: Path, architecture: str, model_class: Any, config: dict[str, Any], fast: bool
) -> None:
    model, checkpoint = build(tmp_path, architecture, model_class, num_labels=3, **config)
    header = check(model, checkpoint, make_examples(model, 6), softmax, "expected")
    assert fast != any("one example at a time" in note for note in header.notes)


@pytest.mark.parametrize(
    ("architecture", "model_class", "labels"),
    [
        ("deberta-v2", transformers.DebertaV2ForSequenceClassification, 3),
        ("mpnet", transformers.MPNetForTokenClassification, 3),
        ("t5", transformers.T5ForConditionalGeneration, None),  # relative positions, one embedding for all
        ("gpt2", transformers.GPT2LMHeadModel, None),  # tied to its embedding
        ("bert", transformers.BertForMaskedLM, None),  # a bias that is used without its layer
    ],
)
def test_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, model_class: Any, labels: int | None
) -> None:
    """What a GPU is given instead of one example after the other, here on the CPU; two examples at once."""
    monkeypatch.setattr(fisher, "ON_CPU", fisher.ELSEWHERE)
    monkeypatch.setattr(fisher, "MOST_LANES", 1)  # as off the CPU: vmap is not for several threads at once
    model, checkpoint = build(tmp_path, architecture, model_class, **({"num_labels": labels} if labels else {}))
    monkeypatch.setattr(per_example, "COPIES_BYTES", 8 * sum(p.numel() for p in model.parameters()))
    examples = make_examples(model, 7)
    for number, example in enumerate(examples):
        example["input_ids"] = (example["input_ids"] * 5)[: 6 + number % 2]
        example["input_ids"][2] = model.config.pad_token_id or 0  # a token of the text, and no padding
        if architecture == "mpnet":
            example["labels"] = [(t + number) % 4 - 1 if t else 0 for t in range(6 + number % 2)]
            example["labels"] = [-100 if label < 0 else label for label in example["labels"]]
        elif architecture in ("gpt2", "bert"):
            example["labels"] = example["input_ids"]
        elif architecture == "deberta-v2":
            example["labels"] = number % 3

    def likelihood(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
        log_p, y = torch.log_softmax(logits, -1), example["labels"]
        if isinstance(y, int):
            yield 1.0, log_p[y]
        elif architecture == "gpt2":
            yield 1.0, sum(log_p[t, y[t + 1]] for t in range(len(y) - 1))
        else:
            yield 1.0, sum(log_p[t, label] for t, label in enumerate(y) if label >= 0)

    sizes = []
    add = per_example.SideBySide.add

    def counted(self: Any, rows: Any, *rest: Any) -> None:
        sizes.append(len(rows["input_ids"]))
        add(self, rows, *rest)

    monkeypatch.setattr(per_example.SideBySide, "add", counted)
    header = check(model, checkpoint, examples, likelihood, "empirical", 7)
    assert not any("one example at a time" in note for note in header.notes)
    assert max(sizes) == 2


@pytest.mark.parametrize(("kind", "outcomes"), [("empirical", true_label), ("predicted", most_probable)])
@pytest.mark.parametrize("architecture", ["bert", "deberta-v2"])
def test_empirical_and_predicted(tmp_path: Path, architecture: str, kind: str, outcomes: Any) -> None:
    model, checkpoint = build(tmp_path, architecture, ARCHITECTURES[architecture][1], num_labels=3)
    check(model, checkpoint, with_labels(make_examples(model, 6), 3), outcomes, kind)


def test_any_batch_size_and_order(tmp_path: Path) -> None:
    model, checkpoint = build(tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=4)
    examples = make_examples(model, 20)
    for size, order in ((1, 1), (20, 1), (7, -1)):
        check(model, checkpoint, examples, softmax, "expected", batches=batched(model, examples[::order], size))


def test_uniform_predictions_do_carry_information(tmp_path: Path) -> None:
    model, _ = build(tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=3)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    _, tensors = collect_statistics(
        model, checkpoint, batched(model, make_examples(model), 4), grams=False, fisher="expected"
    )
    bias = tensors["fisher.classifier.bias"]  # p (1 − p) with p = 1/3
    assert torch.allclose(bias, torch.full((3,), 2 / 9))


def test_squares_are_not_of_the_batch_sum(tmp_path: Path) -> None:
    """Two examples whose gradients cancel: the square of the sum would be 0."""
    model, checkpoint = build(tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=2)
    one = make_examples(model, 1)[0]
    pair = [{**one, "labels": 0}, {**one, "labels": 1}]
    check(model, checkpoint, pair, true_label, "empirical", 2)


def test_multi_label_with_labels_that_are_not_annotated(tmp_path: Path) -> None:
    model, checkpoint = build(
        tmp_path,
        "bert",
        transformers.BertForSequenceClassification,
        num_labels=3,
        problem_type="multi_label_classification",
    )
    examples = make_examples(model, 5)

    def expected(logits: Tensor, _: Example) -> Iterator[tuple[float, Tensor]]:
        for outcome in range(8):  # all label sets
            y = torch.tensor([outcome >> bit & 1 for bit in range(3)])
            log_p = torch.where(y == 1, nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)).sum()
            yield log_p.exp().item(), log_p

    check(model, checkpoint, examples, expected, "expected")
    labels = [[1.0, 0.0, -1.0], [0.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [0.0] * 3, [1.0] * 3]

    def empirical(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
        y = torch.tensor(example["truth"])
        log_p = torch.where(y == 1, nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits))
        yield 1.0, log_p[y >= 0].sum()

    batch = batched(model, examples, 5)
    batch[0]["labels"] = torch.tensor(labels)
    known = [{**example, "truth": truth} for example, truth in zip(examples, labels, strict=True)]
    header, tensors = collect_statistics(model, checkpoint, batch, grams=False, fisher="empirical")
    plain = [{"input_ids": example["input_ids"], "truth": example["truth"]} for example in known]
    truth = brute_force(_IgnoringTruth(model), plain, empirical)
    for name, value in truth.items():
        ours = tensors[f"fisher.{name.removeprefix('inner.')}"].double()
        assert (ours - value).abs().max() <= 1e-4 * value.max() + 1e-10, name
    assert header.fisher == "empirical"


class _IgnoringTruth(nn.Module):
    """A model that does not mind what the oracle keeps in its examples."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids: Tensor, truth: Tensor) -> Any:
        return self.inner(input_ids=input_ids)


def test_regression(tmp_path: Path) -> None:
    model, checkpoint = build(tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=1)
    examples = [{**e, "labels": 0.3 * n} for n, e in enumerate(make_examples(model, 5))]

    def gradient(logits: Tensor, _: Example) -> Iterator[tuple[float, Tensor]]:
        yield 1.0, logits[0]  # E[(y − f)²] = 1 times (∂f)²

    def residual(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
        yield 1.0, -0.5 * (example["labels"] - logits[0]) ** 2

    check(model, checkpoint, examples, gradient, "expected")
    check(model, checkpoint, examples, residual, "empirical")
    with pytest.raises(StatisticsError, match="zero for regression"):
        collect_statistics(model, checkpoint, batched(model, examples, 4), fisher="predicted")


def test_token_classification_leaves_ignored_tokens_out(tmp_path: Path) -> None:
    model, checkpoint = build(tmp_path, "bert", transformers.BertForTokenClassification, num_labels=3)
    examples = make_examples(model, 5)
    for number, example in enumerate(examples):
        example["labels"] = [-100 if (t + number) % 3 == 0 else t % 3 for t in range(len(example["input_ids"]))]

    def empirical(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
        log_p = torch.log_softmax(logits, -1)
        yield 1.0, sum(log_p[t, y] for t, y in enumerate(example["labels"]) if y >= 0)

    check(model, checkpoint, examples, empirical, "empirical")


def test_samples_over_tokens_have_the_right_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """E[v vᵀ] is diag(p) − p pᵀ within a token, and 0 between tokens: so E[(Σ_t s_t)²] = Σ_t E[s_t²]."""
    monkeypatch.setattr(scores, "SAMPLES", 20_000)
    logits = torch.tensor([[[1.0, 0.0, -1.0], [0.5, 0.5, 2.0], [9.0, 9.0, 9.0]]])
    where = torch.tensor([[True, True, False]])
    outputs = scores.Scored(logits, "tokens", None, where, (123,))
    vectors = torch.stack(list(scores.cotangents(outputs, "expected"))).reshape(20_000, 9).double()
    p = torch.softmax(logits[0].double(), -1)
    truth = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p[:2]), torch.zeros(3, 3))
    assert (vectors.T @ vectors - truth).abs().max() < 0.01
    assert bool((vectors[:, 6:] == 0).all())  # a token that is not scored


def test_samples_belong_to_the_example_not_to_its_place(tmp_path: Path) -> None:
    model, checkpoint = build(tmp_path, "bert", transformers.BertForTokenClassification, num_labels=5)
    examples = make_examples(model, 8)
    results = [
        collect_statistics(model, checkpoint, batched(model, examples[::order], size), fisher="expected")
        for size, order in ((8, 1), (3, -1), (1, 1))
    ]
    first = results[0][1]
    assert any("sampled label sequences" in note for note in results[0][0].notes)
    for _, tensors in results[1:]:
        for name, value in first.items():
            if name.startswith("fisher."):
                assert (tensors[name] - value).abs().max() <= 1e-3 * value.max() + 1e-9, name


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
def test_causal_language_models_predict_the_next_token(tmp_path: Path, architecture: str) -> None:
    model, checkpoint = build(tmp_path, architecture, ARCHITECTURES[architecture][1])
    examples = make_examples(model, 4)

    def next_token(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
        log_p = torch.log_softmax(logits, -1)
        ids = example["input_ids"]
        yield 1.0, sum(log_p[t, ids[t + 1]] for t in range(len(ids) - 1))

    check(model, checkpoint, [{**e, "labels": e["input_ids"]} for e in examples], next_token, "empirical")
    _, tensors = collect_statistics(model, checkpoint, batched(model, examples, 4), grams=False, fisher="expected")
    assert all(bool(value.any()) for value in tensors.values())


def test_sequence_to_sequence(tmp_path: Path) -> None:
    model, checkpoint = build(tmp_path, "t5", transformers.T5ForConditionalGeneration)

    def target(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
        log_p = torch.log_softmax(logits, -1)
        yield 1.0, sum(log_p[t, y] for t, y in enumerate(example["labels"]))

    check(model, checkpoint, make_examples(model, 4), target, "empirical")


def test_grams_and_fisher_in_one_pass_add_up(tmp_path: Path) -> None:
    from merganser.statistics.algebra import add

    model, checkpoint = build(tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=3)
    examples = make_examples(model, 11)

    def collected(part: list[Example]) -> Statistics:
        return Statistics.in_memory(
            *collect_statistics(model, checkpoint, batched(model, part, 3), fisher="expected", label="x")
        )

    whole, (header, tensors) = collected(examples), add([collected(examples[:4]), collected(examples[4:])])
    assert header == whole.header
    for name in whole.tensors:
        truth, ours = whole.packed(name), tensors[name]
        assert ours.dtype == truth.dtype
        rounding = 1e-12 if name.endswith("key.bias") else 0.0  # whose gradient is zero but for rounding
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max() + rounding, name


def test_a_limited_number_of_examples(tmp_path: Path) -> None:
    model, checkpoint = build(tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=3)
    examples = make_examples(model, 10)
    header, tensors = collect_statistics(
        model, checkpoint, batched(model, examples, 4), fisher="expected", fisher_examples=6
    )
    assert (header.examples, header.fisher_examples) == (10, 6)
    _, first = collect_statistics(model, checkpoint, batched(model, examples[:6], 4), grams=False, fisher="expected")
    assert torch.allclose(tensors["fisher.classifier.weight"], first["fisher.classifier.weight"], rtol=1e-4)


def test_softmax_factor_is_exact_even_for_certain_predictions() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0], [200.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 300.0], [0.0] * 4])
    columns = scores.softmax_factor(logits)
    assert columns.shape == (3, 4, 4)
    p = torch.softmax(logits.double(), -1)
    truth = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert torch.allclose(torch.einsum("kbi,kbj->bij", columns, columns), truth, atol=1e-12)


def test_what_cannot_be(tmp_path: Path) -> None:
    model, checkpoint = build(tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=3)
    examples = make_examples(model, 4)
    with pytest.raises(DataError, match="needs labels"):
        collect_statistics(model, checkpoint, batched(model, examples, 4), fisher="empirical")
    with pytest.raises(DataError, match=r"label 7 lies outside the model's label space 0 … 2"):
        wrong = [{**example, "labels": 7} for example in examples]
        collect_statistics(model, checkpoint, batched(model, wrong, 4), fisher="empirical")
    with pytest.raises(StatisticsError, match="BertModel has no logits"):
        collect_statistics(model.bert, checkpoint, batched(model, examples, 4), fisher="expected")


def test_gradients_that_are_not_finite_name_the_parameter(tmp_path: Path) -> None:
    model, _ = build(tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=3)
    with torch.no_grad():
        model.classifier.weight[1, 2] = float("inf")
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(StatisticsError, match=r"the gradient of [\w.]+ is infinite or NaN"):
        collect_statistics(model, checkpoint, batched(model, make_examples(model), 4), grams=False, fisher="expected")
