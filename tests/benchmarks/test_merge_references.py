"""Results of merganser against the benchmark's float64 references, and references that tell a wrong result."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import checkpoints
import merge as benchmark
import references
from merganser import merge

SMALL = checkpoints.Llama(1, 16, 24, 2, 1, vocabulary=32)
JUDGED = [name for name, case in benchmark.CASES.items() if case.models <= 3 and case.method not in ("simple", "ties")]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return checkpoints.write_family(
        tmp_path_factory.mktemp("scratch") / "family", SMALL.shapes(), SMALL.config(), torch.bfloat16, 3
    )


@pytest.mark.parametrize("name", JUDGED)
def test_merges_equal_the_reference_and_nothing_else_does(
    name: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, models = family
    case = benchmark.CASES[name]
    models = models[: case.models]
    merge(models, tmp_path / "out", method=case.method, base=base if case.base else None, options=case.options)
    found = references.judge(case.method, tmp_path / "out", models, base, case.options, case.tolerance, case.rows)
    assert found.numbers == checkpoints.parameters(SMALL.shapes())
    assert found.unexplained == 0
    assert found.kept is None or 0.5 < found.kept < 0.95
    (file,) = (tmp_path / "out").glob("*.safetensors")
    wrong = {key: (tensor.float() * 1.02).to(tensor.dtype) for key, tensor in load_file(file).items()}
    save_file(wrong, file, {"format": "pt"})
    again = references.judge(case.method, tmp_path / "out", models, base, case.options, case.tolerance, case.rows)
    assert again.unexplained > 0.5 * again.numbers


def test_sixteen_names_are_sixteen_contributors(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    named = benchmark.named(models, 16, base.parent / "named")
    assert len(set(named)) == 16 and benchmark.named(models, 16, base.parent / "named") == named
    sixteen, three = tmp_path / "sixteen", tmp_path / "three"
    for method, options in (("ties", {"density": 0.5}), ("dare_ties", {"density": 0.5})):
        merge(named, sixteen, method=method, base=base, options=options, max_memory="2GB", overwrite=True)
        merge(models, three, method=method, base=base, options=options, overwrite=True)
        many, few = (next(iter(load_file(folder / "model.safetensors").values())) for folder in (sixteen, three))
        assert many.shape == few.shape and not torch.equal(many, few)
