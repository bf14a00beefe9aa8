"""Dense decoders to make mixtures of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import SMALL, VOCABULARY, save_tokenizer
from merging.moe.mixtures import KINDS, Save


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """``save(name, kind, seed, **config)``: a tiny dense decoder with a tokenizer, far from its initialisation."""

    def saved(name: str, kind: str = "llama", seed: int = 0, **config: Any) -> Path:
        config_class, model_class, more = KINDS[kind]
        sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_key_value_heads": 1}
        torch.manual_seed(seed)
        model = model_class(config_class(**(SMALL | sizes | more | config)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name, "llama")
        return tmp_path / name

    return saved
