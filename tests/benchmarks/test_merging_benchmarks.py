"""What the benchmarks of merging rest on: inputs, floors, references, memory and fits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import checkpoints
import floor
import grams
import measure
import naive_regmean
import parts
import regmean
import scaling
import ties_reference
from merganser import merge
from merganser.checkpoints import open_checkpoint
from merganser.statistics import Statistics

SMALL = checkpoints.Llama(1, 16, 24, 2, 1, vocabulary=32)


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Path]]:
    """A family of tiny checkpoints in several shards."""
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 2000)
    return checkpoints.write_family(tmp_path / "family", SMALL.shapes(), SMALL.config(), torch.bfloat16, 3)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def test_families_are_complete_and_close_to_their_base(family: tuple[Path, list[Path]]) -> None:
    base, models = family
    assert len(list(base.glob("*.safetensors"))) > 1
    origin = tensors(base)
    assert {name: tuple(t.shape) for name, t in origin.items()} == SMALL.shapes()
    for model in models:
        assert set(open_checkpoint(model).tensors) == set(origin)
        for name, tensor in tensors(model).items():
            change = float((tensor.float() - origin[name].float()).abs().max())
            assert change < 0.01
            assert change > 0 or "norm" in name  # near one, the noise is less than bfloat16 tells apart


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="are needed"):
        checkpoints.check_space(tmp_path, 10**18)


def test_floor_is_the_mean(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _, models = family
    floor.average(tmp_path / "out", models)
    found = ties_reference.compare(tmp_path / "out", models, None, 1.0)
    assert found["numbers"] == checkpoints.parameters(SMALL.shapes())
    assert found["unexplained"] == 0


def brute_force(base: torch.Tensor, tuned: list[torch.Tensor], keep: int) -> torch.Tensor:
    """TIES number by number, where no two magnitudes are equal."""
    deltas = [[float(t) - float(b) for t, b in zip(x, base, strict=True)] for x in tuned]
    kept = [{i for _, i in sorted((-abs(v), i) for i, v in enumerate(d))[:keep]} for d in deltas]
    merged = []
    for i, origin in enumerate(base.tolist()):
        left = [d[i] for d, k in zip(deltas, kept, strict=True) if i in k]
        agreeing = [v for v in left if v * (1 if sum(left) >= 0 else -1) > 0]
        merged.append(origin + sum(agreeing) / max(len(agreeing), 1))
    return torch.tensor(merged, dtype=torch.float64)


def write(folder: Path, tensor: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({"w": tensor}, folder / "model.safetensors")
    return folder


def test_reference_accepts_ties_and_rejects_anything_else(tmp_path: Path) -> None:
    numbers = torch.Generator().manual_seed(0)
    spread = 2.0 ** torch.arange(-3, 3).repeat(10)  # no two differences of one size
    base = torch.randn(60, generator=numbers).bfloat16()
    tuned = [(base.float() + torch.randn(60, generator=numbers) * spread).bfloat16() for _ in range(3)]
    models = [write(tmp_path / f"m{i}", t) for i, t in enumerate(tuned)]
    origin = write(tmp_path / "base", base)
    wanted = brute_force(base.double(), [t.double() for t in tuned], 30)
    good = write(tmp_path / "good", wanted.bfloat16())
    assert ties_reference.compare(good, models, origin, 0.5)["unexplained"] == 0
    other = wanted.bfloat16()
    other[7] = other[7] * 1.02 + 0.1
    bad = write(tmp_path / "bad", other)
    assert ties_reference.compare(bad, models, origin, 0.5)["unexplained"] == 1


def test_reference_knows_that_equal_magnitudes_may_go_either_way(tmp_path: Path) -> None:
    base = write(tmp_path / "base", torch.zeros(4).bfloat16())
    models = [write(tmp_path / f"m{i}", torch.tensor([1.0, 1.0, 1.0, 0.5]).bfloat16()) for i in range(2)]
    first_two = write(tmp_path / "first", torch.tensor([1.0, 1.0, 0.0, 0.0]).bfloat16())
    found = ties_reference.compare(first_two, models, base, 0.5)
    assert (found["differ"], found["ties"], found["unexplained"]) == (1, 1, 0)


@pytest.mark.parametrize("method", ["simple", "ties"])
def test_merges_equal_the_reference(method: str, family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    settings = {"base": base, "options": {"density": 0.5}} if method == "ties" else {}
    merge(models, tmp_path / "out", method=method, **settings)
    found = ties_reference.compare(tmp_path / "out", models, base if settings else None, 0.5)
    assert found["unexplained"] == 0
    assert found["differ"] < found["numbers"] / 100


def test_grams_are_valid_and_both_solvers_agree(tmp_path: Path) -> None:
    encoder = checkpoints.Encoder(1, 16, 32, 2, vocabulary=40, positions=8)
    models = grams.encoder_family(tmp_path, encoder, 2)
    inputs = {f"{module}.weight": key for module, (key, _) in encoder.linear().items()}
    for model in models:
        statistics = Statistics.open(model)
        statistics.validate()
        assert not statistics.check_binding(open_checkpoint(model))
        regmean.write_naive(model, inputs)
    shares = regmean.load(models, inputs)
    solved = {name: variant() for name, variant in regmean.solvers(shares, encoder, inputs, 0.9).items()}
    for errors in regmean.judge(shares, inputs, 0.9, solved).values():
        assert errors["worst"] < 1e-2
    assert regmean.judge(shares, inputs, 0.9, solved)["merganser"]["worst"] < 1e-5


def test_naive_solution_of_equal_models_is_the_model() -> None:
    weight, gram = torch.randn(3, 4), torch.eye(4)
    assert torch.allclose(naive_regmean.regmean([weight, weight], [gram, 2 * gram]), weight, atol=1e-6)


def test_memory_counts_children() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = "import time; x = bytearray(80_000_000); time.sleep(0.4)"
    run = measure.run_command([sys.executable, "-c", program, child])
    assert 80e6 < run.anonymous < 200e6
    assert run.resident >= run.anonymous


def test_a_variant_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    good = measure.timed(lambda: None)
    runs = measure.take_turns(
        {"bad": lambda: measure.run_command([sys.executable, "-c", "raise SystemExit(3)"]), "good": good}, 2
    )
    assert list(runs) == ["good"]
    assert "bad is left out" in capsys.readouterr().err
    assert measure.summary(runs, "bad")[0]["ratio"] is None


def test_fit_finds_line_and_power() -> None:
    line = scaling.fit({x: 3 + 2 * x for x in (2.0, 3.0, 5.0, 9.0)})
    assert (line["slope"], line["intercept"], line["exponent"]) == pytest.approx((2, 3, 1))
    assert line["r_squared"] == pytest.approx(1)
    assert scaling.fit({x: x**2 for x in (2.0, 4.0, 8.0, 16.0)})["exponent_with_start"] == pytest.approx(2)


def test_parts_agree_with_what_would_take_their_place(tmp_path: Path) -> None:
    small = checkpoints.Encoder(1, 16, 32, 2, vocabulary=40, positions=8)
    lines = parts.blas(1, [(16, 24), (600, 8)], 2)
    lines += parts.storage(tmp_path, small, 2, ("float32", "bfloat16", "lowrank:4"))
    lines += parts.zoo(1, tmp_path, 8, hidden_size=8, num_hidden_layers=1, intermediate_size=16, heads=2)
    assert [line.part for line in lines] == ["blas", "blas", "storage", "storage", "zoo"]
    assert all(line.agrees for line in lines)


def test_thresholds_are_the_same_in_every_way() -> None:
    found = {name: parts.thresholds(name, (700, 1000), 2)[1] for name in parts.SELECTIONS}
    assert len(set(map(tuple, found.values()))) == 1


@pytest.mark.slow
def test_thresholds_are_measured_apart() -> None:
    assert [line.results for line in parts.selection(1, (300, 20), 2)] == ["the same thresholds"] * 2
