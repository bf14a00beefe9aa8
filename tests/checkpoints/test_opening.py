"""Opening folders: what is read, what is refused, and in what words."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_model
from merganser.checkpoints import PickledWeights, open_checkpoint
from merganser.errors import CheckpointError


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7),
        "c": torch.randn(4, 2, 2).to(torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    assert torch.equal(checkpoint.read("a", 1, 3), tensors["a"][1:3])
    assert torch.equal(checkpoint.read("c", 2), tensors["c"][2:])


def test_hashes_do_not_depend_on_sharding_but_on_every_bit(save_model, tmp_path: Path) -> None:
    whole = open_checkpoint(save_model("whole"))
    make_model("bert").save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    sharded = open_checkpoint(tmp_path / "sharded")
    assert len({info.file for info in sharded.tensors.values()}) > 1
    assert sharded.manifest_sha256() == whole.manifest_sha256()
    state = load_file(whole.path / "model.safetensors")
    state["classifier.bias"][0] = torch.nextafter(state["classifier.bias"][0], torch.tensor(9.0))
    save_file(state, whole.path / "model.safetensors")
    assert open_checkpoint(whole.path).manifest_sha256() != sharded.manifest_sha256()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not even a header"),
        (struct.pack("<Q", 1 << 60) + b"{}", "truncated or damaged"),
        (struct.pack("<Q", 4) + b"{}{}", "unreadable"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
    ],
)
def test_damaged_headers(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value) and "to mend" in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": entry([2], 0, 8, "Q7")}, "unsupported dtype 'Q7'"),
        ({"x": entry([3], 0, 8)}, "does not fill"),
        ({"x": entry([-2], 0, 8)}, "malformed"),
        ({"x": entry([2], 8, 0)}, "malformed"),
        ({"x": {"dtype": "F32"}}, "malformed"),
        ({"x": entry([2], 0, 8), "y": entry([2], 4, 12)}, "overlap"),
        ({"x": entry([1 << 40], 0, 1 << 42)}, "truncated safetensors file: tensor 'x'"),
    ],
)
def test_malformed_entries(tmp_path: Path, header: dict[str, object], message: str) -> None:
    write_header(tmp_path / "model.safetensors", header, bytes(16))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_truncated_file_names_the_tensor(save_model) -> None:
    folder = save_model("cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated safetensors file: tensor '"):
        open_checkpoint(folder)


def test_missing_things(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights here"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="a model is a folder"):
        open_checkpoint(tmp_path / "file")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "empty" / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(2)}, tmp_path / "empty" / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"shard two\.safetensors is missing"):
        open_checkpoint(tmp_path / "empty")
    save_file({"c": torch.zeros(2)}, tmp_path / "empty" / "two.safetensors")
    with pytest.raises(CheckpointError, match="no shard holds: b"):
        open_checkpoint(tmp_path / "empty")


def test_adapters_are_named_as_such(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        open_checkpoint(tmp_path)


def test_pickles_need_the_flag_and_run_no_code(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "tied": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_checkpoint(tmp_path)
    assert torch.equal(open_checkpoint(tmp_path, allow_pickle=True).read("a"), torch.ones(3))

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "owned",)  # type: ignore[return-value]

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        open_checkpoint(tmp_path, allow_pickle=True)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_the_conversion_that_is_offered_for_pickles_works(tmp_path: Path, sharded: bool) -> None:
    """Also with tensors that share storage or are transposed, which safetensors alone refuses."""
    shared = torch.arange(6.0).reshape(2, 3)
    shards = [{"a": shared, "tied": shared}, {"turned": shared.T, "step": 3}]
    if sharded:
        names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
        for name, shard in zip(names, shards, strict=True):
            torch.save(shard, tmp_path / name)
        weights = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))
    else:
        torch.save(shards[0] | shards[1], tmp_path / "pytorch_model.bin")
    with pytest.raises(PickledWeights) as caught:
        open_checkpoint(tmp_path)
    command = caught.value.mend.partition("python -c ")[2]
    assert command.startswith('"') and command.endswith('"')
    subprocess.run([sys.executable, "-c", command[1:-1]], cwd=tmp_path, check=True)
    opened = open_checkpoint(tmp_path)
    assert set(opened.tensors) == {"a", "tied", "turned"}
    assert torch.equal(opened.read("turned"), shared.T) and torch.equal(opened.read("tied"), shared)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.read("a")
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        checkpoint.read("b")


def test_nested_sentence_transformers_weights_are_tensors_too(save_model) -> None:
    folder = save_model("st")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.eye(4)}, folder / "2_Dense" / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.read("2_Dense/linear.weight"), torch.eye(4))
