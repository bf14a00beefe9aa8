"""Files of every protocol stay readable, have what it brought and no more, and nothing malformed is taken for sound."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merganser.checkpoints import open_checkpoint
from merganser.errors import StatisticsError, UserError
from merganser.statistics import Statistics, write_statistics
from merganser.statistics.algebra import add
from merganser.statistics.gram_encodings import WIDEST
from merganser.statistics.storage import compress
from statistics_examples import make_statistics, stored


def rewritten(path: Path, change: dict[str, torch.Tensor], protocol: int | None = None) -> Path:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["merganser"])
    header["protocol"] = protocol or header["protocol"]
    save_file({**load_file(path), **change}, path, {"merganser": json.dumps(header)})
    return path


def test_float32_is_protocol_1_in_the_bytes_of_safetensors(tmp_path: Path) -> None:
    statistics = make_statistics(label="größer")
    header, tensors = compress(statistics, "float32")
    path = write_statistics(tmp_path / "a.safetensors", header, tensors)
    assert header == statistics.header and header.protocol == 1
    text = json.dumps(header.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    everything = {name: statistics.packed(name).contiguous() for name in sorted(statistics.tensors)}
    save_file(everything, tmp_path / "b.safetensors", {"merganser": text})
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_protocol_1_has_none_of_it(tmp_path: Path) -> None:
    path = stored("bfloat16", tmp_path).path
    assert path is not None
    with pytest.raises(UserError, match=r"covariance\.layer\.0 is BF16, which protocol 1 does not have"):
        Statistics.open(rewritten(path, {}, protocol=1))


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
