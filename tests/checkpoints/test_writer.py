"""Writing: streamed, in any order, whole or nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merganser.checkpoints import open_checkpoint, writer
from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec, shard


def test_tensors_in_any_order_read_back_by_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.float16), "c": torch.zeros(0, 2)}
    specs = [TensorSpec("a", "F32", (3, 4)), TensorSpec("b", "F16", (5,)), TensorSpec("c", "F32", (0, 2))]
    with SafetensorsWriter(tmp_path, {"model.safetensors": specs}) as writer:
        for name in ("c", "b", "a"):
            writer.write("model.safetensors", name, tensors[name])
    loaded = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "model.safetensors").stat().st_size % 2 == 0
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b", "c"]


def test_wrong_shape_and_forgotten_tensors_are_refused(tmp_path: Path) -> None:
    spec = [TensorSpec("a", "F32", (2,))]
    with pytest.raises(ValueError, match="is not F32"), SafetensorsWriter(tmp_path, {"x.safetensors": spec}) as w:
        w.write("x.safetensors", "a", torch.zeros(3))
    with pytest.raises(RuntimeError, match="never written"), SafetensorsWriter(tmp_path, {"y.safetensors": spec}):
        pass


def test_shards_are_filled_in_order() -> None:
    specs = [TensorSpec(str(i), "F32", (10,)) for i in range(5)]
    files = shard(specs, "model", 80)
    assert list(files) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [[s.name for s in f] for f in files.values()] == [["0", "1"], ["2", "3"], ["4"]]
    assert list(shard(specs, "model", 10**6)) == ["model.safetensors"]
    assert len(shard(specs, "model", 1)) == 5  # a tensor larger than a shard has one to itself


def test_what_the_disk_refused_beside_the_work_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports a failed write to the first flush after it, and to no later one."""
    failures = [OSError(errno.EIO, "input/output error")]

    def fsync(descriptor: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(writer, "_SYNC_EVERY", 1)
    monkeypatch.setattr(writer.os, "fsync", fsync)
    with (
        pytest.raises(OSError, match="input/output error"),
        SafetensorsWriter(tmp_path, {"x.safetensors": [TensorSpec("a", "F32", (2,))]}) as open_writer,
    ):
        open_writer.write("x.safetensors", "a", torch.zeros(2))
    assert not failures
