"""Compressed statistics: exact diagonals, positive semi-definite for certain, and the same bytes again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import make_model
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics
from merganser.errors import StatisticsError, UserError
from merganser.merging import Contributor, merge
from merganser.methods.sums import augment
from merganser.statistics import Statistics, write_statistics
from merganser.statistics.storage import compress, parse_storage, rounded_within, top_factor
from merganser.tensors import mirror_upper, pack_upper, unpack_upper
from statistics_examples import batched, make_examples, make_inputs, make_statistics, stored

STORAGES = ["bfloat16", "lowrank:1", "lowrank:8", "lowrank:20"]


def smallest(matrix: torch.Tensor) -> float:
    """The smallest eigenvalue of a matrix scaled to a unit diagonal, in float64."""
    wide = matrix.double()
    scale = wide.diagonal().clamp_min(1e-30).rsqrt()
    scale[wide.diagonal() == 0] = 0
    return float(torch.linalg.eigvalsh(wide * scale[:, None] * scale[None, :]).min())


@pytest.mark.parametrize("storage", STORAGES)
def test_what_a_merge_gets(storage: str, tmp_path: Path) -> None:
    exact, small = make_statistics(), stored(storage, tmp_path)
    small.validate()
    assert small.header.protocol == 2 and storage in small.storage
    assert small.header.layers == exact.header.layers
    for name in exact.inputs:
        gram, mean = small.gram(name), small.mean(name)
        assert gram.dtype == torch.float32 and torch.equal(gram, gram.T)
        assert torch.equal(gram.diagonal(), exact.gram(name).diagonal())
        assert torch.equal(mean, exact.mean(name))
        assert smallest(gram) > -1e-6
        assert smallest(augment(gram, mean)) > -1e-6  # what is solved where biases are
    assert torch.equal(small.count("emb"), exact.count("emb"))
    fisher = small.fisher("layer.0.weight")
    assert fisher.dtype == torch.float32
    torch.testing.assert_close(fisher, exact.fisher("layer.0.weight"), rtol=2**-8, atol=0)


def test_sizes(tmp_path: Path) -> None:
    statistics = make_statistics((256,), fisher=False)
    size = {
        storage: stored(storage, tmp_path, statistics).path.stat().st_size  # type: ignore[union-attr]
        for storage in ("float32", "bfloat16", "lowrank:8")
    }
    triangle = 256 * 257 // 2
    assert size["float32"] - size["bfloat16"] == pytest.approx(2 * triangle, abs=2000)
    assert size["lowrank:8"] < 2 * 8 * 256 + 8 * 256 + 50 * 8 + 3000


def test_errors_shrink_with_the_rank(tmp_path: Path) -> None:
    exact = make_statistics().gram("layer.0")
    errors = [
        float((stored(storage, tmp_path).gram("layer.0") - exact).norm() / exact.norm())
        for storage in ("lowrank:1", "lowrank:4", "lowrank:16", "bfloat16")
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2**-8


def test_a_loading_is_no_larger_than_rounding_needs(tmp_path: Path) -> None:
    """Off-diagonals of the rounded covariance are divided by one 1 + τ; the diagonal is exact."""
    exact, small = make_statistics(), stored("bfloat16", tmp_path)
    for name in exact.inputs:
        mean, scale = exact.mean(name).double(), float(small.packed(f"scale.{name}"))
        covariance = exact.gram(name).double() - mean.outer(mean)
        got = small.gram(name).double() - mean.outer(mean)
        off = ~torch.eye(len(mean), dtype=torch.bool)
        varies = covariance.diagonal() > 1e-4 * mean.square()
        off &= varies[:, None] & varies[None, :]
        noise = 1e-6 * exact.gram(name).diagonal().max()
        assert (got - scale * covariance)[off].abs().max() <= 2**-8 * covariance[off].abs().max() + noise
        assert scale > 0.98


def test_rounding_that_breaks_positive_semi_definiteness_is_mended(tmp_path: Path) -> None:
    """Few rows: the Gram is singular, so that rounding makes eigenvalues negative; without the loading they are."""
    statistics = make_statistics((48,), rows=12, fisher=False)
    small = stored("bfloat16", tmp_path, statistics)
    scale = float(small.packed("scale.layer.0"))
    assert 1 / (1 + 2**-4) <= scale < 1
    mean, gram = small.mean("layer.0").double(), small.gram("layer.0").double()
    loaded = gram - mean.outer(mean)
    varies = loaded.diagonal() > 1e-4 * mean.square()
    loaded = loaded[varies][:, varies]
    unloaded = loaded / scale
    unloaded.diagonal().copy_(loaded.diagonal())
    assert smallest(unloaded) < -1e-4 and smallest(loaded) > 0
    small.validate()


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_the_factor_is_that_of_the_largest_eigenpairs(rank: int) -> None:
    x = make_inputs(64, 300, seed=3)
    x -= x.mean(0)
    covariance = x.T @ x / 300
    values, vectors = torch.linalg.eigh(covariance)
    best = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    factor = top_factor(covariance, rank)
    least = (covariance - best).norm()
    assert (covariance - factor.T @ factor).norm() <= 1.01 * least
    assert torch.linalg.eigvalsh(covariance - factor.T @ factor).min() > -1e-9 * values[-1]


def test_a_flat_spectrum_and_one_of_lower_rank_than_asked() -> None:
    flat = torch.eye(40, dtype=torch.float64)
    factor = top_factor(flat, 6)
    assert torch.linalg.eigvalsh(flat - factor.T @ factor).min() > -1e-9
    thin = torch.ones(40, 40, dtype=torch.float64)
    factor = top_factor(thin, 6)
    torch.testing.assert_close(factor.T @ factor, thin, rtol=0, atol=1e-6)
    assert not bool(top_factor(torch.zeros(9, 9, dtype=torch.float64), 2).any())


def test_rounding_leaves_room_for_the_rest() -> None:
    """A diagonal that F explains to the last bit: nearest rounding would exceed it for half of the columns."""
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(7, 500, generator=generator, dtype=torch.float64)
    room = factor.square().sum(0)
    room[:3] = torch.tensor([0.0, -1e-9, 1e-12])
    nearest = factor.to(torch.bfloat16).double().square().sum(0)
    assert 100 < int((nearest > room).sum()) < 400
    rounded = rounded_within(factor, room).double()
    assert bool((rounded.square().sum(0) <= room.clamp_min(0)).all())
    torch.testing.assert_close(rounded[:, 3:], factor[:, 3:], rtol=2**-7, atol=1e-6)


def test_compressed_files_have_the_order_of_safetensors_too(tmp_path: Path) -> None:
    path = stored("bfloat16", tmp_path).path
    assert path is not None
    with safe_open(path, framework="pt") as file:
        save_file(load_file(path), tmp_path / "b.safetensors", file.metadata())
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("storage", STORAGES)
def test_the_same_bytes_again_and_once_compressed_stays(storage: str, tmp_path: Path) -> None:
    first = stored(storage, tmp_path)
    assert first.path is not None
    whole = first.path.read_bytes()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert stored(storage, tmp_path).path.read_bytes() == whole  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(before)
    (tmp_path / "again").mkdir()
    again = stored(storage, tmp_path / "again", Statistics.open(first.path))
    assert set(again.tensors) == set(first.tensors)
    for name, tensor in load_file(first.path).items():
        assert torch.equal(again.packed(name), tensor)


def test_back_to_float32(tmp_path: Path) -> None:
    small = stored("lowrank:8", tmp_path)
    header, tensors = compress(small, "float32")
    assert header.protocol == 1 and "losses stay" in header.notes[-1]
    wide = Statistics.in_memory(header, tensors)
    wide.validate()
    assert torch.equal(wide.gram("layer.0"), small.gram("layer.0"))
    assert wide.storage == "float32"


def test_narrow_inputs_fall_back_and_none_that_pay_are_refused(tmp_path: Path) -> None:
    small = stored("lowrank:20", tmp_path, make_statistics((48, 24)))
    assert small.inputs == {"layer.0": "factor", "layer.1": "covariance"}
    assert small.storage == "bfloat16 and lowrank:20" and "1 narrow input" in small.header.notes[-1]
    with pytest.raises(StatisticsError, match=r"widest is 48.*\n.*at most 24"):
        compress(make_statistics((48, 24)), "lowrank:25")
    compress(make_statistics((48, 24)), "lowrank:24")


def test_no_gram_and_not_positive_semi_definite(tmp_path: Path) -> None:
    sound = make_statistics()
    tensors = {name: sound.packed(name).clone() for name in sound.tensors}
    gram = unpack_upper(tensors["gram.layer.0"])
    gram[3, 4:9] = 50 * gram.diagonal().max()
    tensors["gram.layer.0"] = pack_upper(mirror_upper(gram))
    spoiled = Statistics.in_memory(sound.header, tensors)
    for storage in ("bfloat16", "lowrank:4"):
        with pytest.raises(StatisticsError, match=r"layer\.0.*not positive semi-definite"):
            stored(storage, tmp_path, spoiled)
    assert list(tmp_path.iterdir()) == []


def test_what_no_loading_mends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merganser.statistics.storage._LOADINGS", (0.0, 1e-9))
    with pytest.raises(StatisticsError, match=r"breaks the positive semi-definiteness of gram\.layer\.0"):
        stored("bfloat16", tmp_path, make_statistics((48,), rows=12))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["lowrank:0", "lowrank", "lowrank:-3", "lowrank:2.5", "lowrank:٣", "float16", ""])
def test_no_such_storage(text: str) -> None:
    with pytest.raises(UserError, match="lowrank"):
        parse_storage(text)


def test_only_one_inputs_tensors_are_kept(tmp_path: Path) -> None:
    statistics = make_statistics((32, 32, 32))
    reads: list[str] = []
    plain = statistics._read
    statistics._read = lambda name: (reads.append(name), plain(name))[1]  # type: ignore[method-assign]
    _, tensors = compress(statistics, "lowrank:4")
    assert reads == []
    write_statistics(tmp_path / "s.safetensors", statistics.header.model_copy(update={"protocol": 2}), tensors)
    assert reads.count("gram.layer.1") == 1 and len(tensors._kept) == 1  # type: ignore[attr-defined]


def test_merging_from_compressed_statistics(tmp_path: Path) -> None:
    """Weights and biases by RegMean: close to the merge from float32, closer with more bytes, and not the average."""
    models, files = [], []
    for seed in (1, 2):
        folder = tmp_path / f"model-{seed}"
        model = make_model("bert", seed=seed)
        model.save_pretrained(folder)
        batches = batched(model, make_examples(model, 40, seed), 8)
        models.append(str(folder))
        files.append(
            write_statistics(
                tmp_path / f"{seed}.safetensors", *collect_statistics(model, open_checkpoint(folder), batches)
            )
        )

    def merged(storage: str, method: str = "regmean") -> dict[str, torch.Tensor]:
        copies = []
        for file in files:
            copy = file.with_name(f"{file.stem}-copy.safetensors")
            copies.append(write_statistics(copy, *compress(Statistics.open(file), storage)))
        contributors = [
            Contributor(model=model, statistics=str(copy)) for model, copy in zip(models, copies, strict=True)
        ]
        folder = merge(contributors, tmp_path / "merged", method=method, overwrite=True)
        return load_file(folder / "model.safetensors")

    exact, average = merged("float32"), merged("float32", "simple")
    linear = [name for name in exact if ".encoder." in name and "LayerNorm" not in name]

    def distance(other: dict[str, torch.Tensor]) -> float:
        return float(sum((other[name] - exact[name]).norm() ** 2 for name in linear)) ** 0.5

    errors = [distance(merged(storage)) for storage in ("bfloat16", "lowrank:6", "lowrank:2")]
    assert len(linear) >= 12 and 0 < errors[0] < errors[1] < errors[2] < distance(average)
    assert errors[0] < 0.05 * distance(average)
