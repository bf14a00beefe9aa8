"""NaN reaches no result, whatever way a tensor takes: merged, averaged, kept, copied, a buffer, of one contributor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merganser.errors import UserError
from merganser.merging import merge

Family = Callable[..., tuple[Path, list[Path]]]
HEAD, TABLE = "classifier.weight", "bert.embeddings.word_embeddings.weight"


def spoil(folder: Path, name: str, value: float, dtype: torch.dtype | None = None) -> None:
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[-1] = value
    if dtype is not None:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def refused(models: list[Path], out: Path, name: str, **settings: Any) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match="NaN") as caught:
        merge(models, out, **settings)
    assert name in str(caught.value) and "to mend" in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_kept_separate(family: Family, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    """A head and a whole table of embeddings, of the first contributor and of the last."""
    _, models = family("bert", 2, statistics=False)
    whole = [load_file(model / "model.safetensors") for model in models]
    for number, name in ((0, HEAD), (1, HEAD), (1, TABLE)):
        spoil(models[number], name, value, dtype)
        refused(models, tmp_path / "out", name, method="simple", keep_separate=["classifier*", TABLE])
        save_file(whole[number], models[number] / "model.safetensors", metadata={"format": "pt"})
    merge(models, tmp_path / "out", method="simple", keep_separate=["classifier*", TABLE])


@pytest.mark.parametrize("settings", [{"keep_separate": ["classifier*"]}, {"exclude": ["classifier*"]}, {}])
def test_of_a_contributor_alone(family: Family, tmp_path: Path, settings: dict[str, Any]) -> None:
    base, models = family("bert", 1, statistics=False)
    spoil(models[0], HEAD, math.nan)
    for method in ("simple", "task_arithmetic"):
        refused(models, tmp_path / "out", HEAD, method=method, base=base, **settings)


@pytest.mark.parametrize("count", [1, 2])
def test_buffers_may_be_infinite_and_never_nan(tmp_path: Path, count: int) -> None:
    """A bias of logits that rules tokens out is infinite; it is no parameter, and nothing trains it."""
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=40, max_position_embeddings=38, **small, **heads)
    folders = [tmp_path / name for name in ("base", "a", "b")[: count + 1]]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        transformers.BartForConditionalGeneration(config).save_pretrained(folder)
        spoil(folder, "final_logits_bias", -math.inf)
    base, *models = folders
    merge(models, tmp_path / "out", method="task_arithmetic", base=base)
    assert load_file(tmp_path / "out" / "model.safetensors")["final_logits_bias"].view(-1)[-1] == -math.inf
    for folder in models:
        spoil(folder, "final_logits_bias", math.nan)
    refused(models, tmp_path / "again", "final_logits_bias", method="task_arithmetic", base=base)
