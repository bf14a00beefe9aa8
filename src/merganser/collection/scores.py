"""From a model's outputs to the vectors that, times the Jacobian and squared, give Fisher information.

The diagonal Fisher information of one example x is E_y[(∂ log p(y|x)/∂θ)²], squared per example and only
then averaged (Matena & Raffel 2022, "Merging Models with Fisher-Weighted Averaging"). With J = ∂ logits/∂θ
and s(y) = ∂ log p(y|x)/∂ logits it is the diagonal of Jᵀ C J with C = E_y[s sᵀ], known in closed form:

====================  ==================================  =============================================
problem               C for ``expected``                  s for ``empirical`` (``predicted``: y = argmax)
====================  ==================================  =============================================
classification        diag(p) − p pᵀ                      onehot(y) − p
multi_label           diag(p (1 − p))                     y − p
regression            identity (Gaussian, variance 1)     y − f
====================  ==================================  =============================================

p(y|x) is over the labels that are annotated, as the loss is: an output whose label is not annotated for an example
(:func:`annotated`) has a row and a column of zeros in C, and 0 in s. Otherwise outputs that were never trained, whose
p is near ½, would hold most of the information.

Any factor L with L Lᵀ = C gives it exactly, as the sum of (Jᵀ L_k)² over columns k: one backward pass a
column, one fewer than there are classes. Over sequences (token classification, language models) log p(y|x)
is the sum over scored tokens; cross terms between tokens vanish in the expectation, which is estimated from
:data:`SAMPLES` label sequences drawn from the model, seeded by the example's own tokens: the same for any
batch size and order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merganser.collection.masks import BatchMasks, batch_masks, configured
from merganser.errors import DataError, StatisticsError
from merganser.statistics.format import FISHER_OF_ALL, FISHER_OF_ANNOTATED, FisherKind, KfacKind
from merganser.tasks.base import Problem
from merganser.tasks.batches import IGNORED

SEQUENCES = ("tokens", "next_token", "sequence")  # problems with a label for each token
SAMPLES = 4  # label sequences drawn for each example, where the expectation is not computed exactly
#: Whose labels: the expectation over the model's own, one drawn of them, those of the data, the most probable one.
ScoreKind = FisherKind | KfacKind

_CONFIGURED: dict[str, Problem] = {
    "single_label_classification": "classification",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


@dataclass(frozen=True)
class Scored:
    """Outputs of a batch, and what the kinds of Fisher information need to know about it.

    Attributes:
        logits: (B, C), or (B, T, C) for sequences; detached.
        problem: how labels are distributed given logits.
        labels: (B,), (B, C) or (B, T), aligned with the logits; None if not given.
        annotated: bool, what enters the information: examples (B,) in classification, outputs (B, C) in multi-label
            and regression, tokens (B, T) in sequences. Without labels everything but padding.
        seeds: one an example, where labels are drawn.
    """

    logits: Tensor
    problem: Problem
    labels: Tensor | None
    annotated: Tensor
    seeds: tuple[int, ...]


def scored(
    logits: Tensor, batch: Mapping[str, Any], model: nn.Module, kind: ScoreKind, problem: Problem | None
) -> Scored:
    """Find out what kind of problem a model's logits solve; labels are aligned and checked.

    Raises:
        DataError: labels are missing where they are needed, or lie outside the model's label space.
        StatisticsError: the kind of Fisher information has no meaning for the problem.
    """
    masks = batch_masks(batch, model)
    labels = batch.get("labels")
    problem = problem or _problem(logits, labels, model)
    if kind == "predicted" and problem == "regression":
        what = "Fisher information of the predictions is zero for regression: y − f(x) is 0 at y = f(x)"
        raise StatisticsError(what, mend="use expected or empirical")
    drawn = problem in SEQUENCES or kind == "sampled"
    if drawn and batch.get("input_ids") is None:
        what = "labels are drawn by seeds made of an example's tokens, and the batches have no input_ids"
        raise StatisticsError(what, mend="collect without --fisher over sequences, and without --kfac sampled")
    if problem in SEQUENCES:
        labels, known = _align(problem, labels, batch, masks)
    else:
        labels = None if labels is None else _shaped(problem, labels, logits)
        shape = logits.shape[:1] if problem == "classification" else logits.shape
        known = annotated(labels, problem) if labels is not None else logits.new_ones(shape, dtype=torch.bool)
    if kind == "empirical":
        _check_labels(labels, problem, logits, known)
    seeds = _seeds(batch, masks) if drawn else ()
    return Scored(logits.detach(), problem, labels, known, seeds)


def annotated(labels: Tensor, problem: Problem | None) -> Tensor:
    """Which labels are annotated: bool, in the labels' shape.

    Not annotated is what the losses leave out: NaN and negative numbers in multi-label, NaN in regression, -100 in
    all else.
    """
    if problem == "regression":
        return torch.isfinite(labels)
    if problem == "multi_label":
        return torch.isfinite(labels) & (labels >= 0)
    return labels != IGNORED


def annotated_examples(batch: Mapping[str, Any], model: nn.Module, problem: Problem | None) -> Tensor | None:
    """Which examples of a batch have an annotated label: bool (B,). None: there are no labels, so all count."""
    labels = batch.get("labels")
    if labels is None:
        return None
    known = annotated(labels, problem or _labelled_problem(labels, model))
    return known.reshape(known.shape[0], -1).any(1)


def describe_left_out(examples: int) -> str:
    """The note of examples without an annotated label, for the header."""
    return f"left out, without an annotated label: {examples} example{'s' if examples > 1 else ''}"


def describe_scores(outputs: Scored, kind: FisherKind) -> Iterator[str]:
    """What a reader of the Fisher information should know, for the header."""
    if kind == "expected" and outputs.problem in SEQUENCES:
        yield f"Fisher information over sequences: {SAMPLES} sampled label sequences an example"
    if outputs.problem == "multi_label":
        yield FISHER_OF_ANNOTATED if outputs.labels is not None else FISHER_OF_ALL


def cotangents(outputs: Scored, kind: ScoreKind) -> Iterator[Tensor]:
    """Vectors v, shaped like the logits: Σ_v (Jᵀv)² of each example is its diagonal Fisher information."""
    if not bool(outputs.annotated.any()):
        return
    if kind == "expected":
        yield from _expected(outputs)
    elif kind == "sampled":
        yield _score(outputs, _drawn(outputs))
    else:
        yield _score(outputs, _argmax(outputs) if kind == "predicted" else outputs.labels)


def _expected(outputs: Scored) -> Iterator[Tensor]:
    logits, known = outputs.logits, outputs.annotated
    if outputs.problem in SEQUENCES:
        for labels in _samples(outputs, SAMPLES):
            yield _score(outputs, labels) / SAMPLES**0.5
    elif outputs.problem == "classification":
        for column in softmax_factor(logits):
            yield column.to(logits.dtype) * known.unsqueeze(-1)
    else:
        p = torch.sigmoid(logits.double())
        deviation = (p * (1 - p)).sqrt() if outputs.problem == "multi_label" else torch.ones_like(p)
        deviation = (deviation * known).to(logits.dtype)
        for label in known.any(0).nonzero().flatten().tolist():
            v = torch.zeros_like(logits)
            v[:, label] = deviation[:, label]
            yield v


def softmax_factor(logits: Tensor) -> Tensor:
    """(C − 1, B, C) float64: the columns of L with L Lᵀ = diag(p) − p pᵀ, p the softmax of ``logits`` (B, C).

    The Cholesky factor of a multinomial covariance in closed form (Tanabe & Sagae 1992): with q_k the sum of
    p_j over j > k, L_kk = √(p_k q_k / q_{k−1}) and L_ik = −p_i √(p_k / (q_k q_{k−1})) for i > k.
    """
    p = torch.softmax(logits.double(), -1)
    tails = p.flip(-1).cumsum(-1).flip(-1)  # tails[k] = q_{k−1}
    classes = p.shape[-1]
    tiny = torch.finfo(torch.float64).tiny
    columns = p.new_zeros(max(classes - 1, 0), *p.shape)
    for k in range(classes - 1):
        before, after = tails[:, k].clamp_min(tiny), tails[:, k + 1]
        columns[k, :, k] = (p[:, k] * (after / before)).sqrt()
        within = p[:, k + 1 :] / after.clamp_min(tiny)[:, None]  # at most 1
        columns[k, :, k + 1 :] = -within * (p[:, k] * (after / before)).sqrt()[:, None]
    return columns


def _score(outputs: Scored, labels: Tensor | None) -> Tensor:
    """∂ log p(labels)/∂ logits of each example."""
    logits, known = outputs.logits, outputs.annotated
    if labels is None:  # _check_labels has refused this already
        raise DataError("the batches have no labels")
    if outputs.problem in ("regression", "multi_label"):
        mean = torch.sigmoid(logits) if outputs.problem == "multi_label" else logits
        return torch.where(known, labels.to(logits.dtype) - mean, torch.zeros_like(logits))
    chosen = torch.where(known, labels, torch.zeros_like(labels))
    score = -torch.softmax(logits, -1)
    score.scatter_add_(-1, chosen.unsqueeze(-1), torch.ones_like(score[..., :1]))
    return score * known.unsqueeze(-1)


def _argmax(outputs: Scored) -> Tensor:
    if outputs.problem == "multi_label":
        return (outputs.logits > 0).to(outputs.logits.dtype)
    return outputs.logits.argmax(-1)


def _drawn(outputs: Scored) -> Tensor:
    """Labels from the model's own distribution, shaped as the labels of the problem; each example has its own seed."""
    if outputs.problem in SEQUENCES:
        return _samples(outputs, 1)[0]
    found = []
    for row, seed in zip(outputs.logits.double().cpu(), outputs.seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        if outputs.problem == "classification":
            found.append(torch.multinomial(torch.softmax(row, -1), 1, generator=generator)[0])
        elif outputs.problem == "multi_label":
            found.append(
                (torch.rand(row.shape, generator=generator, dtype=row.dtype) < torch.sigmoid(row)).to(row.dtype)
            )
        else:
            found.append(row + torch.randn(row.shape, generator=generator, dtype=row.dtype))
    return torch.stack(found).to(outputs.logits.device)


def _samples(outputs: Scored, count: int) -> list[Tensor]:
    """``count`` sequences of labels (B, T) from the model's own distribution."""
    logits, where = outputs.logits, outputs.annotated
    drawn = torch.zeros(count, *where.shape, dtype=torch.int64, device=logits.device)
    for example, seed in enumerate(outputs.seeds):
        generator = torch.Generator().manual_seed(seed)
        p = torch.softmax(logits[example][where[example]].double(), -1).cpu()
        if len(p):
            labels = torch.multinomial(p, count, replacement=True, generator=generator)
            drawn[:, example, where[example]] = labels.T.to(logits.device)
    return list(drawn)


def _problem(logits: Tensor, labels: Tensor | None, model: nn.Module) -> Problem:
    if logits.ndim == 3:
        if configured(model, "is_encoder_decoder"):
            return "sequence"
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return "next_token" if causal else "tokens"
    if logits.ndim != 2:
        raise StatisticsError(
            f"Fisher information needs logits of shape (batch, labels) or (batch, tokens, labels), not "
            f"{list(logits.shape)}",
            mend="collect without --fisher",
        )
    told = _told(model)
    if told:
        return told
    if logits.shape[1] == 1:
        return "regression"
    floating = labels is not None and labels.ndim == 2 and labels.is_floating_point()
    return "multi_label" if floating else "classification"


def _told(model: nn.Module) -> Problem | None:
    return _CONFIGURED.get(configured(model, "problem_type"))


def _labelled_problem(labels: Tensor, model: nn.Module) -> Problem | None:
    """The problem as configuration or labels tell it, without logits; None: one in which labels are integers."""
    told = _told(model)
    if told or not labels.is_floating_point():
        return told
    return "multi_label" if labels.ndim == 2 and labels.shape[1] > 1 else "regression"


def _align(
    problem: Problem, labels: Tensor | None, batch: Mapping[str, Any], masks: BatchMasks
) -> tuple[Tensor | None, Tensor]:
    """Labels and scored tokens (B, T), such that logits at t are scored against labels at t."""
    side = masks.decoder if problem == "sequence" and masks.decoder is not None else masks.tokens
    where = side.mask
    if problem == "next_token":
        targets = batch["input_ids"] if labels is None else labels
        labels = torch.full_like(targets, IGNORED)
        labels[:, :-1] = targets[:, 1:]
        follows = torch.zeros_like(where)
        follows[:, :-1] = where[:, 1:]
        where = where & follows
    if labels is not None:
        where = where & annotated(labels, problem)
    return labels, where


def _shaped(problem: Problem, labels: Tensor, logits: Tensor) -> Tensor:
    """Labels in the shape that belongs to logits (B, C): one an example in classification, else one an output."""
    shape = logits.shape[:1] if problem == "classification" else logits.shape
    if labels.numel() != shape.numel():
        what = f"labels of shape {list(labels.shape)} do not fit outputs of shape {list(logits.shape)} ({problem})"
        mend = "give one label for each example, or for each output of each example, as the problem has them"
        raise DataError(what, mend=mend)
    return labels.reshape(shape)


def _check_labels(labels: Tensor | None, problem: Problem, logits: Tensor, known: Tensor) -> None:
    if labels is None:
        mend = "name the label column, or use expected"
        raise DataError("empirical Fisher information needs labels, and the batches have none", mend=mend)
    if problem in ("multi_label", "regression"):
        return
    given, classes = labels[known], logits.shape[-1]
    if not given.numel():
        return
    lowest, highest = int(given.min()), int(given.max())
    wrong = highest if highest >= classes else lowest
    if not 0 <= wrong < classes:
        what = f"label {wrong} lies outside the model's label space 0 … {classes - 1}"
        raise DataError(what, mend="use a model with this label, or correct the labels")


def _seeds(batch: Mapping[str, Any], masks: BatchMasks) -> tuple[int, ...]:
    """A seed for each example, made of its real tokens."""
    ids = batch["input_ids"]
    rows = [ids[i][masks.tokens.mask[i]].to(torch.int64).cpu().numpy().tobytes() for i in range(masks.examples)]
    return tuple(int.from_bytes(hashlib.sha256(row).digest()[:7], "big") for row in rows)
