"""Covariances of output gradients against plain autograd: one example and one label at a time, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fisher_oracle import LogLikelihoods, build
from merganser.checkpoints import open_checkpoint
from merganser.cli import main
from merganser.collection import collect, collect_statistics, kfac
from merganser.errors import StatisticsError, UserError
from merganser.statistics import Statistics, write_statistics
from merganser.statistics.algebra import add, scale
from merganser.statistics.storage import compress
from merganser.tensors import unpack_upper
from statistics_examples import Example, alone, batched, make_examples


def brute_force(model: nn.Module, examples: list[Example], outcomes: LogLikelihoods) -> dict[str, Tensor]:
    """By module Σ_y p(y|x) g gᵀ summed over tokens and examples, over the number of tokens; no padding anywhere."""
    model = model.double()
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    kept: list[tuple[str, Tensor]] = []

    def keep(name: str, output: Tensor) -> None:
        output.retain_grad()
        kept.append((name, output))

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    for example in examples:
        batch = alone(model, example)
        labels = batch.pop("labels", None)
        if model.config.is_encoder_decoder:
            batch["labels"] = labels
        kept = []
        logits = model(**batch).logits[0]
        lengths = {1, len(example["input_ids"]), *([labels.shape[1]] if model.config.is_encoder_decoder else [])}
        kept = [(name, output) for name, output in kept if output.shape[-2] in lengths]  # not relative positions
        for name, output in kept:
            rows[name] = rows.get(name, 0) + output.numel() // output.shape[-1]
        for probability, log_likelihood in outcomes(logits, example):
            for _, output in kept:
                output.grad = None
            log_likelihood.backward(retain_graph=True)
            for name, output in kept:
                g = torch.zeros_like(output) if output.grad is None else output.grad
                g = g.reshape(-1, g.shape[-1])
                sums[name] = sums.get(name, 0) + probability * g.T @ g
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    model.float()
    return {name: total / rows[name] for name, total in sums.items()}


def collected(model: nn.Module, checkpoint: Any, batches: list[dict[str, Tensor]], **options: Any) -> Statistics:
    return Statistics.in_memory(*collect_statistics(model, checkpoint, batches, **options))


def check(statistics: Statistics, truth: dict[str, Tensor], least: int = 4) -> None:
    """Every layer's covariance equals the brute force; at least so many layers have one."""
    found = {layer.module: layer.output for layer in statistics.header.layers if layer.output}
    largest = max(float(value.abs().max()) for value in truth.values())
    assert len(found) >= least
    for module, key in found.items():
        ours, theirs = statistics.gram(key).double(), truth[module]
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-9 * largest, module
    statistics.validate()


def softmax(logits: Tensor, _: Example) -> Iterator[tuple[float, Tensor]]:
    for log_p in torch.log_softmax(logits, -1):
        yield log_p.exp().item(), log_p


def next_tokens(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
    log_p, ids = torch.log_softmax(logits, -1), example["input_ids"]
    yield 1.0, sum(log_p[t, ids[t + 1]] for t in range(len(ids) - 1))


def own_labels(logits: Tensor, example: Example) -> Iterator[tuple[float, Tensor]]:
    log_p = torch.log_softmax(logits, -1)
    yield 1.0, sum(log_p[t, label] for t, label in enumerate(example["labels"]) if label >= 0)


CLASSIFIERS = [
    ("bert", transformers.BertForSequenceClassification, {}),
    ("roberta", transformers.RobertaForSequenceClassification, {}),
    ("distilbert", transformers.DistilBertForSequenceClassification, {}),
    ("deberta-v2", transformers.DebertaV2ForSequenceClassification, {}),
    ("gpt2", transformers.GPT2ForSequenceClassification, {"pad_token_id": 0}),
    ("llama", transformers.LlamaForSequenceClassification, {"pad_token_id": 0}),
]


@pytest.mark.parametrize(("architecture", "model_class", "config"), CLASSIFIERS)
def test_expected_is_the_sum_over_all_classes(
    tmp_path: Path, architecture: str, model_class: Any, config: dict[str, Any]
) -> None:
    model, checkpoint = build(tmp_path, architecture, model_class, num_labels=3, **config)
    examples = make_examples(model, 6)
    truth = brute_force(model, examples, softmax)
    for batches in (batched(model, examples, 4), batched(model, examples[::-1], 1)):
        statistics = collected(model, checkpoint, batches, kfac="auto")
        assert (statistics.header.kfac, statistics.header.kfac_examples) == ("expected", 6)
        assert statistics.header.protocol == 5
        check(statistics, truth)


@pytest.mark.parametrize(
    ("architecture", "model_class", "config", "outcomes"),
    [
        ("llama", transformers.LlamaForCausalLM, {}, next_tokens),
        ("t5", transformers.T5ForConditionalGeneration, {}, own_labels),
        ("bert", transformers.BertForTokenClassification, {"num_labels": 3}, own_labels),
    ],
)
def test_labels_of_sequences(
    tmp_path: Path, architecture: str, model_class: Any, config: dict[str, Any], outcomes: Any
) -> None:
    """A decoder's layers have the decoder's tokens, and a label of a token counts in every layer below it."""
    model, checkpoint = build(tmp_path, architecture, model_class, **config)
    examples = make_examples(model, 5)
    for number, example in enumerate(examples):
        if architecture == "bert":
            example["labels"] = [(t + number) % 4 - 1 for t in range(len(example["input_ids"]))]
            example["labels"] = [-100 if label < 0 else label for label in example["labels"]]
    truth = brute_force(model, examples, outcomes)
    check(collected(model, checkpoint, batched(model, examples, 5), kfac="empirical"), truth)
    with pytest.raises(StatisticsError, match="labels of a sequence"):
        collected(model, checkpoint, batched(model, examples, 5), kfac="expected")


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_expected_of_other_problems(tmp_path: Path, problem: str) -> None:
    """All 2³ label sets with their probabilities; a Gaussian of variance 1, whose score has variance 1."""
    model, checkpoint = build(
        tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=3, problem_type=problem
    )

    def outcomes(logits: Tensor, _: Example) -> Iterator[tuple[float, Tensor]]:
        if problem == "regression":
            yield from ((1.0, output) for output in logits)
            return
        for labels in torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3):
            log_p = -nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum")
            yield log_p.exp().item(), log_p

    examples = make_examples(model, 4)
    check(
        collected(model, checkpoint, batched(model, examples, 4), kfac="expected"),
        brute_force(model, examples, outcomes),
    )


def test_drawn_labels_are_unbiased(tmp_path: Path) -> None:
    """Of many examples the mean over one label each comes near the expectation, and does not depend on batches."""
    model, checkpoint = build(tmp_path, "bert", transformers.BertForSequenceClassification, num_labels=3)
    examples = make_examples(model, 600)
    exact, drawn = (
        collected(model, checkpoint, batched(model, examples, 100), kfac=kind) for kind in ("expected", "sampled")
    )
    again = collected(model, checkpoint, batched(model, examples[::-1], 7), kfac="sampled")
    assert drawn.header.kfac == "sampled"
    distances = []
    for key in filter(None, (layer.output for layer in exact.header.layers)):
        one, two, three = (statistics.gram(key) for statistics in (exact, drawn, again))
        distances.append(float((one - two).norm() / one.norm()))
        assert (two - three).norm() <= 1e-5 * two.norm()
    assert min(distances) > 1e-4 and sum(distances) / len(distances) < 0.1


def test_a_label_a_token_of_a_large_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head itself is left out where its covariance would be too large, and the reason is said."""
    model, checkpoint = build(tmp_path, "llama", transformers.LlamaForCausalLM)
    head = model.config.vocab_size
    widest = max(m.out_features for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    monkeypatch.setattr(kfac, "WIDEST_OUTPUT", widest)
    assert head > widest
    examples = make_examples(model, 8)
    one, two = (collected(model, checkpoint, batched(model, examples, size), kfac="auto") for size in (8, 3))
    found = {layer.module: layer.output for layer in one.header.layers}
    assert one.header.kfac == "sampled" and found["lm_head"] is None
    assert sum(key is not None for key in found.values()) == len(found) - 2  # the head and the embedding
    assert any("lm_head" in note and f"more than {widest} outputs" in note for note in one.header.notes)
    for key in filter(None, found.values()):
        assert (one.gram(key) - two.gram(key)).norm() <= 1e-4 * one.gram(key).norm()


def test_the_same_bytes_on_any_number_of_threads(tmp_path: Path) -> None:
    model, checkpoint = build(tmp_path / "model", "bert", transformers.BertForSequenceClassification, num_labels=4)
    batches = batched(model, make_examples(model, 40), 4)
    files = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        path = write_statistics(tmp_path / str(threads), *collect_statistics(model, checkpoint, batches, kfac="auto"))
        files.append(path.read_bytes())
    torch.set_num_threads(before)
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Statistics]:
    folder = tmp_path_factory.mktemp("parts")
    model, checkpoint = build(folder, "bert", transformers.BertForSequenceClassification, num_labels=3)
    examples = make_examples(model, 10)
    ranges = {"first": slice(4), "rest": slice(4, None), "all": slice(None)}
    found = {
        name: collected(model, checkpoint, batched(model, examples[part], 4), kfac="auto")
        for name, part in ranges.items()
    }
    found["without"] = collected(model, checkpoint, batched(model, examples, 4))
    found["some"] = collected(model, checkpoint, batched(model, examples, 4), kfac="auto", fisher_examples=4)
    return found


def distance(one: Statistics, two: Statistics) -> float:
    keys = [layer.output for layer in one.header.layers if layer.output]
    return max(float((one.gram(key) - two.gram(key)).norm() / one.gram(key).norm()) for key in keys)


def test_parts_add_up(parts: dict[str, Statistics]) -> None:
    whole = Statistics.in_memory(*add([parts["first"], parts["rest"]]))
    assert whole.header.protocol == 5 and whole.header.kfac_examples == 10
    assert [layer.output_rows for layer in whole.header.layers] == [
        layer.output_rows for layer in parts["all"].header.layers
    ]
    assert distance(parts["all"], whole) < 1e-5
    assert distance(parts["all"], parts["first"]) > 1e-2
    twice = Statistics.in_memory(*scale(parts["first"], 2))
    uneven = Statistics.in_memory(*add([twice, parts["rest"]]))
    assert distance(Statistics.in_memory(*add([parts["first"], parts["first"], parts["rest"]])), uneven) < 1e-6
    with pytest.raises(StatisticsError, match="not hold the same statistics"):
        add([parts["first"], parts["without"]])


def test_of_the_first_examples_alone(parts: dict[str, Statistics]) -> None:
    some, first = parts["some"], parts["first"]
    assert (some.header.examples, some.header.kfac_examples) == (10, 4)
    assert distance(first, some) < 1e-5


@pytest.mark.parametrize(("storage", "most"), [("bfloat16", 0.01), ("lowrank:4", 0.6), ("float32", 0.0)])
def test_fewer_bytes(parts: dict[str, Statistics], tmp_path: Path, storage: str, most: float) -> None:
    write_statistics(tmp_path / "s.safetensors", *compress(parts["all"], storage))
    small = Statistics.open(tmp_path / "s.safetensors")
    small.validate()
    assert small.header.protocol == 5 and distance(parts["all"], small) <= most


def test_nothing_changes_without(parts: dict[str, Statistics]) -> None:
    header = parts["without"].header.model_dump(mode="json")
    assert header["protocol"] == 3 and not {"kfac", "kfac_examples"} & header.keys()
    assert all("output" not in layer and "output_rows" not in layer for layer in header["layers"])


def test_statistics_of_other_shapes_are_refused(parts: dict[str, Statistics]) -> None:
    statistics = parts["first"]
    tensors = {name: statistics.packed(name) for name in statistics.tensors}
    older = statistics.header.model_copy(update={"protocol": 4})
    with pytest.raises(UserError, match="protocol 4 knows no gradients of outputs"):
        Statistics.in_memory(older, tensors)
    key = next(layer.output for layer in statistics.header.layers if layer.output)
    del tensors[f"gram.{key}"]
    with pytest.raises(UserError, match=f"gram.{key} is missing"):
        Statistics.in_memory(statistics.header, tensors)


def test_no_covariance_of_anything_is_found(parts: dict[str, Statistics]) -> None:
    statistics = parts["first"]
    tensors = {name: statistics.packed(name).clone() for name in statistics.tensors}
    key = next(layer.output for layer in statistics.header.layers if layer.output)
    matrix = unpack_upper(tensors[f"gram.{key}"])
    tensors[f"gram.{key}"][1] = 3 * matrix.diagonal().max()
    with pytest.raises(StatisticsError, match=f"gram.{key} is not positive semi-definite"):
        Statistics.in_memory(statistics.header, tensors).validate()


def test_the_verb(save_ready: Any, tmp_path: Path) -> None:
    """Shards, of which the second has no gradients; what has no head, and what cannot be, is said before any work."""
    folder = save_ready("m", seed=3)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(f'{{"text": "the movie was {word}"}}\n' for word in ("good", "bad", "not bad", "food")))
    options = ["--kfac", "--fisher-examples", "2", "--shard-examples", "2"]
    with pytest.raises(SystemExit) as ended:
        main(["collect", str(folder), "--data", str(data), *options])
    assert ended.value.code == 0
    statistics = Statistics.open(folder)
    assert (statistics.header.kfac, statistics.header.kfac_examples, statistics.header.examples) == ("expected", 2, 4)
    layers = [layer for layer in statistics.header.layers if layer.kind == "linear"]
    assert layers and all(
        layer.output and 0 < layer.output_rows < layer.rows for layer in layers if "layer" in layer.module
    )
    assert statistics.check_binding(open_checkpoint(folder)) == []
    for options, message in (
        ({"grams": False, "fisher": "expected"}, "beside the Gram matrices"),
        ({"kfac": "exact"}, "unknown kind of K-FAC"),
        ({"task": "feature-extraction"}, "K-FAC needs a head"),
        ({"max_memory": "2GB"}, "and so does K-FAC"),
    ):
        with pytest.raises(UserError, match=message):
            collect(folder, data, overwrite=True, **{"kfac": "auto", **options})
