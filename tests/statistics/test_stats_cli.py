"""``merganser stats``: add, scale, compress and diff on files, streamed, whole or not at all."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from merganser.cli import cli
from merganser.errors import FileError, StatisticsError, UserError
from merganser.statistics import Statistics, write_statistics
from merganser.statistics.algebra import add, scale
from merganser.statistics.comparison import distances, header_differences
from merganser.statistics.storage import compress
from merganser.tensors import pack_upper
from statistics_examples import make_inputs, make_statistics


def written(path: Path, statistics: Statistics) -> Path:
    return write_statistics(path, statistics.header, {n: statistics.packed(n) for n in statistics.tensors})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return (
        written(tmp_path / "a.safetensors", make_statistics(rows=400, seed=1, label="first")),
        written(tmp_path / "b.safetensors", make_statistics(rows=100, seed=2, label="second")),
    )


def run(*arguments: object, fails: type[BaseException] | None = None) -> Result:
    result = CliRunner().invoke(cli, ["stats", *map(str, arguments)])
    if fails is None:
        assert result.exception is None, result.output
    else:
        assert isinstance(result.exception, fails), result.output
    return result


def test_add_is_collecting_together(files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    assert run("add", *files, "-o", output).stdout.strip() == str(output)
    total = Statistics.open(output)
    total.validate()
    assert total.header.label == "first; second" and total.header.protocol == 1
    assert total.header.layers[1].rows == 500 and total.header.fisher_examples == 50
    x = torch.cat([make_inputs(48, 400, 100), make_inputs(48, 100, 200)])
    torch.testing.assert_close(total.gram("layer.0").double(), x.T @ x / 500, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.mean("layer.0").double(), x.mean(0), rtol=1e-5, atol=1e-6)
    assert int(total.count("emb").sum()) == 500


def test_parts_may_be_stored_in_different_ways(files: tuple[Path, Path], tmp_path: Path) -> None:
    run("compress", files[1], "--storage", "lowrank:12", "-o", tmp_path / "small.safetensors")
    run("add", files[0], tmp_path / "small.safetensors", "-o", tmp_path / "c.safetensors")
    run("add", *files, "--storage", "bfloat16", "-o", tmp_path / "d.safetensors")
    exact = add([Statistics.open(file) for file in files])[1]
    mixed, rounded = Statistics.open(tmp_path / "c.safetensors"), Statistics.open(tmp_path / "d.safetensors")
    assert mixed.storage == "float32" and rounded.storage == "bfloat16"
    gram = exact["gram.layer.0"]
    assert (pack_upper(mixed.gram("layer.0")) - gram).norm() < 0.1 * gram.norm()
    assert (pack_upper(rounded.gram("layer.0")) - gram).norm() < 0.01 * gram.norm()


def test_scale_by_a_whole_number_is_adding_so_often(files: tuple[Path, Path]) -> None:
    a, b = (Statistics.open(file) for file in files)
    heavy = Statistics.in_memory(*scale(b, 3))
    once, often = add([a, heavy]), add([a, b, b, b])
    assert [layer.rows for layer in once[0].layers] == [layer.rows for layer in often[0].layers]
    assert once[0].fisher_examples == often[0].fisher_examples
    assert set(once[1]) == set(often[1])
    for name, tensor in often[1].items():
        torch.testing.assert_close(once[1][name], tensor, rtol=1e-6, atol=1e-7)


def test_scale_leaves_averages_and_never_loses_a_token(files: tuple[Path, Path], tmp_path: Path) -> None:
    run("scale", files[0], "0.001", "-o", tmp_path / "c.safetensors")
    before, after = Statistics.open(files[0]), Statistics.open(tmp_path / "c.safetensors")
    assert torch.equal(before.gram("layer.0"), after.gram("layer.0"))
    assert torch.equal(before.count("emb") > 0, after.count("emb") > 0)
    assert after.header.layers[1].rows == 1 and after.header.examples == before.header.examples
    assert "times 0.001" in after.header.notes[-1]
    for factor in ("0", "inf", "nan", "1e300"):
        run("scale", files[0], factor, "-o", tmp_path / "d.safetensors", fails=StatisticsError)
    run("scale", files[0], "-o", tmp_path / "d.safetensors", "--", "-1", fails=StatisticsError)
    assert not (tmp_path / "d.safetensors").exists()


def test_in_place(files: tuple[Path, Path]) -> None:
    exact = Statistics.open(files[0]).gram("layer.0")
    run("compress", files[0], "--storage", "bfloat16", "-o", files[0], fails=FileError)
    run("compress", files[0], "--storage", "bfloat16", "-o", files[0], "--overwrite")
    run("add", *files, "-o", files[1], "--overwrite")
    small, total = (Statistics.open(file) for file in files)
    assert small.storage == "bfloat16" and total.header.layers[1].rows == 500
    assert (small.gram("layer.0") - exact).norm() < 0.01 * exact.norm()
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_mistakes_are_found_before_work_and_together(files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "absent" / "c.safetensors"
    result = run("add", files[0], tmp_path / "no-file", "-o", output, fails=UserError)
    assert "no such statistics file" in str(result.exception) and "folder" in str(result.exception)
    run("compress", files[0], "--storage", "lowrank:0", "-o", tmp_path / "c", fails=UserError)
    run("compress", files[0], "--storage", "lowrank:400", "-o", tmp_path / "c", fails=StatisticsError)
    run("add", "-o", tmp_path / "c", fails=SystemExit)
    other = make_statistics((48, 23))
    written(tmp_path / "other.safetensors", other)
    run("add", files[0], tmp_path / "other.safetensors", "-o", tmp_path / "c", fails=StatisticsError)
    assert not (tmp_path / "c").exists()


def test_no_room(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merganser.files.space.free_bytes", lambda target: 100)
    result = run("add", *files, "-o", tmp_path / "c.safetensors", fails=FileError)
    assert "are free" in str(result.exception)


def test_too_little_memory(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merganser.merging.memory.available_bytes", lambda: 48**2 * 25)
    output = ("-o", tmp_path / "c.safetensors")
    for arguments in (["compress", files[0], "--storage", "bfloat16", *output], ["diff", *files]):
        result = run(*arguments, fails=StatisticsError)
        assert "48 inputs" in str(result.exception) and "are available" in str(result.exception)
    run("add", *files, "--storage", "bfloat16", *output, fails=StatisticsError)
    run("add", *files, *output)


def test_a_file_that_changes_under_the_work(files: tuple[Path, Path], tmp_path: Path) -> None:
    statistics = Statistics.open(files[0])
    header, tensors = compress(statistics, "bfloat16")
    iterator = iter(tensors)
    _ = tensors[next(iterator)]
    written(files[0], make_statistics(rows=300, seed=5))
    with pytest.raises(StatisticsError, match="changed"):
        write_statistics(tmp_path / "c.safetensors", header, tensors)
    assert not (tmp_path / "c.safetensors").exists()


def test_diff(files: tuple[Path, Path], tmp_path: Path) -> None:
    same = json.loads(run("diff", files[0], files[0], "--json").stdout)
    assert same["same_weights"] and same["header"] == {}
    assert {row["relative"] for row in same["distances"]} == {0.0}
    run("compress", files[0], "--storage", "lowrank:4", "-o", tmp_path / "c.safetensors")
    found = json.loads(run("diff", files[0], tmp_path / "c.safetensors", "--json").stdout)
    assert set(found["header"]) == {"storage", "protocol", "notes"}
    by_name = {(row["kind"], row["name"]): row["relative"] for row in found["distances"]}
    a, c = (Statistics.open(files[0]).gram("layer.0"), Statistics.open(tmp_path / "c.safetensors").gram("layer.0"))
    assert by_name["gram", "layer.0"] == pytest.approx(float((a - c).norm() / a.norm()), rel=1e-4)
    assert by_name["mean", "layer.0"] == by_name["count", "emb"] == 0.0
    assert 0 < by_name["fisher", "layer.0.weight"] < 2**-8
    shown = run("diff", *files).stdout
    assert "weights: the same" in shown and "label" in shown and "layer.1" in shown


def test_diff_of_other_layers_and_weights() -> None:
    a, b = make_statistics((48, 24)), make_statistics((48, 23, 8), fisher=False)
    hashes = {**b.header.tensor_hashes, "layer.0.weight": "2" * 64}
    b = Statistics.in_memory(
        b.header.model_copy(update={"manifest_hash": "3" * 64, "tensor_hashes": hashes}),
        {name: b.packed(name) for name in b.tensors},
    )
    found = {(d.kind, d.name): d for d in distances(a, b)}
    assert found["gram", "layer.1"].relative is None and found["gram", "layer.1"].only == "both"
    assert found["gram", "layer.2"].only == "B" and found["fisher", "layer.0.weight"].only == "A"
    headers = header_differences(a, b)
    assert headers["tensor_sha256"] == ("2 of 4 weight tensors differ", "layer.0.weight, layer.2.weight")
    assert {"manifest_sha256", "layers", "fisher"} <= set(headers)


def test_no_more_than_one_inputs_tensors_live_at_once() -> None:
    statistics = make_statistics([32] * 12, fisher=False)
    _, tensors = add([statistics, statistics])
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    for _, tensor in tensors.items():
        alive.append(weakref.ref(tensor))
        del tensor
        most = max(most, sum(reference() is not None for reference in alive))
    assert len(alive) == 25 and most <= 2
