"""A family of tiny fine-tunes with statistics, as a merge needs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import VOCABULARY, make_model
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics
from merganser.statistics import FILE_NAME, write_statistics
from tampering_examples import Copy, Family, merged_trees


def batches(seed: int, architecture: str, count: int = 6, size: int = 4) -> list[dict[str, torch.Tensor]]:
    """Padded batches of random tokens; with labels where the model is a decoder."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (size, 9), generator=generator)
        mask = torch.ones_like(ids)
        for row, length in enumerate(torch.randint(4, 10, (size,), generator=generator).tolist()):
            mask[row, length:] = 0
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        if architecture == "t5":
            labels = torch.randint(3, VOCABULARY, (size, 5), generator=generator)
            labels[0, 3:] = -100
            batch["labels"] = labels
        found.append(batch)
    return found


def make_family(
    place: Path,
    architecture: str = "bert",
    n: int = 2,
    *,
    statistics: bool = True,
    fisher: str | None = None,
    kfac: str | None = None,
    **config: Any,
) -> tuple[Path, list[Path]]:
    """A base model and n fine-tunes of it in a folder, with statistics in theirs."""
    base = make_model(architecture, 0, **config)
    base.save_pretrained(place / "base")
    folders = []
    for number in range(n):
        model = make_model(architecture, 0, **config)
        generator = torch.Generator().manual_seed(100 + number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        folder = place / f"tuned-{number}"
        model.save_pretrained(folder)
        if statistics:
            header, tensors = collect_statistics(
                model, open_checkpoint(folder), batches(number, architecture), fisher=fisher, kfac=kfac
            )
            write_statistics(folder / FILE_NAME, header, tensors)
        folders.append(folder)
    return place / "base", folders


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., tuple[Path, list[Path]]]:
    """``family(architecture, n)`` → the base's folder and n fine-tunes of it, statistics in their folders."""
    return partial(make_family, tmp_path)


@pytest.fixture(scope="module")
def shared_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, list[Path]]]:
    """The same for all tests of a file, in a folder of its own."""
    return partial(make_family, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def trees(shared_family: Family) -> dict[str, Path]:
    """Merged folders of each kind, see :func:`tampering_examples.merged_trees`."""
    return merged_trees(shared_family)


@pytest.fixture
def copied(trees: dict[str, Path], tmp_path: Path) -> Callable[..., Copy]:
    def make(kind: str, *, parents: bool = False) -> Copy:
        place = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        return Copy(kind, trees[kind], place, parents=parents)

    return make
