"""Collecting from much data or large models: shards, jobs, stopping early, sampled tokens, weights on the disk."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from conftest import WORDS
from merganser.cli.collect import collect_command
from merganser.collection import collect, placement
from merganser.collection.shards import Tally, fixed_shards
from merganser.engines import Job, Outcome, SerialEngine
from merganser.errors import Problems, UserError
from merganser.statistics import FILE_NAME, Statistics
from merganser.tasks.classification import TextClassification
from merganser.tasks.data import read_rows

Save = Callable[..., Path]


def write(path: Path, texts: Sequence[str]) -> Path:
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """600 texts of 1 to 20 words."""
    draw = random.Random(0)
    return write(tmp_path / "reviews.jsonl", [" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(600)])


def differences(one: Path, two: Path) -> float:
    """The largest of any tensor, relative to its largest number.

    Fisher information that is rounding alone (of biases of keys in attention) is compared with the largest of all.
    """
    a, b = Statistics.open(one), Statistics.open(two)
    assert set(a.tensors) == set(b.tensors)
    largest = {n: float(a.packed(n).double().abs().max()) for n in a.tensors}
    rounding = 1e-10 * max((v for n, v in largest.items() if n.startswith("fisher.")), default=0.0)
    return max(
        float((a.packed(n).double() - b.packed(n).double()).abs().max())
        / max(largest[n], rounding if n.startswith("fisher.") else 0.0)
        for n in a.tensors
    )


def test_shards_cover_the_data_and_the_first_examples_give_fisher_information() -> None:
    shards = fixed_shards(10, 4, 6, grams=True)
    assert [list(shard.indices) for shard in shards] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [shard.fisher for shard in shards] == [6, 2, 0]
    assert [shard.number for shard in fixed_shards(10, 4, 6, grams=False)] == [0, 1]
    assert [shard.fisher for shard in fixed_shards(10, 4, None, grams=False)] == [None] * 3


def test_tallies_add() -> None:
    whole = Tally(4, 1, 30, 40) + Tally(6, 0, 30, 60)
    assert whole.notes(9) == (
        "texts cut at 9 tokens; 1 of 10 texts were longer and cut",
        "40.0% of the positions were padding, and were left out",
    )


def test_shards_change_nothing_but_rounding(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    folder = save_ready("m")
    options: dict[str, Any] = {"limit": 60, "fisher": "expected", "fisher_examples": 30, "max_length": 12}
    whole = collect(folder, reviews, **options)
    parts = collect(folder, reviews, output=tmp_path / "p.safetensors", shard_examples=16, **options)
    assert 0 < differences(whole, parts) < 1e-4
    one, two = Statistics.open(whole).header, Statistics.open(parts).header
    assert one.layers == two.layers and one.tokens == two.tokens and two.examples == 60
    assert two.fisher_examples == 30
    cut = [note for note in one.notes if "texts cut at" in note]
    assert cut and cut == [note for note in two.notes if "texts cut at" in note]


@pytest.mark.parametrize("architecture", ["bert", "t5", "gpt2"])
def test_jobs_give_the_bytes_of_one_process(save_ready: Save, tmp_path: Path, architecture: str) -> None:
    if architecture == "t5":
        data = tmp_path / "s.jsonl"
        rows = [{"source": " ".join(WORDS[: n + 2]), "target": "yes no"[: 2 + n % 5]} for n in range(11)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        data = write(tmp_path / "r.jsonl", [" ".join(WORDS[n : 2 * n + 1]) for n in range(11)])
    options: dict[str, Any] = {
        "shard_examples": 4, "fisher": "empirical", "fisher_examples": 6, "sample_tokens": 0.5, "label": "of 2014",
    }  # fmt: skip
    folder = save_ready("m", architecture)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        alone = collect(folder, data, output=tmp_path / "a.safetensors", **options)
    finally:
        torch.set_num_threads(before)
    spread = collect(folder, data, output=tmp_path / "b.safetensors", engine=SerialEngine(), **options)
    assert alone.read_bytes() == spread.read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


class Meddling(SerialEngine):
    """Runs jobs from the last to the first, after changing what they read."""

    def __init__(self, change: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.change, self.jobs = change, list[Job]()

    def _outcomes(self, jobs: Sequence[Job], function: str) -> Iterator[Outcome]:
        self.jobs = list(jobs)
        self.change()
        return super()._outcomes(list(reversed(jobs)), function)


def test_the_order_in_which_jobs_end_does_not_matter(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"limit": 20, "shard_examples": 6}
    folder = save_ready("m")
    alone = collect(folder, reviews, **options)
    engine = Meddling()
    other = collect(
        folder, reviews, output=tmp_path / "o.safetensors", engine=engine, cpus=2, storage="float32", **options
    )
    assert other.read_bytes() == alone.read_bytes()
    model_bytes = (folder / "model.safetensors").stat().st_size
    assert all(job.cpus == 2 and job.memory > model_bytes for job in engine.jobs)
    assert len(engine.jobs) == 4 and engine.jobs[0].cost > engine.jobs[3].cost > 0


@pytest.mark.parametrize("what", ["data", "model", "nothing there"])
def test_what_changes_while_jobs_run_is_an_error(save_ready: Save, reviews: Path, what: str) -> None:
    folder, other = save_ready("m"), save_ready("other", seed=1)
    before = sorted(path.name for path in folder.iterdir())
    changes: dict[str, Callable[[], object]] = {
        "data": lambda: write(reviews, ["good movie"] * 600),
        "model": lambda: (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()),
        "nothing there": reviews.unlink,
    }
    says = {
        "data": "the tokenised examples on this machine differ",
        "model": "the model on this machine differ",
        "nothing there": "no such file",
    }
    with pytest.raises(UserError, match=says[what]) as caught:
        collect(folder, reviews, limit=9, shard_examples=3, engine=Meddling(changes[what]))
    assert "shard" in str(caught.value) and "nothing was written" in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_it_stops_when_the_halves_agree(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    folder = save_ready("m")
    whole = collect(folder, reviews, output=tmp_path / "whole.safetensors")
    early = collect(folder, reviews, until_converged=0.1)
    header, everything = Statistics.open(early).header, Statistics.open(whole).header
    assert 128 <= header.examples < 600
    (note,) = [note for note in header.notes if "converged" in note]
    assert note.startswith(f"converged after {header.examples} of 600 examples, in random order (seed 0)")
    # not only the short or the long ones, which a collection of all starts with
    assert header.tokens / header.examples == pytest.approx(everything.tokens / 600, rel=0.1)
    a, b = Statistics.open(early), Statistics.open(whole)
    distances = [float((a.gram(i) - b.gram(i)).norm() / b.gram(i).norm()) for i in a.inputs]
    assert 0 < sum(d * d for d in distances) / len(distances) < 0.1**2
    same = collect(folder, reviews, until_converged=0.1, output=tmp_path / "s.safetensors")
    other = collect(folder, reviews, until_converged=0.1, seed=1, output=tmp_path / "o.safetensors")
    assert same.read_bytes() == early.read_bytes() != other.read_bytes()


def test_what_does_not_converge_uses_all_and_says_so(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    folder = save_ready("m")
    header = Statistics.open(collect(folder, reviews, limit=150, until_converged=1e-6)).header
    assert header.examples == 150
    assert any(note.startswith("not converged after all 150 examples") for note in header.notes)
    whole = collect(folder, reviews, limit=150, output=tmp_path / "w.safetensors")
    assert differences(folder / FILE_NAME, whole) < 1e-5
    one = Statistics.open(collect(folder, reviews, limit=1, until_converged=0.5, overwrite=True)).header
    assert any("estimated relative error of the Gram matrices is inf" in note for note in one.notes)


def test_fisher_information_goes_along_until_it_stops(save_ready: Save, reviews: Path) -> None:
    folder = save_ready("m")
    path = collect(
        folder, reviews, limit=300, until_converged=0.3, fisher="expected", fisher_examples=70, shard_examples=20
    )
    header = Statistics.open(path).header
    assert header.examples == 128 and header.fisher_examples == 70


def test_a_number_of_tokens_is_a_share(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    folder = save_ready("m")
    tokens = Statistics.open(collect(folder, reviews, limit=50)).header.tokens
    number = collect(folder, reviews, limit=50, sample_tokens=tokens // 4, output=tmp_path / "n.safetensors")
    share = tokens // 4 / tokens
    other = collect(folder, reviews, limit=50, sample_tokens=share, output=tmp_path / "s.safetensors")
    assert number.read_bytes() == other.read_bytes()
    more = collect(folder, reviews, limit=50, sample_tokens=10**6, output=tmp_path / "m.safetensors")
    assert differences(more, folder / FILE_NAME) == 0
    assert any("no sample was taken: there are" in note for note in Statistics.open(more).header.notes)


def test_storage_is_compressed(save_ready: Save, reviews: Path, tmp_path: Path) -> None:
    folder = save_ready("m")
    plain = collect(folder, reviews, limit=50)
    small = collect(folder, reviews, limit=50, storage="bfloat16", output=tmp_path / "s.safetensors")
    assert Statistics.open(small).storage == "bfloat16" and Statistics.open(plain).storage == "float32"


@pytest.mark.parametrize("architecture", ["bert", "qwen2", "t5", "gpt2"])
@pytest.mark.parametrize("part", [0, 0.6])
def test_weights_on_the_disk_give_the_same_numbers(
    save_ready: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, part: float
) -> None:
    if architecture == "t5":
        data = tmp_path / "s.jsonl"
        rows = [{"source": " ".join(WORDS[: n + 2]), "target": "yes"} for n in range(9)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        data = write(tmp_path / "r.jsonl", [" ".join(WORDS[n : 2 * n + 1]) for n in range(9)])
    folder = save_ready("m", architecture)
    if architecture == "qwen2":  # transformers rebuilds its tokenizer; ids are all that matters here
        from conftest import save_tokenizer

        save_tokenizer(folder, "llama")
    size = sum(tensor.stat().st_size for tensor in folder.glob("*.safetensors"))
    plain = collect(folder, data, batch_size=4, output=tmp_path / "plain.safetensors")
    monkeypatch.setattr(placement, "LEAST_MEMORY", 1)
    placed: list[set[bool]] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        placed.append({parameter.is_meta for parameter in model.parameters()})
        return model

    load = placement.load_model
    monkeypatch.setattr(placement, "load_model", watched)
    disk = collect(
        folder,
        data,
        batch_size=4,
        output=tmp_path / "disk.safetensors",
        max_memory=int(part * size) + 1,
        offload_folder=tmp_path,
        sample_tokens=None,
    )
    assert True in placed[0] and (part == 0 or len(placed[0]) == 2 or architecture == "gpt2")
    assert Statistics.open(disk).header.layers == Statistics.open(plain).header.layers
    assert differences(plain, disk) < 1e-5
    assert not list(tmp_path.glob("merganser-offload-*"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"until_converged": 0.0}, "--until-converged: a tolerance of 0"),
        ({"until_converged": 1.0}, "--until-converged: a tolerance of 1"),
        ({"sample_tokens": 0.0}, "--sample-tokens: a share of 0 of the tokens is no sample"),
        ({"sample_tokens": 1.0}, "--sample-tokens: a share of 1"),
        ({"sample_tokens": 0}, "--sample-tokens: a sample of 0 tokens is empty"),
        ({"shard_examples": 0}, "--shard-examples: shard_examples is 0"),
        ({"grams": False, "fisher": "expected", "sample_tokens": 0.5}, "--sample-tokens: it is about Gram"),
        ({"grams": False, "fisher": "expected", "until_converged": 0.5}, "--until-converged: it is about Gram"),
        ({"storage": "float8"}, "unknown storage 'float8'"),
        ({"engine": "dask"}, "unknown engine 'dask'"),
        ({"ray_address": "here:1"}, "--ray-address: the address of a cluster"),
        ({"engine": SerialEngine(), "cpus": 0}, "--cpus: a job on 0 cpus"),
        ({"engine": "ray", "until_converged": 0.1}, "--until-converged with --engine ray"),
        ({"engine": SerialEngine(), "device": "cuda"}, "--device with --engine ray: jobs run on CPUs"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"max_memory": 1000}, "--max-memory: a limit of 1000 bytes is too small"),
        ({"max_memory": "2GB", "fisher": "expected"}, "Fisher information needs all weights in memory"),
        ({"max_memory": "much"}, "much"),
        ({"offload_folder": "x"}, "--offload-folder: nothing is left on the disk without a limit"),
        ({"max_memory": "2GB", "offload_folder": "no-folder"}, "there is no such folder"),
    ],
)
def test_mistakes(
    save_ready: Save, reviews: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], says: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(placement, "load_model", refuse)
    folder = save_ready("m")
    with pytest.raises(UserError) as caught:
        collect(folder, reviews, **options)
    assert says in str(caught.value) and "to mend:" in str(caught.value)
    assert not (folder / FILE_NAME).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(save_ready: Save, reviews: Path) -> None:
    with pytest.raises(UserError, match="torch finds no GPU here"):
        collect(save_ready("m"), reviews, device="cuda")
    assert collect(save_ready("n"), reviews, limit=4, device="auto").exists()


def test_what_jobs_cannot_be_told(save_ready: Save, reviews: Path) -> None:
    folder, rows = save_ready("m"), read_rows(reviews)
    for data in (rows, ["the movie was good"], [{"text": "bad food !"}]):
        with pytest.raises(UserError, match="rows in memory are not on other machines"):
            collect(folder, data, engine=SerialEngine())
    with pytest.raises(UserError, match="has options of its own"):
        collect(folder, reviews, engine=SerialEngine(), task=TextClassification(key="accuracy"))
    with pytest.raises(Problems, match=r"(?s)--until-converged.*--max-memory"):
        collect(folder, reviews, engine=SerialEngine(), until_converged=0.1, max_memory="2GB")


def test_the_command_line(save_ready: Save, reviews: Path) -> None:
    folder = save_ready("m")
    arguments = [str(folder), "--data", str(reviews), "--until-converged", "--sample-tokens", "--limit", "300"]
    result = CliRunner().invoke(collect_command, arguments)
    assert result.exit_code == 0 and result.stdout.strip() == str(folder / FILE_NAME)
    assert "converged after" in result.stderr and "tolerance 5.00%" in result.stderr
    assert "a seeded sample of 0.25 of their tokens" in result.stderr
    for value, says in (("much", "neither a share nor a number"), ("nan", None), ("0", None)):
        result = CliRunner().invoke(collect_command, [*arguments[:3], f"--sample-tokens={value}"])
        assert result.exit_code != 0 and (says is None or says in result.stderr)
    header = Statistics.open(folder).header
    assert header.examples <= 300
