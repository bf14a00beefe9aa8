"""From a model's outputs to the vectors that, times the Jacobian and squared, give Fisher information.

The diagonal Fisher information of one example x is E_y[(∂ log p(y|x)/∂θ)²], squared per example and only
then averaged (Matena & Raffel 2022, "Merging Models with Fisher-Weighted Averaging"). With J = ∂ logits/∂θ
and s(y) = ∂ log p(y|x)/∂ logits it is the diagonal of Jᵀ C J with C = E_y[s sᵀ], known in closed form:

====================  ==================================  =============================================
problem               C for ``expected``                  s for ``empirical`` (``predicted``: y = argmax)
====================  ==================================  =============================================
classification        diag(p) − p pᵀ                      onehot(y) − p
multi_label           diag(p (1 − p))                     y − p; 0 for labels that are not annotated
regression            identity (Gaussian, variance 1)     y − f
====================  ==================================  =============================================

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
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from merganser.errors import DataError, StatisticsError
from merganser.statistics.format import FisherKind
from merganser.statistics.masks import IGNORED, BatchMasks, batch_masks

Problem = Literal["classification", "multi_label", "regression", "tokens", "next_token", "sequence"]
PROBLEMS: tuple[str, ...] = get_args(Problem)
SAMPLES = 4  # label sequences drawn for each example, where the expectation is not computed exactly

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
        where: (B, T), the tokens that are scored; None for one output an example.
        seeds: one an example.
    """

    logits: Tensor
    problem: Problem
    labels: Tensor | None
    where: Tensor | None
    seeds: tuple[int, ...]


def scored(
    logits: Tensor, batch: Mapping[str, Any], model: nn.Module, kind: FisherKind, problem: Problem | None
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
        raise StatisticsError(
            "Fisher information of the predictions is zero for regression: y − f(x) is 0 at y = f(x)",
            mend="use expected or empirical",
        )
    where = None
    if problem in ("tokens", "next_token", "sequence"):
        labels, where = _align(problem, labels, batch, masks)
    if kind == "empirical":
        _check_labels(labels, problem, logits, where)
    seeds = _seeds(batch, masks) if problem in ("tokens", "next_token", "sequence") else ()
    return Scored(logits.detach(), problem, labels, where, seeds)


def cotangents(outputs: Scored, kind: FisherKind) -> Iterator[Tensor]:
    """Vectors v, shaped like the logits: Σ_v (Jᵀv)² of each example is its diagonal Fisher information."""
    if kind == "expected":
        yield from _expected(outputs)
    else:
        yield _score(outputs, _argmax(outputs) if kind == "predicted" else outputs.labels)


def _expected(outputs: Scored) -> Iterator[Tensor]:
    logits = outputs.logits
    if outputs.where is not None:
        for labels in _samples(outputs):
            yield _score(outputs, labels) / SAMPLES**0.5
    elif outputs.problem == "classification":
        for column in softmax_factor(logits):
            yield column.to(logits.dtype)
    else:
        p = torch.sigmoid(logits.double())
        deviation = (p * (1 - p)).sqrt() if outputs.problem == "multi_label" else torch.ones_like(p)
        for label in range(logits.shape[-1]):
            v = torch.zeros_like(logits)
            v[:, label] = deviation[:, label].to(logits.dtype)
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
    logits = outputs.logits
    if labels is None:  # _check_labels has refused this already
        raise DataError("the batches have no labels")
    if outputs.problem == "regression":
        return labels.reshape(logits.shape).to(logits.dtype) - logits
    if outputs.problem == "multi_label":
        known = torch.isfinite(labels.to(torch.float64)) & (labels >= 0)
        return torch.where(known, labels.to(logits.dtype) - torch.sigmoid(logits), torch.zeros_like(logits))
    known = labels != IGNORED if outputs.where is None else outputs.where
    chosen = torch.where(known, labels, torch.zeros_like(labels))
    score = -torch.softmax(logits, -1)
    score.scatter_add_(-1, chosen.unsqueeze(-1), torch.ones_like(score[..., :1]))
    return score * known.unsqueeze(-1)


def _argmax(outputs: Scored) -> Tensor:
    if outputs.problem == "multi_label":
        return (outputs.logits > 0).to(outputs.logits.dtype)
    return outputs.logits.argmax(-1)


def _samples(outputs: Scored) -> list[Tensor]:
    logits, where = outputs.logits, outputs.where
    if where is None:
        raise ValueError("only sequences are sampled")
    drawn = torch.zeros(SAMPLES, *where.shape, dtype=torch.int64, device=logits.device)
    for example, seed in enumerate(outputs.seeds):
        generator = torch.Generator().manual_seed(seed)
        p = torch.softmax(logits[example][where[example]].double(), -1).cpu()
        if len(p):
            labels = torch.multinomial(p, SAMPLES, replacement=True, generator=generator)
            drawn[:, example, where[example]] = labels.T.to(logits.device)
    return list(drawn)


def _problem(logits: Tensor, labels: Tensor | None, model: nn.Module) -> Problem:
    config = getattr(model, "config", None)
    if logits.ndim == 3:
        if getattr(config, "is_encoder_decoder", False):
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
    configured = _CONFIGURED.get(str(getattr(config, "problem_type", None)))
    if configured:
        return configured
    if logits.shape[1] == 1:
        return "regression"
    floating = labels is not None and labels.ndim == 2 and labels.is_floating_point()
    return "multi_label" if floating else "classification"


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
        where = where & (labels != IGNORED)
    return labels, where


def _check_labels(labels: Tensor | None, problem: Problem, logits: Tensor, where: Tensor | None) -> None:
    if labels is None:
        raise DataError(
            "empirical Fisher information needs labels, and the batches have none",
            mend="name the label column, or use expected",
        )
    if problem in ("multi_label", "regression"):
        return
    known = labels[where] if where is not None else labels[labels != IGNORED]
    classes = logits.shape[-1]
    if known.numel() and (int(known.min()) < 0 or int(known.max()) >= classes):
        wrong = int(known.max()) if int(known.max()) >= classes else int(known.min())
        raise DataError(
            f"label {wrong} lies outside the model's label space 0 … {classes - 1}",
            mend="use a model with this label, or correct the labels",
        )


def _seeds(batch: Mapping[str, Any], masks: BatchMasks) -> tuple[int, ...]:
    """A seed for each example, made of its real tokens."""
    ids = batch["input_ids"]
    rows = [
        ids[i][masks.tokens.mask[i]].to(torch.int64).cpu().numpy().tobytes() for i in range(masks.examples)
    ]
    return tuple(int.from_bytes(hashlib.sha256(row).digest()[:7], "big") for row in rows)
