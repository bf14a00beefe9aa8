"""Reweighting makes rare labels weigh more (the public code has it upside down), and NaN weighs nothing."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from merganser.errors import DataError, UserError
from merganser.tasks.batches import IGNORED, Feature
from merganser.training.losses import class_weights, make_loss, multi_label_weights

NAN = float("nan")


def features(labels: list) -> list[Feature]:
    return [Feature([1], labels=label) for label in labels]


def test_class_weights_are_the_root_of_inverse_frequency_with_mean_one() -> None:
    weights = class_weights(np.array([0] * 16 + [1] * 4 + [3] * 1), 4)
    root = np.array([1 / 4, 1 / 2, 1.0])  # 16, 4 and 1: the roots of the inverse counts
    np.testing.assert_allclose(weights[[0, 1, 3]], root / root.mean())
    assert weights[0] < weights[1] < weights[3]
    assert weights[2] == 1  # never seen


def test_multi_label_weights_count_positives_among_the_annotated() -> None:
    marks = np.full((8, 4), NAN)
    marks[:, 0] = [1, 1, 1, 1, 0, 0, 0, 0]  # 1/2
    marks[:, 1] = [1, 0, 0, 0, 0, 0, 0, 0]  # 1/8
    marks[:4, 2] = 0  # no positive among 4: counted as one, 1/4
    weights = multi_label_weights(marks)
    root = np.sqrt([2, 8, 4])
    np.testing.assert_allclose(weights[:3], root / root.mean())
    assert weights[3] == 1


def test_weighted_classification_is_the_mean_of_weight_times_cross_entropy() -> None:
    classes = [0, 0, 0, 1]
    loss = make_loss("classification", features(classes), 2, "sqrt-inverse", "toy")
    assert loss is not None
    logits, labels = torch.randn(4, 2), torch.tensor(classes)
    weights = torch.tensor(class_weights(np.array(classes), 2), dtype=torch.float32)
    each = functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss(logits, labels), (weights[labels] * each).mean())


def test_weighted_tokens_leave_the_ignored_out() -> None:
    rows = [[IGNORED, 0, 0, IGNORED], [IGNORED, 0, 1, IGNORED]]
    loss = make_loss("tokens", features(rows), 2, "sqrt-inverse", "toy")
    assert loss is not None
    logits, labels = torch.randn(2, 4, 2), torch.tensor(rows)
    weights = torch.tensor(class_weights(np.array([0, 0, 0, 1]), 2), dtype=torch.float32)
    each = functional.cross_entropy(logits[:, 1:3].reshape(-1, 2), labels[:, 1:3].reshape(-1), reduction="none")
    expected = (weights[labels[:, 1:3].reshape(-1)] * each).mean()
    torch.testing.assert_close(loss(logits, labels), expected)


@pytest.mark.parametrize("reweight", ["none", "sqrt-inverse"])
def test_multi_label_loss_is_the_mean_over_annotated_decisions(reweight: str) -> None:
    marks = [[1.0, NAN, 0.0], [0.0, NAN, 0.0], [0.0, NAN, 1.0], [0.0, NAN, 1.0]]
    loss = make_loss("multi_label", features(marks), 3, reweight, "toy")
    assert loss is not None
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor(marks)
    weights = np.ones(3) if reweight == "none" else multi_label_weights(np.array(marks))
    columns = [0, 2]
    each = functional.binary_cross_entropy_with_logits(logits[:, columns], labels[:, columns], reduction="none")
    value = loss(logits, labels)
    torch.testing.assert_close(value, (each * torch.tensor(weights[columns], dtype=torch.float32)).mean())
    value.backward()
    assert logits.grad is not None and bool((logits.grad[:, 1] == 0).all()) and bool((logits.grad[:, 0] != 0).all())
    if reweight != "none":
        assert weights[0] > weights[2]  # the rarer label


def test_a_batch_without_annotations_has_loss_zero_and_gradients_of_zero() -> None:
    loss = make_loss("multi_label", features([[1.0, NAN]]), 2, "none", "toy")
    assert loss is not None
    logits = torch.randn(2, 2, requires_grad=True)
    value = loss(logits, torch.full((2, 2), NAN))
    value.backward()
    assert value.item() == 0 and logits.grad is not None and bool((logits.grad == 0).all())


def test_refusals() -> None:
    with pytest.raises(DataError, match="no label is annotated"):
        make_loss("multi_label", features([[NAN, NAN]]), 2, "none", "toy")
    for problem in ("regression", "sequence", "next_token"):
        with pytest.raises(UserError, match="no meaning"):
            make_loss(problem, features([1.0]), 1, "sqrt-inverse", "toy")  # type: ignore[arg-type]
    assert make_loss("classification", features([0]), 2, "none", "toy") is None
