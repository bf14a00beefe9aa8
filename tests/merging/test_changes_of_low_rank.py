"""Whether whole models were changed by adapters that were merged into them, told by their numbers alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.merging import make_recipe
from merganser.merging.auto import in_few_directions, situation_of
from merganser.merging.inputs import open_inputs
from merging.test_auto import whole_models_of_adapters


def changed(change: torch.Tensor, dtype: torch.dtype) -> bool | None:
    """What is found of weights that were changed, and are stored in some precision."""
    base = 0.02 * torch.randn(change.shape, generator=torch.Generator().manual_seed(9))
    return in_few_directions((base + change).to(dtype), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 1024), (256, 64), (96, 400)])
def test_what_is_of_low_rank(shape: tuple[int, int], dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    left, right = torch.randn(shape[0], 8, generator=draw), torch.randn(8, shape[1], generator=draw)
    assert changed(3e-3 * left @ right / 8**0.5, dtype)
    full = torch.randn(shape, generator=draw)
    assert changed(3e-3 * full, dtype) is False
    # As training all weights leaves it: a few directions stand out, and all the others have a tenth of the squares.
    assert changed(3e-3 * (left @ right / 8**0.5 + 0.33 * full), dtype) is False
    assert changed(3e-3 * full.sign(), dtype) is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [8, None])
def test_rounding_hides_a_rank_and_never_makes_one(rank: int | None, dtype: torch.dtype) -> None:
    """Small changes of all weights have less beyond the first directions than rounding adds in every direction."""
    draw, shape = torch.Generator().manual_seed(5), (256, 768)
    change = torch.randn(shape[0], 8, generator=draw) @ torch.randn(8, shape[1], generator=draw) / 8**0.5
    if rank is None:
        change += 0.25 * torch.randn(shape, generator=draw)  # 6 % of the squares
    base = (0.05 * torch.randn(shape, generator=draw)).to(dtype)
    found = [
        in_few_directions((base.float() + 0.05 * 10**-size * change).to(dtype), base)
        for size in torch.arange(1, 5, 0.1).tolist()
    ]
    wrong, clear = rank is None, 5  # steps of the largest changes, which are told
    assert wrong not in found and found[:clear] == [rank is not None] * clear and found[-1] is None


def test_what_tells_of_no_rank() -> None:
    change = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert changed(torch.zeros(64, 64), torch.float32) is None
    assert changed(1e-6 * change, torch.bfloat16) is None  # all of it is rounding
    assert changed(change.index_fill(0, torch.tensor(3), torch.nan), torch.float32) is None
    assert changed(change.index_fill(0, torch.tensor(3), torch.inf), torch.float32) is None


def test_changes_of_low_rank_beside_others(family: Callable[..., Any], tmp_path: Path) -> None:
    given = whole_models_of_adapters(torch.float32)(family, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(given["models"][0], other)
    weights = load_file(given["base"] / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    whole = {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in weights.items()}
    save_file(whole, other / "model.safetensors", {"format": "pt"})

    def low_rank(models: list[Path], base: Path | None) -> bool:
        recipe = make_recipe({"contributors": [str(m) for m in models], "base": None if base is None else str(base)})
        return situation_of(recipe, open_inputs(recipe)).low_rank

    assert low_rank(given["models"], given["base"]) and not low_rank(given["models"], None)
    assert not low_rank([*given["models"], other], given["base"])
