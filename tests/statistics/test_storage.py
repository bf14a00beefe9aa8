"""Compressed statistics: exact diagonals, positive semi-definite for certain, and files that older readers refuse."""

from __future__ import annotations

import json
import struct
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
from merganser.statistics.algebra import add
from merganser.statistics.gram_encodings import WIDEST
from merganser.statistics.storage import compress, parse_storage, rounded_within, top_factor
from merganser.tensors import mirror_upper, pack_upper, unpack_upper
from statistics_examples import batched, make_examples, make_inputs, make_statistics

STORAGES = ["bfloat16", "lowrank:1", "lowrank:8", "lowrank:20"]


def stored(storage: str, path: Path, statistics: Statistics | None = None) -> Statistics:
    file = write_statistics(path / "s.safetensors", *compress(statistics or make_statistics(), storage))
    return Statistics.open(file)


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


def test_float32_is_protocol_1_in_the_bytes_of_safetensors(tmp_path: Path) -> None:
    statistics = make_statistics(label="größer")
    header, tensors = compress(statistics, "float32")
    path = write_statistics(tmp_path / "a.safetensors", header, tensors)
    assert header == statistics.header and header.protocol == 1
    text = json.dumps(header.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    everything = {name: statistics.packed(name).contiguous() for name in sorted(statistics.tensors)}
    save_file(everything, tmp_path / "b.safetensors", {"merganser": text})
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


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


def rewritten(path: Path, change: dict[str, torch.Tensor], protocol: int | None = None) -> Path:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["merganser"])
    header["protocol"] = protocol or header["protocol"]
    save_file({**load_file(path), **change}, path, {"merganser": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("factor.layer.0", torch.ones(48, dtype=torch.bfloat16), "rank × width"),
        ("factor.layer.0", torch.ones(4, 47, dtype=torch.bfloat16), "width 47, its mean"),
        ("factor.layer.0", torch.ones(4, 48), "F32, it should be BF16"),
        ("factor.layer.0", torch.ones(49, 48, dtype=torch.bfloat16), "rank × width"),
        ("diagonal.layer.0", torch.ones(47), "width 47, its mean"),
        ("diagonal.layer.0", torch.ones(1, 48), "vector"),
        ("scale.layer.1", torch.ones(2), "one number"),
        ("scale.layer.1", torch.ones(()), "one number"),
        ("covariance.layer.1", torch.ones(299, dtype=torch.bfloat16), "no triangle"),
        ("covariance.layer.0", torch.ones(1176, dtype=torch.bfloat16), "belongs to no layer"),
        ("gram.layer.0", torch.ones(1176), "belongs to no layer"),
        ("scale.layer.0", torch.ones(1), "belongs to no layer"),
    ],
)
def test_malformed_layouts(name: str, tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    path = stored("lowrank:20", tmp_path).path
    assert path is not None
    with pytest.raises(UserError, match=message):
        Statistics.open(rewritten(path, {name: tensor}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("factor.layer.0", 100.0, "factor.layer.0 is not positive semi-definite"),
        ("factor.layer.0", float("nan"), "NaN"),
        ("diagonal.layer.0", -1.0, "negative"),
        ("diagonal.layer.1", 0.0, "not positive semi-definite"),
        ("scale.layer.1", 0.0, "above 0"),
        ("scale.layer.1", 1.5, "above 0 and at most 1"),
        ("covariance.layer.1", float("inf"), "infinite"),
        ("covariance.layer.1", 1000.0, "covariance.layer.1 is not positive semi-definite"),
        ("fisher.layer.1.weight", -1.0, "negative"),
    ],
)
def test_malformed_values(name: str, value: float, message: str, tmp_path: Path) -> None:
    small = stored("lowrank:20", tmp_path)
    assert small.path is not None
    path = rewritten(small.path, {name: torch.full_like(small.packed(name), value)})
    with pytest.raises(UserError, match=message):
        Statistics.open(path).validate()


def test_reading_checks_what_it_reads(tmp_path: Path) -> None:
    small = stored("bfloat16", tmp_path)
    assert small.path is not None
    path = rewritten(small.path, {"scale.layer.0": torch.tensor([7.0])})
    with pytest.raises(StatisticsError, match=r"scale\.layer\.0 is 7"):
        Statistics.open(path).gram("layer.0")


def test_protocol_1_has_none_of_it(tmp_path: Path) -> None:
    path = stored("bfloat16", tmp_path).path
    assert path is not None
    with pytest.raises(UserError, match=r"covariance\.layer\.0 is BF16, which protocol 1 does not have"):
        Statistics.open(rewritten(path, {}, protocol=1))


def test_a_small_file_that_would_be_a_huge_matrix_is_refused_from_its_header(tmp_path: Path) -> None:
    """Rank 1 at a width of a million: 10 MB in the file, 4 TB as a dense matrix."""
    sound = stored("lowrank:1", tmp_path, make_statistics((48,), fisher=False))
    assert sound.path is not None
    width = 10**6
    with safe_open(sound.path, framework="pt") as file:
        metadata = file.metadata()
    sizes = {"factor.layer.0": ("BF16", [1, width], 2), "diagonal.layer.0": ("F32", [width], 4)}
    sizes |= {"mean.layer.0": ("F32", [width], 4), "count.emb": ("I64", [50], 8)}
    entries: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, itemsize) in sizes.items():
        end = at + shape[-1] * itemsize
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    with sound.path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    with pytest.raises(UserError, match=f"4,000 GB; at most {WIDEST}"):
        Statistics.open(sound.path)


def test_protocol_2_stays_readable() -> None:
    """A file written by the version that brought protocol 2; see statistics_examples.py."""
    kept = Statistics.open(Path(__file__).parent / "data" / "protocol-2.safetensors")
    kept.validate()
    assert kept.header.protocol == 2 and kept.header.label == "kept for ever"
    assert kept.inputs == {"layer.0": "factor", "layer.1": "covariance"}
    now = make_statistics((24, 3), rows=200)
    for name in kept.inputs:
        exact = now.gram(name)
        torch.testing.assert_close(kept.gram(name).diagonal(), exact.diagonal())
        assert (kept.gram(name) - exact).norm() < 0.05 * exact.norm()
    assert int(kept.count("emb").sum()) == 200
    assert kept.fisher("layer.0.weight").shape == (5, 24)


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


def test_protocol_3_knows_weights_by_blake3(tmp_path: Path) -> None:
    """One file is kept; compressing and adding keep the kind, and files of both kinds are not added up."""
    kept = Statistics.open(Path(__file__).parent / "data" / "protocol-3.safetensors")
    assert (kept.header.protocol, kept.header.hash_kind, kept.header.label) == (3, "blake3", "kept for ever")
    header, tensors = compress(kept, "bfloat16")
    assert (header.protocol, header.hash_kind) == (3, "blake3")
    again = Statistics.open(write_statistics(tmp_path / "s.safetensors", header, tensors))
    assert again.header == header and set(header.model_dump()) >= {"manifest_blake3", "tensor_blake3"}
    assert add([kept, again])[0].protocol == 3
    older = Statistics.in_memory(
        kept.header.model_copy(update={"hash_kind": "sha256", "protocol": 2}),
        {name: kept.packed(name) for name in kept.tensors},
    )
    assert set(older.header.model_dump()) >= {"manifest_sha256", "tensor_sha256"}
    with pytest.raises(UserError, match=r"manifest blake3 \S+ and sha256"):
        add([kept, older])
    with pytest.raises(UserError, match="protocol 2 knows weights by sha256"):
        Statistics.open(rewritten(tmp_path / "s.safetensors", {}, protocol=2))


def test_protocol_5_has_gradients_of_outputs(tmp_path: Path) -> None:
    """One file is kept; whatever becomes of it keeps them, and older protocols cannot have them."""
    kept = Statistics.open(Path(__file__).parent / "data" / "protocol-5.safetensors")
    kept.validate()
    assert (kept.header.protocol, kept.header.label) == (5, "kept for ever")
    assert (kept.header.kfac, kept.header.kfac_examples) == ("sampled", 6)
    assert list(kept.inputs) == ["layer.0", "layer.0:output", "layer.1", "layer.1:output"]
    assert kept.gram("layer.0:output").shape == (5, 5)
    again = Statistics.open(write_statistics(tmp_path / "s.safetensors", *compress(kept, "bfloat16")))
    assert again.header.layers == kept.header.layers and again.header.protocol == 5
    header, _ = add([kept, again])
    assert header.protocol == 5 and [layer.output_rows for layer in header.layers] == [0, 120, 120]
    with pytest.raises(UserError, match="protocol 4 knows no gradients of outputs"):
        Statistics.open(rewritten(tmp_path / "s.safetensors", {}, protocol=4))


def test_protocol_4_has_convolutions_and_experts(tmp_path: Path) -> None:
    """One file is kept; what it brought is refused in older ones, and must fit the weights."""
    from safetensors.torch import save_file

    path = Path(__file__).parent / "data" / "protocol-4.safetensors"
    kept = Statistics.open(path)
    kept.validate()
    assert (kept.header.protocol, kept.header.label) == (4, "kept for ever")
    expert, convolution = kept.layer("experts", 1), kept.layer("layer.1.weight")
    assert expert is not None and expert.expert == 1 and kept.layer("experts", 0) is kept.layer("experts") is None
    assert convolution is not None and convolution.kind == "convolution"
    again = Statistics.open(write_statistics(tmp_path / "s.safetensors", *compress(kept, "bfloat16")))
    assert again.header.layers == kept.header.layers and again.header.protocol == 4
    assert add([kept, again])[0].protocol == 4
    with pytest.raises(UserError, match="protocol 3 knows no convolutions and no experts"):
        Statistics.open(rewritten(tmp_path / "s.safetensors", {}, protocol=3))
    assert all("expert" not in layer for layer in make_statistics().header.model_dump()["layers"])
    (tmp_path / "config.json").write_text("{}")
    for shape, kernel, problem in (
        ((3, 5, 24), (4, 1, 3), None),
        ((1, 5, 24), (4, 1, 3), "is of expert 1, which experts"),
        ((5, 24), (4, 1, 3), "is of expert 1, which experts"),
        ((3, 24, 5), (4, 1, 3), "gram.layer.0 is of width 24, which does not fit experts"),
        ((3, 5, 24), (4, 3), "gram.layer.1 is of width 3, which does not fit layer.1.weight"),
        ((3, 5, 24), (4, 3, 3), "gram.layer.1 is of width 3, which does not fit layer.1.weight"),
    ):
        weights = {"emb.weight": torch.ones(50, 2), "experts": torch.ones(shape), "layer.1.weight": torch.ones(kernel)}
        save_file(weights, tmp_path / "model.safetensors")
        found = [error.what for error in kept.check_names(open_checkpoint(tmp_path))]
        assert [problem in what for what in found] == ([True] if problem else []), (shape, kernel, found)
