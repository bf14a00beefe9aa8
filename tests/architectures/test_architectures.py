"""Every architecture of :mod:`architectures.tiny` through merging and collecting, against the oracle.

A dozen run in ``make test``; ``make architectures`` runs all of them and writes docs/architectures.md from the rows.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from architectures.examine import examine
from architectures.tiny import TINY
from merging.test_unasked_model import plans, without_layers

#: One of each family.
FAST = {
    "BertForSequenceClassification", "CLIPModel", "DeepseekV3ForCausalLM", "GPT2LMHeadModel", "GptOssForCausalLM",
    "Llama4ForCausalLM", "MixtralForCausalLM", "Qwen2VLForConditionalGeneration", "Qwen3MoeForCausalLM",
    "T5ForConditionalGeneration", "ViTForImageClassification", "Zamba2ForCausalLM",
}  # fmt: skip
#: Models that the named method does not reach wholly, with the reason.
PARTLY_COVERED: dict[str, str] = {
    "RecurrentGemmaForCausalLM": "its gates are one matrix for each head, multiplied from a side that is not known"
}
#: Classes whose statistics are not compared as a whole, with the reason.
NOT_COMPARED: dict[str, str] = {
    "PegasusXForConditionalGeneration": "it fills its windows itself, and the oracle counts what it fills them with",
    "ProphetNetForConditionalGeneration": "position embeddings are looked up a second time past their module",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.architectures) for name in TINY]
)
def test_it_is_merged_as_in_memory(name: str, tmp_path: Path) -> None:
    row = examine(TINY[name], tmp_path)
    if rows := os.environ.get("ARCHITECTURE_ROWS"):
        Path(rows).mkdir(parents=True, exist_ok=True)
        (Path(rows) / f"{name}.json").write_text(json.dumps(asdict(row)))
    faults = {asked: fault for asked, fault in row.faults.items() if fault}
    if name in NOT_COMPARED:
        faults.pop("collect", None)
    assert not faults
    assert row.actmat is not None and row.own is not None
    assert min(row.actmat, row.own) >= 0.98 or name in PARTLY_COVERED


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.architectures) for name in TINY]
)
def test_files_tell_as_much_as_the_model(name: str, tmp_path: Path) -> None:
    """Whatever the architecture: buffers, stacks of experts and copies are asked for, and nothing else changes."""
    base, *models = (str(TINY[name].save(tmp_path / str(seed), seed)) for seed in range(3))
    found, asked = plans({"contributors": models, "base": base, "method": "ties"})
    assert without_layers(found) == without_layers(asked)
    assert found.coverage.share == asked.coverage.share
