"""Methods that merganser does not have, each in one short file, and all that comes with them by itself.

The oracles are float64 and numpy. Beside their numbers: the bytes do not depend on memory, slices and threads; what a
method needs is refused from its words alone; provenance says what was really used for each tensor, and why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.layers import Layer, describe_layers
from merganser.errors import MerganserError
from merganser.merging import merge
from merganser.merging.memory import SLICE
from merganser.methods import METHODS, Facts, Method
from merganser.methods.elementwise import Position
from merganser.statistics import FILE_NAME, Statistics
from merging.test_bytes import write_family
from methods.examples.great_circle import GREAT_CIRCLE
from methods.examples.kronecker import KRONECKER
from methods.examples.random_drop import RANDOM_DROP
from methods.examples.truncated_svd import TRUNCATED_SVD
from methods.in_memory import InMemory
from other_device import DEVICE, OtherDevice

EXAMPLES: dict[str, Method] = {m.name: m for m in (RANDOM_DROP, GREAT_CIRCLE, TRUNCATED_SVD, KRONECKER)}
COEFFICIENTS = [1.0, 2.0]
Numbers = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One line in the table of methods."""
    for name, method in EXAMPLES.items():
        monkeypatch.setitem(METHODS, name, method)
    yield


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, list[Path]]:
    base, models = write_family(tmp_path, "bert", "F32")
    return base, models[:2]


def numbers(folder: Path) -> Numbers:
    stored = load_file(folder / "model.safetensors")
    return {name: tensor.double().numpy() for name, tensor in stored.items()}


def carried_out(
    family: tuple[Path, list[Path]], out: Path, method: str, *, options: dict[str, Any], **settings: Any
) -> Path:
    base, models = family
    needs_base = EXAMPLES[method].needs.base
    return Path(
        merge(
            models, out, method=method, coefficients=COEFFICIENTS, options=options,
            base=base if needs_base else None, **settings,
        )
    )  # fmt: skip


def weights_of_layers(model: Path) -> set[str]:
    return {
        layer.weight for layer in describe_layers(open_checkpoint(model))
        if layer.kind != "embedding" and not layer.tied
    }  # fmt: skip


def averages(one: Numbers, two: Numbers) -> Numbers:
    return {name: (one[name] + 2 * two[name]) / 3 for name in one}


def test_random_drop_drops_about_as_many_numbers_as_it_should_and_scales_up_the_rest(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    out = carried_out(family, tmp_path / "out", "random_drop", options={"density": 0.3, "scale": 0.5})
    base, one, two = (numbers(folder) for folder in (family[0], *family[1]))
    found = numbers(out)
    seen: dict[tuple[bool, bool], int] = {}
    for name, origin in base.items():
        change = (found[name] - origin) / 0.5 * 0.3
        first, second = one[name] - origin, 2 * (two[name] - origin)
        ways = {(a, b): a * first + b * second for a in (False, True) for b in (False, True)}
        misses = np.stack([np.abs(change - way) for way in ways.values()])
        assert misses.min(0).max() < 1e-5  # each number is one of the four, in float32
        for way, count in zip(ways, np.bincount(misses.argmin(0).ravel(), minlength=4), strict=True):
            seen[way] = seen.get(way, 0) + int(count)
    total = sum(seen.values())
    expected = {(False, False): 0.49, (True, False): 0.21, (False, True): 0.21, (True, True): 0.09}
    for way, share in expected.items():  # five standard deviations
        assert abs(seen[way] / total - share) < 5 * (share * (1 - share) / total) ** 0.5


def test_random_drop_of_everything_is_task_arithmetic(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    out = carried_out(family, tmp_path / "out", "random_drop", options={"density": 1.0, "scale": 0.4})
    plain = merge(models, tmp_path / "plain", method="task_arithmetic", base=base, coefficients=COEFFICIENTS)
    assert (out / "model.safetensors").read_bytes() == (Path(plain) / "model.safetensors").read_bytes()


def test_great_circle_is_on_the_great_circle(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    found = numbers(carried_out(family, tmp_path / "out", "great_circle", options={}))
    one, two = (numbers(folder) for folder in family[1])
    for name, first in one.items():
        second = two[name]
        cosine = (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())
        angle = np.arccos(cosine)
        assert angle > 0.01
        expected = (np.sin(angle / 3) * first + np.sin(angle * 2 / 3) * second) / np.sin(angle)
        np.testing.assert_allclose(found[name], expected, rtol=2e-6, atol=1e-6)


def test_truncated_svd_is_the_nearest_of_its_rank(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    found = numbers(carried_out(family, tmp_path / "out", "truncated_svd", options={"rank": 3}))
    base, one, two = (numbers(folder) for folder in (family[0], *family[1]))
    layers, means = weights_of_layers(family[0]), averages(one, two)
    for name, origin in base.items():
        if name not in layers:
            np.testing.assert_allclose(found[name], means[name], rtol=2e-6, atol=1e-6)
            continue
        change = (one[name] - origin) + 2 * (two[name] - origin)
        values = np.linalg.svd(change, compute_uv=False)
        missed = np.linalg.norm(change - (found[name] - origin))
        assert missed == pytest.approx(np.sqrt((values[3:] ** 2).sum()), rel=1e-5, abs=1e-5)  # Eckart and Young


def test_kronecker_solves_the_normal_equations(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    found = numbers(carried_out(family, tmp_path / "out", "kronecker", options={"ridge": 0.01}))
    base, one, two = (numbers(folder) for folder in (family[0], *family[1]))
    layers, means = weights_of_layers(family[0]), averages(one, two)
    for name, origin in base.items():
        if name not in layers:
            np.testing.assert_allclose(found[name], means[name], rtol=2e-6, atol=1e-6)
            continue
        system, right = 0.0, 0.0
        for folder, tuned, coefficient in zip(family[1], (one[name], two[name]), COEFFICIENTS, strict=True):
            statistics = Statistics.open(folder / FILE_NAME)
            entry = statistics.layer(name)
            assert entry is not None and entry.input is not None
            inputs = statistics.gram(entry.input).double().numpy()
            change = tuned - origin
            outputs = change @ change.T / len(change) + np.eye(len(change))
            dense = coefficient * np.kron(outputs, inputs)  # acts on rows one after another
            system = system + dense
            right = right + dense @ (tuned - means[name]).ravel()
        # λ, as the solver estimates it, pulls toward the average: what is left of the equations is along the change.
        solution = (found[name] - means[name]).ravel()
        left = np.asarray(right - system @ solution)
        pull = (left @ solution) / (solution @ solution)
        assert pull == pytest.approx(0.01 * np.trace(system) / len(left), rel=0.5)
        assert np.linalg.norm(left - pull * solution) < 1e-3 * np.linalg.norm(left)


OPTIONS: dict[str, dict[str, Any]] = {
    "random_drop": {"density": 0.3}, "great_circle": {}, "truncated_svd": {}, "kronecker": {}
}  # fmt: skip


@pytest.mark.parametrize("method", EXAMPLES)
def test_the_bytes_depend_on_neither_threads_nor_slices(
    method: str, family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = carried_out(family, tmp_path / "whole", method, options=OPTIONS[method], threads=1)
    monkeypatch.setattr("merganser.merging.memory.SLICE", 97)  # numbers, so that nearly every tensor is cut
    assert SLICE != 97
    cut = carried_out(family, tmp_path / "cut", method, options=OPTIONS[method], threads=3)
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()


def test_seeds_and_contributors_have_random_numbers_of_their_own(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, (one, _) = family
    outs = [
        numbers(Path(merge([one, one], tmp_path / f"{s}-{c}", method="random_drop", base=base,
                           coefficients=c, options={"density": 0.5, "seed": s})))
        for s, c in ((0, [1, 0]), (0, [0, 1]), (1, [1, 0]))
    ]  # fmt: skip
    origin = numbers(base)
    masks = [np.concatenate([(out[name] != origin[name]).ravel() for name in origin]) for out in outs]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs((masks[first] == masks[second]).mean() - 0.5) < 5 * 0.5 / len(masks[0]) ** 0.5


def test_what_a_method_needs_is_refused_before_any_work(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    for method in ("random_drop", "truncated_svd", "kronecker"):
        with pytest.raises(MerganserError, match="--base"):
            merge(models, tmp_path / "out", method=method)
    with pytest.raises(MerganserError, match="exactly 2 models, 3 are given"):
        merge([*models, models[0]], tmp_path / "out", method="great_circle")
    with pytest.raises(MerganserError, match="negative"):
        merge(models, tmp_path / "out", method="great_circle", coefficients=[3, -1])
    (models[0] / FILE_NAME).unlink()
    with pytest.raises(MerganserError, match="no statistics"):
        merge(models, tmp_path / "out", method="kronecker", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", EXAMPLES)
def test_provenance_says_what_was_really_used(method: str, family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    out = carried_out(family, tmp_path / "out", method, options=OPTIONS[method])
    tensors = json.loads((out / "provenance.json").read_text(encoding="utf-8"))["tensors"]
    layers = weights_of_layers(family[0]) if method in ("truncated_svd", "kronecker") else set(tensors)
    assert {name for name, entry in tensors.items() if entry["method"] == method} == layers
    assert all(entry["reason"] for name, entry in tensors.items() if name not in layers)


@pytest.mark.parametrize(
    "method",
    [
        *("random_drop", "great_circle", "truncated_svd", "ties", "task_arithmetic", "actmat"),
        *("slerp", "karcher", "model_stock", "nearswap"),
    ],
)
def test_on_another_device_it_computes_the_same(method: str) -> None:
    """Random numbers, sums and factors lie where the weights do; loops compiled for the processor round otherwise."""
    draw = torch.Generator().manual_seed(2)
    base, one, two = (torch.randn(6, 5, generator=draw) for _ in range(3))
    fact = Facts("w", (6, 5), Layer("m", "linear", "w", None, False), in_base=True)
    chosen = METHODS[method]
    (unit,), _ = chosen.units([fact])

    def merged(move: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        shares = [InMemory(n, c, move(w), move(base)) for n, c, w in ((0, 1.0, one), (1, 2.0, two))]
        return chosen.merge(unit, shares).tensors["w"]

    here = merged(torch.Tensor.clone)
    with OtherDevice():
        far = merged(lambda tensor: tensor.to(DEVICE))
        assert str(far.device) == DEVICE
        back = far.to("cpu")
    torch.testing.assert_close(here, back, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "lines"), [("random_drop", 25), ("truncated_svd", 30), ("great_circle", 25), ("kronecker", 40)]
)
def test_a_method_is_short(method: str, lines: int) -> None:
    text = (Path(__file__).parent / "examples" / f"{method}.py").read_text(encoding="utf-8")
    code = [line for line in text.splitlines() if line.strip() and not line.startswith('"""')]
    assert len(code) <= lines


def test_a_slice_of_random_numbers_is_a_part_of_the_whole() -> None:
    def drawn(rows: Any, width: int = 7) -> torch.Tensor:
        return Position("w", rows, [0, 3]).uniform(torch.empty(len(rows), width), 1, 5)

    whole = drawn(range(50))
    assert float(whole.min()) >= 0 and float(whole.max()) < 1
    for start, stop in ((0, 1), (3, 4), (8, 50), (13, 29)):
        assert torch.equal(drawn(range(start, stop)), whole[start:stop])
    assert torch.equal(drawn((4, 0, 31)), whole[torch.tensor([4, 0, 31])])
