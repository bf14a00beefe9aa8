"""Diagonal Fisher information against the definition: one example, one label, one backward pass at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import VOCABULARY, make_model
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics

ENCODERS = ["bert", "roberta", "distilbert", "deberta-v2", "mpnet"]


def examples(seed: int = 1, labels: int = 3, count: int = 5) -> list[dict[str, torch.Tensor]]:
    """Unpadded examples of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(3, VOCABULARY, (1, 4 + number), generator=generator)
        label = torch.randint(0, labels, (1,), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label})
    return found


def padded(rows: list[dict[str, torch.Tensor]], pad: int = 1) -> dict[str, torch.Tensor]:
    longest = max(row["input_ids"].shape[1] for row in rows)

    def fill(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, longest - tensor.shape[1]), value=value)

    return {
        "input_ids": torch.cat([fill(row["input_ids"], pad) for row in rows]),
        "attention_mask": torch.cat([fill(row["attention_mask"], 0) for row in rows]),
        "labels": torch.cat([row["labels"] for row in rows]),
    }


def scores(logits: torch.Tensor, label: torch.Tensor, kind: str, problem: str) -> Iterator[tuple[float, torch.Tensor]]:
    """(probability, log-likelihood) of each label that the kind of Fisher information asks for."""
    if problem == "regression":
        yield 1.0, logits.sum()  # unit variance: E[(y − f)²] = 1, so the expectation is (∂f/∂θ)²
        return
    if problem == "multi_label_classification":
        for column in range(logits.shape[-1]):
            p = torch.sigmoid(logits[column])
            yield float(p.detach()), torch.nn.functional.logsigmoid(logits[column])
            yield float(1 - p.detach()), torch.nn.functional.logsigmoid(-logits[column])
        return
    log = logits.log_softmax(-1)
    chance = log.detach().exp()
    if kind == "empirical":
        yield 1.0, log[label]
    elif kind == "predicted":
        yield 1.0, log[log.argmax()]
    else:
        for column in range(len(log)):
            yield float(chance[column]), log[column]


def brute_force(model: Any, rows: list[dict[str, torch.Tensor]], kind: str, problem: str) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named.items()}
    for row in rows:
        logits = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits[0]
        for probability, log_likelihood in scores(logits, int(row["labels"][0]), kind, problem):
            grads = torch.autograd.grad(log_likelihood, list(named.values()), retain_graph=True, allow_unused=True)
            for name, grad in zip(named, grads, strict=True):
                if grad is not None:
                    sums[name] += probability * grad.double().square()
    return {name: total / len(rows) for name, total in sums.items()}


def check(model: Any, tmp_path: Path, kind: str, problem: str, rows: list[dict[str, torch.Tensor]]) -> None:
    model.save_pretrained(tmp_path / "model")
    pad = model.config.pad_token_id or 0
    batches = [padded(rows[:3], pad), padded(rows[3:], pad)]
    if problem == "multi_label_classification":
        for batch in batches:
            batch["labels"] = torch.zeros(len(batch["input_ids"]), model.config.num_labels)
    elif problem == "regression":
        for batch in batches:
            batch["labels"] = batch["labels"].float()
    header, tensors = collect_statistics(model, open_checkpoint(tmp_path / "model"), batches, grams=False, fisher=kind)
    assert header.fisher == kind and header.fisher_examples == len(rows)
    expected = brute_force(model, rows, kind, problem)
    reached = 0
    for name, oracle in expected.items():
        found = tensors[f"fisher.{name}"].double()
        torch.testing.assert_close(found, oracle, rtol=2e-3, atol=1e-7 + 1e-5 * float(oracle.max()))
        reached += int(bool((oracle > 0).any()))
    assert reached > 0.8 * len(expected)


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("kind", ["expected", "empirical", "predicted"])
def test_classification(tmp_path: Path, architecture: str, kind: str) -> None:
    model = make_model(architecture, num_labels=3)
    check(model, tmp_path, kind, "single_label_classification", examples())


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems(tmp_path: Path, problem: str) -> None:
    model = make_model("bert", num_labels=1 if problem == "regression" else 4, problem_type=problem)
    check(model, tmp_path, "expected", problem, examples())


def test_uniform_predictions_are_information_too(tmp_path: Path) -> None:
    """Public code has a 'soft' Fisher whose gradient vanishes there: Σ p ∂log p = 0 is not Σ p (∂log p)²."""
    model = make_model("bert", num_labels=3)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    check_uniform(model, tmp_path)


def check_uniform(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    _, tensors = collect_statistics(model, checkpoint, [padded(examples(), 0)], grams=False, fisher="expected")
    oracle = brute_force(model, examples(), "expected", "single_label_classification")
    torch.testing.assert_close(tensors["fisher.classifier.bias"], torch.full((3,), 2 / 9))
    found = tensors["fisher.classifier.weight"].double()
    torch.testing.assert_close(found, oracle["classifier.weight"], rtol=1e-3, atol=1e-6)
    assert bool((found > 0).all())


def test_it_is_per_example_and_no_square_of_a_sum(tmp_path: Path) -> None:
    """The same example twice must not change the mean; the square of a batch-summed gradient would double it."""
    model = make_model("bert", num_labels=3)
    model.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    one = examples(count=1)
    results = [
        collect_statistics(model, checkpoint, [padded(one * n, 0)], grams=False, fisher="empirical")[1] for n in (1, 4)
    ]
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-8)
