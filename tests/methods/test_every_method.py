"""What holds for every method there is, whatever it computes: words, finite results, bytes, memory.

Nothing here knows a method by its name but for what it is given: a method that is added is tried without a change.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.layers import Layer
from merganser.merging import memory, merge
from merganser.merging.memory import anonymous_bytes, keep_freed
from merganser.methods import METHODS, Facts, Method, Unit
from merganser.methods.description import describe
from merganser.statistics import FILE_NAME
from merging.test_bytes import write_exact_statistics, write_family
from methods.in_memory import InMemory

ALL = [name for name, method in METHODS.items() if not method.needs.data]  # which the family here has none of
LINEAR = Layer("m", "linear", "w", None, False)


@dataclass(frozen=True)
class Publishing(InMemory):
    """A contributor of one linear layer, with all that can be published of it."""

    inputs: Tensor

    def gram(self, weight: str) -> Tensor:
        return self.inputs.T @ self.inputs / len(self.inputs)

    def mean(self, weight: str) -> Tensor:
        return self.inputs.mean(0)

    def count(self, weight: str) -> Tensor:
        return self.inputs[:, 0].abs().resize_(len(self.weight))

    def fisher(self, name: str) -> Tensor:
        return self.weight.square()

    def gradients(self, weight: str) -> Tensor:
        height = len(self.weight)
        return torch.eye(height) + torch.ones(height, height) / height


def contributors(method: Method) -> int:
    return method.needs.models or max(3, method.needs.at_least)


def coefficient(method: Method) -> float:
    """Of each contributor: those of a sum that is not divided have to sum to one."""
    divided = method.needs.normalised or method.needs.base or method.needs.models is not None
    return 1.0 if divided else 1 / contributors(method)


def fact_of(shape: tuple[int, ...], count: int, *, linear: bool) -> Facts:
    """A tensor of which every contributor publishes everything."""
    layer, all_do = LINEAR if linear else None, (True,) * count
    return Facts("w", shape, layer, grams=("m",) * count, counts=all_do, fishers=all_do, outputs=all_do, in_base=True)


def merged(method: Method, base: Tensor, tuned: Sequence[Tensor], *, linear: bool) -> Tensor | None:
    """A tensor merged by a method, or None where it leaves such a tensor to the average."""
    count = len(tuned)
    layer = LINEAR if linear else None
    fact = Facts(
        "w",
        tuple(base.shape),
        layer,
        grams=("m",) * count,
        counts=(True,) * count,
        fishers=(True,) * count,
        outputs=(True,) * count,
        in_base=True,
    )
    units, _ = method.units([fact])
    if not units:
        return None
    width = base[0].numel() if base.dim() > 1 else 1
    draw = torch.Generator().manual_seed(5)
    inputs = torch.randn(64, width, generator=draw)
    shares = [Publishing(n, coefficient(method), tensor, base, inputs) for n, tensor in enumerate(tuned)]
    unit: Unit = units[0]
    return method.merge(unit, shares).tensors["w"]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALL)
def test_it_is_explained(name: str) -> None:
    found = describe(METHODS[name])
    assert all((found.title, found.summary, found.formula, found.reference, found.streaming)), name
    for option in found.options:
        assert option.meaning and option.kind and "any" not in option.kind.split(), option


SHAPES: dict[str, tuple[tuple[int, ...], bool]] = {
    "matrix": ((12, 8), True),
    "one row": ((1, 8), True),
    "one column": ((8, 1), True),
    "one number": ((1, 1), True),
    "vector": ((7,), False),
    "scalar": ((), False),
    "convolution": ((6, 3, 2), False),
}


def cases(shape: tuple[int, ...], count: int) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Inputs that have nothing to merge, or hardly anything."""
    draw = torch.Generator().manual_seed(3)
    base, change = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    yield "nothing was trained", base, [base.clone() for _ in range(count)]
    yield "all are zero", torch.zeros(shape), [torch.zeros(shape) for _ in range(count)]
    yield "all are the same", base, [base + change for _ in range(count)]
    yield "one was trained", base, [base + change, *(base.clone() for _ in range(count - 1))]
    yield "they are opposite", base, [base + change * (-1) ** n for n in range(count)]
    yield "opposite of each other", torch.zeros(shape), [change * (-1) ** n for n in range(count)]
    yield "tiny changes", base, [base + 1e-7 * n * change for n in range(count)]
    yield "one number differs", base, [_touched(base, n) for n in range(count)]
    yield "large", base, [base + 1e12 * change * (n + 1) for n in range(count)]


def _touched(base: Tensor, number: int) -> Tensor:
    tensor = base.clone().reshape(-1)
    tensor[number % len(tensor)] += 1
    return tensor.reshape(base.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_degenerate_input_gives_finite_numbers(name: str, shape: str) -> None:
    method = METHODS[name]
    size, linear = SHAPES[shape]
    for case, base, tuned in cases(size, contributors(method)):
        found = merged(method, base, tuned, linear=linear)
        if found is None:
            continue
        assert found.shape == base.shape, case
        assert torch.isfinite(found).all(), case
        if case in ("nothing was trained", "all are zero"):
            torch.testing.assert_close(found.to(base.dtype), base, rtol=1e-5, atol=1e-6, msg=case)


@pytest.mark.parametrize("name", [n for n in ALL if METHODS[n].needs.models is None and METHODS[n].needs.at_least == 1])
def test_one_contributor_is_enough(name: str) -> None:
    draw = torch.Generator().manual_seed(4)
    base = torch.randn(10, 6, generator=draw)
    found = merged(METHODS[name], base, [base + torch.randn(10, 6, generator=draw)], linear=True)
    assert found is None or torch.isfinite(found).all()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return write_family(tmp_path_factory.mktemp("family"), "bert", "F32")


def carried_out(name: str, family: tuple[Path, list[Path]], out: Path, **settings: Any) -> bytes:
    base, models = family
    method = METHODS[name]
    count = contributors(method)
    settings |= {"base": base if method.needs.base else None, "coefficients": [coefficient(method)] * count}
    merge(models[:count], out, method=name, **settings)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ALL)
def test_the_bytes_depend_on_neither_threads_nor_slices(
    name: str, family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = carried_out(name, family, tmp_path / "whole", threads=1)
    monkeypatch.setattr(memory, "SLICE", 97)  # numbers, so that nearly every tensor is cut
    assert carried_out(name, family, tmp_path / "cut", threads=2) == whole


@pytest.mark.parametrize("name", ALL)
def test_contributors_that_are_the_base_give_the_base(
    name: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """With whatever statistics: there is nothing to merge."""
    base, models = family
    copies = []
    for number in range(len(models)):
        copy = tmp_path / f"copy-{number}"
        copy.mkdir()
        for file in base.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        copies.append(copy)
        write_exact_statistics(open_checkpoint(copy), copy / FILE_NAME, number)
    carried_out(name, (base, copies), tmp_path / "out")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base))
    for tensor, stored in expected.items():
        torch.testing.assert_close(found[tensor], stored, rtol=1e-5, atol=1e-6, msg=tensor)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_unit_takes_no_more_memory_than_is_said(name: str) -> None:
    method = METHODS[name]
    count = contributors(method)
    draw = torch.Generator().manual_seed(4)
    base = torch.randn(1536, 1024, generator=draw)
    tuned = [base + 0.01 * torch.randn(1536, 1024, generator=draw) for _ in range(count)]
    units, _ = method.units([fact_of((1536, 1024), count, linear=True)])
    if not units:
        pytest.skip("it treats blocks of several layers")
    keep_freed()
    inputs = torch.randn(64, 1024, generator=draw)
    shares = [Publishing(n, 1.0, tensor, base, inputs) for n, tensor in enumerate(tuned)]
    small = [Publishing(n, 1.0, tensor[:64, :64], base[:64, :64], inputs[:, :64]) for n, tensor in enumerate(tuned)]
    first = Unit(("w",), units[0].kind, (Facts("w", (64, 64), LINEAR, in_base=True),))
    method.merge(first, small)  # type: ignore[arg-type]  # libraries are loaded now
    gc.collect()
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    method.merge(units[0], shares)  # type: ignore[arg-type]
    done.set()
    watcher.join()
    assert peak[0] - before <= 1.2 * method.memory(units[0], count) + 2**24


def test_a_method_that_is_named_in_a_recipe_is_in_the_table() -> None:
    assert all(name == method.name for name, method in METHODS.items())
