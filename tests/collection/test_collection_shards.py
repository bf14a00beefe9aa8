"""Shards added are the whole: exact sums, one order, whatever they are read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_model
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics
from merganser.collection.collector import Collector
from merganser.collection.shards import ShardSums
from merganser.errors import StatisticsError
from merganser.statistics import Statistics, write_statistics
from statistics_examples import batched, make_examples


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    return model, open_checkpoint(tmp_path / "model"), make_examples(model, 20)


def shards_of(saved: Any, **options: Any) -> list[Statistics]:
    """Of 8, 8 and 4 examples."""
    model, checkpoint, examples = saved
    with Collector(model, checkpoint, **options) as collector:
        return [
            Statistics.in_memory(*collector.collect(batched(model, examples[at : at + 8], 4), shard=at // 8))
            for at in (0, 8, 16)
        ]


def summed(parts: list[Statistics]) -> tuple[Any, dict[str, torch.Tensor]]:
    sums = ShardSums()
    for part in parts:
        sums.add(part)
    return sums.result()


def test_each_shard_is_a_collection_of_its_own(saved: Any) -> None:
    model, checkpoint, examples = saved
    for at, shard in zip((0, 8, 16), shards_of(saved, fisher="expected"), strict=True):
        header, tensors = collect_statistics(
            model, checkpoint, batched(model, examples[at : at + 8], 4), fisher="expected"
        )
        assert shard.header == header
        assert all(torch.equal(shard.packed(name), values) for name, values in tensors.items())


def test_the_sum_is_the_collection_of_the_whole(saved: Any) -> None:
    model, checkpoint, examples = saved
    header, tensors = summed(shards_of(saved, fisher="expected"))
    whole_header, whole = collect_statistics(model, checkpoint, batched(model, examples, 4), fisher="expected")
    assert header == whole_header and set(tensors) == set(whole)
    for name, values in whole.items():
        assert tensors[name].dtype == values.dtype
        torch.testing.assert_close(tensors[name], values, rtol=1e-4, atol=1e-6 * float(values.abs().max()))
    Statistics.in_memory(header, tensors).validate()


def test_sums_are_weighted_in_float64(saved: Any) -> None:
    parts = shards_of(saved)
    _, tensors = summed(parts)
    name = next(n for n in tensors if n.startswith("gram."))
    layer = next(la for la in parts[0].header.layers if f"gram.{la.input}" == name)
    rows = [next(x.rows for x in p.header.layers if x.module == layer.module) for p in parts]
    total = sum(part.packed(name).double() * n for part, n in zip(parts, rows, strict=True)) / sum(rows)
    assert torch.equal(tensors[name], total.float())


def test_a_single_shard_stays_as_it_is_to_the_bit(saved: Any) -> None:
    part = shards_of(saved, fisher="expected")[0]
    header, tensors = summed([part])
    assert header == part.header
    assert all(torch.equal(tensors[name], part.packed(name)) for name in part.tensors)


def test_files_and_memory_give_the_same(saved: Any, tmp_path: Path) -> None:
    parts = shards_of(saved)
    files = []
    for number, part in enumerate(parts):
        path = tmp_path / f"{number}.safetensors"
        write_statistics(path, part.header, {name: part.packed(name) for name in part.tensors})
        files.append(Statistics.open(path))
    one, two = summed(parts), summed(files)
    assert one[0] == two[0] and all(torch.equal(one[1][name], two[1][name]) for name in one[1])


def test_fisher_of_some_shards_only(saved: Any) -> None:
    model, checkpoint, examples = saved
    with Collector(model, checkpoint, fisher="expected") as collector:
        parts = [
            Statistics.in_memory(*collector.collect(batched(model, examples[at : at + 8], 4), fisher_examples=left))
            for at, left in ((0, 10), (8, 2), (16, 0))
        ]
    header, tensors = summed(parts)
    assert [part.header.fisher_examples for part in parts] == [8, 2, 0] and parts[2].header.fisher is None
    assert header.fisher == "expected" and header.fisher_examples == 10 and header.examples == 20
    _, first = collect_statistics(model, checkpoint, batched(model, examples[:10], 2), grams=False, fisher="expected")
    name = "fisher.classifier.weight"
    torch.testing.assert_close(tensors[name], first[name], rtol=1e-4, atol=1e-9)


def test_shards_of_other_weights_are_refused(saved: Any, tmp_path: Path) -> None:
    other = make_model(seed=1)
    other.save_pretrained(tmp_path / "other")
    sums = ShardSums()
    sums.add(shards_of(saved)[0])
    stranger = collect_statistics(other, open_checkpoint(tmp_path / "other"), batched(other, saved[2], 4))
    with pytest.raises(StatisticsError, match="the shards are of different weights"):
        sums.add(Statistics.in_memory(*stranger))


def test_no_shard_is_no_result() -> None:
    with pytest.raises(StatisticsError, match="there are no shards to add"):
        ShardSums().result()
