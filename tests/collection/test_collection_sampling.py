"""A sample of wide inputs' tokens: which rows, that their mean is what is collected, and the same on any thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import make_model
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics
from merganser.collection.sampling import Sampling, describe_sampling, shares, usual_width
from merganser.errors import UserError
from merganser.statistics import Statistics
from merganser.tensors import unpack_upper
from statistics_examples import batched, make_examples

WIDE = "bert.encoder.layer.1.output.dense"  # 24 wide, all others 16


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    return model, open_checkpoint(tmp_path / "model")


def inputs_of(model: Any, name: str, batch: dict[str, Tensor]) -> Tensor:
    """The real rows that a layer sees of a batch, in the order of the flattened mask."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0][batch["attention_mask"].bool()].double()


def test_each_row_is_drawn_with_the_probability_of_the_share() -> None:
    drawn = torch.zeros(50)
    for seed in range(2000):
        drawn[Sampling(0.25, seed).draw("layer", (0, 3, 0), 50, some=False)] += 1
    rate = drawn / 2000
    assert (rate - 0.25).abs().max() < 0.05 and (rate.mean() - 0.25).abs() < 0.005


def test_draws_depend_on_layer_place_and_seed_alone() -> None:
    sampling = Sampling(0.5)
    kept = sampling.draw("a", (0, 1, 0), 200, some=False)
    assert torch.equal(kept, Sampling(0.5).draw("a", (0, 1, 0), 200, some=False))
    assert torch.equal(kept, kept.sort().values) and len(kept.unique()) == len(kept)
    others = [("b", (0, 1, 0)), ("a", (1, 1, 0)), ("a", (0, 2, 0)), ("a", (0, 1, 1))]
    assert not any(torch.equal(kept, sampling.draw(*other, 200, some=False)) for other in others)
    assert not torch.equal(kept, Sampling(0.5, seed=1).draw("a", (0, 1, 0), 200, some=False))


def test_one_row_at_least_where_some_are_wanted() -> None:
    sampling = Sampling(1e-9)
    assert len(sampling.draw("a", (0,), 10, some=False)) == 0
    assert len(sampling.draw("a", (0,), 10, some=True)) == 1
    assert len(sampling.draw("a", (0,), 0, some=True)) == 0


def test_wide_is_wider_than_most_inputs() -> None:
    widths = {"a": 8, "b": 8, "c": 32, "d": 4}
    assert usual_width(widths) == 8
    assert shares(widths, Sampling(0.5)) == {"a": 1, "b": 1, "c": 0.5, "d": 1}
    assert shares(widths, None) == dict.fromkeys(widths, 1)
    assert "1 of 4 Gram matrices, of inputs wider than 8" in describe_sampling(widths, Sampling(0.5))
    assert describe_sampling({"a": 8}, Sampling(0.5)) == "no input is wider than 8, so none was sampled"


@pytest.mark.parametrize("buffered", [True, False])
def test_the_mean_is_that_of_the_drawn_rows(saved: Any, monkeypatch: pytest.MonkeyPatch, buffered: bool) -> None:
    if not buffered:
        monkeypatch.setattr("merganser.collection.observer.buffer_rows", lambda _: 0)
    model, checkpoint = saved
    batches = [batched(model, [example], 1)[0] for example in make_examples(model, 12)]
    sampling = Sampling(0.4, seed=5)
    header, tensors = collect_statistics(model, checkpoint, batches, sampling=sampling)
    plain_header, plain = collect_statistics(model, checkpoint, batches)
    rows, taken = [], 0
    for number, batch in enumerate(batches):  # one piece each
        x = inputs_of(model, WIDE, batch)
        kept = sampling.draw(WIDE, (0, number, 0), len(x), some=taken == 0)
        taken += len(kept)
        rows.append(x[kept])
    x = torch.cat(rows)
    truth = x.T @ x / len(x)
    gram = unpack_upper(tensors[f"gram.{WIDE}"]).double()
    assert 0 < len(x) < header.tokens
    assert (gram - truth).abs().max() <= 2e-6 * truth.abs().max()
    assert (tensors[f"mean.{WIDE}"].double() - x.mean(0)).abs().max() <= 2e-6 * x.abs().max()
    assert header.layers == plain_header.layers  # rows: what the mean stands for
    differing = {name for name in plain if not torch.equal(plain[name], tensors[name])}
    wide = [f"bert.encoder.layer.{n}.output.dense" for n in (0, 1)]
    assert differing == {f"{kind}.{name}" for kind in ("gram", "mean") for name in wide}
    assert any("seeded sample of 0.4 of their tokens (seed 5)" in note for note in header.notes)
    Statistics.in_memory(header, tensors).validate()


def test_the_same_sample_on_any_number_of_threads(saved: Any) -> None:
    model, checkpoint = saved
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(
                collect_statistics(
                    model, checkpoint, batched(model, make_examples(model, 20), 4), sampling=Sampling(0.3)
                )[1]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("architecture", ["t5", "gpt2", "llama"])
def test_a_share_that_keeps_next_to_nothing_leaves_no_layer_out(tmp_path: Path, architecture: str) -> None:
    model = make_model(architecture)
    model.save_pretrained(tmp_path)
    batches = batched(model, make_examples(model), 4)
    plain, _ = collect_statistics(model, open_checkpoint(tmp_path), batches)
    few, tensors = collect_statistics(model, open_checkpoint(tmp_path), batches, sampling=Sampling(1e-9))
    assert few.layers == plain.layers
    assert all(bool(torch.isfinite(values.double()).all()) for values in tensors.values())


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(UserError, match=r"--sample-tokens: a share of .* is no sample"):
        Sampling(share)
