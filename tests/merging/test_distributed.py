"""Merges by jobs, one a weight file: the bytes of a merge in one process, whoever is lost on the way."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from merganser.checkpoints.writer import index_json
from merganser.cli import main
from merganser.engines import Engine, Job, Outcome, RayEngine, SerialEngine
from merganser.errors import FileError, UserError
from merganser.merging import merge, verify
from merganser.merging.distributed import FUNCTION
from ray_cluster import NODE, wait_until

HERE = str(Path(__file__).parent)
SHARDS = {"max_shard_size": "8kB"}


def files_of(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    record = json.loads(found["provenance.json"])
    for parent in [*record["parents"], *([record["base"]] if record["base"] else [])]:
        parent["model"] = Path(parent["model"]).name
    found["provenance.json"] = json.dumps({**record, "recipe": None, "sha256": None}).encode()
    return found


@pytest.mark.parametrize("method", ["simple", "regmean", "ties"])
def test_jobs_give_the_bytes_of_one_process(family, tmp_path: Path, method: str) -> None:
    base, models = family("bert", 3)
    settings: dict[str, Any] = {"method": method, **({"base": base} if method == "ties" else {}), **SHARDS}
    merge(models, tmp_path / "here", **settings)
    merge(models, tmp_path / "jobs", engine=SerialEngine(), **settings)
    here, jobs = files_of(tmp_path / "here"), files_of(tmp_path / "jobs")
    assert here == jobs and sum(name.endswith(".safetensors") for name in here) > 2
    verify(tmp_path / "jobs")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_heads_that_stay_apart_are_jobs_too(family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    merge(models, tmp_path / "here", method="simple", keep_separate=["classifier*"], **SHARDS)
    merge(
        models, tmp_path / "jobs", method="simple", keep_separate=["classifier*"], engine=SerialEngine(),
        **SHARDS,
    )  # fmt: skip
    assert files_of(tmp_path / "here") == files_of(tmp_path / "jobs")


def test_a_folder_behind_a_url_has_the_same_bytes(family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    merge(models, tmp_path / "here", method="regmean", **SHARDS)
    for name, engine in (("alone", None), ("jobs", SerialEngine())):
        url = f"file://{tmp_path}/{name}"
        assert merge(models, url, method="regmean", engine=engine, **SHARDS) == url
        assert files_of(tmp_path / "here") == files_of(tmp_path / name)
        with pytest.raises(UserError, match="the output exists"):
            merge(models, url, method="regmean", engine=engine, **SHARDS)
    merge(models, url, method="simple", overwrite=True)
    assert not list((tmp_path / "jobs").glob("model-0*"))  # what was there is gone


def test_nothing_stays_behind_a_url_after_an_error(family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    damage(models[1])
    with pytest.raises(UserError, match="NaN or Inf"):
        merge(models, f"file://{tmp_path}/out", method="simple", engine=SerialEngine(), **SHARDS)
    assert not (tmp_path / "out").exists()


def damage(model: Path) -> None:
    """Put a NaN into the last tensor of a model."""
    tensors = load_file(model / "model.safetensors")
    list(tensors.values())[-1].view(-1)[-1] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


class Meddling(Engine):
    """Changes a contributor after the first job."""

    name = "meddling"

    def __init__(self, model: Path) -> None:
        self.model = model

    def _outcomes(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
        for number, outcome in enumerate(SerialEngine().run(jobs, function)):
            if number == 0:
                file = self.model / "model.safetensors"
                save_file({name: t * 2 for name, t in load_file(file).items()}, file, {"format": "pt"})
            yield outcome


def test_files_that_change_between_the_jobs_are_noticed(family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    with pytest.raises(UserError, match=r"not the same on every machine|changed while it was being read"):
        merge(models, tmp_path / "out", method="regmean", engine=Meddling(models[1]), **SHARDS)
    assert not (tmp_path / "out").exists()


def test_input_in_shards_is_read_by_whoever_needs_it(family, tmp_path: Path) -> None:
    _, models = family("bert", 2, statistics=False)
    merge(models, tmp_path / "whole", method="simple", **SHARDS)
    for model in models:
        tensors = load_file(model / "model.safetensors")
        names = list(tensors)
        halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: tensors[name] for name in part}, model / file, {"format": "pt"})
        where = {name: file for file, part in halves.items() for name in part}
        (model / "model.safetensors.index.json").write_bytes(index_json(where, 1))
        (model / "model.safetensors").unlink()
    merge(models, tmp_path / "jobs", method="simple", engine=SerialEngine(), **SHARDS)
    a, b = (
        {n: t for f in sorted((tmp_path / x).glob("*.safetensors")) for n, t in load_file(f).items()}
        for x in ("whole", "jobs")
    )
    assert set(a) == set(b) and all(a[name].equal(b[name]) for name in a)


class Watched(RayEngine):
    """Runs jobs that leave marks."""

    def _outcomes(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
        assert function == FUNCTION
        return super()._outcomes(jobs, "merge_jobs:watched")


@pytest.mark.slow
def test_a_machine_is_killed_and_no_tensor_is_lost(cluster: Any, family, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'merganser[ray]'")
    _, models = family("bert", 3)
    merge(models, tmp_path / "here", method="regmean", threads=1, **SHARDS)
    node = cluster.add_node(num_cpus=1, **NODE)
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "watch").write_text(f"{marks}\n{node.node_id}\n")

    def kill() -> None:
        wait_until(lambda: any(marks.glob("blocked.*")), "no job runs on the second machine", 300)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    engine = Watched(cluster.address, environment={"PYTHONPATH": HERE})
    merge(models, tmp_path / "out", method="regmean", threads=1, engine=engine, **SHARDS)
    killer.join()
    assert files_of(tmp_path / "here") == files_of(tmp_path / "out")
    lost = [path.name.removeprefix("blocked.") for path in marks.glob("blocked.*")]
    assert lost and all(len(list(marks.glob(f"{name}.*.started"))) == 2 for name in lost)
    verify(tmp_path / "out")


@pytest.mark.slow
def test_a_worker_that_dies_for_good_leaves_nothing(cluster: Any, family, tmp_path: Path) -> None:
    _, models = family("bert", 2)

    class Crashing(RayEngine):
        def _outcomes(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
            return super()._outcomes(jobs[:1], "grid_jobs:crash_for_good")

    engine = Crashing(cluster.address, retries=0, environment={"PYTHONPATH": str(Path(HERE).parent / "engines")})
    with pytest.raises(UserError, match="its worker was lost"):
        merge(models, tmp_path / "out", method="simple", threads=1, engine=engine, **SHARDS)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.slow
def test_the_command_line_on_a_cluster(cluster: Any, family, tmp_path: Path, capsys) -> None:
    _, models = family("bert", 2)
    names = [str(model) for model in models]
    flags = ["--method", "simple", "--threads", "1", "--max-shard-size", "8kB"]
    merge(models, tmp_path / "here", method="simple", threads=1, **SHARDS)
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(["merge", *names, *flags, "--engine", "ray", "--ray-address", cluster.address, "-o", out])
    assert ended.value.code == 0
    assert files_of(tmp_path / "here") == files_of(tmp_path / "out")
    assert capsys.readouterr().out.strip().endswith(out)


def test_a_url_that_cannot_be_reached_is_said(family, tmp_path: Path) -> None:
    _, models = family("bert", 2)
    with pytest.raises(FileError, match="cannot be reached"):
        merge(models, "nosuchprotocol://x/y", method="simple")
