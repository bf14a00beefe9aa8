"""The true shapes of published models: planned from headers, with files that have no content on disk.

What the files are called and how tensors lie in them is transformers' own reverse conversion of the model on the meta
device, which is how ``save_pretrained`` would write it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from merganser.checkpoints.writer import TensorSpec, file_layout
from merganser.merging import make_plan, make_recipe

_GEMMA = {
    "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
    "num_key_value_heads": 16, "head_dim": 128, "vocab_size": 262208, "sliding_window": 1024,
}  # fmt: skip
_SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 896, "patch_size": 14,
}  # fmt: skip
_QWEN = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip
#: The class, its configuration where it is not the default, and how many parameters it has, in billions.
PUBLISHED: dict[str, tuple[str, dict[str, Any], float]] = {
    "Mixtral-8x7B": ("MixtralForCausalLM", {}, 46.7),
    "Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "vocab_size": 151936,
        },
        30.5,
    ),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", {}, 671.0),
    "gpt-oss-120b": ("GptOssForCausalLM", {"num_hidden_layers": 36, "num_local_experts": 128}, 116.8),
    "Gemma-3-27B": (
        "Gemma3ForConditionalGeneration",
        {"text_config": _GEMMA, "vision_config": _SIGLIP, "mm_tokens_per_image": 256},
        27.4,
    ),
    "Qwen3-VL-8B": ("Qwen3VLForConditionalGeneration", {"text_config": _QWEN}, 8.8),
}  # fmt: skip


def sparse_checkpoint(folder: Path, class_name: str, values: dict[str, Any]) -> int:
    """A folder whose weight file has the header of a model and nothing else; returns the number of parameters."""
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**values, architectures=[class_name])
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    kept = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    stored = revert_weight_conversion(model, kept)
    specs = [TensorSpec(name, "BF16", tuple(value.shape)) for name, value in stored.items()]
    header, infos = file_layout("model.safetensors", specs)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(max(info.offset + info.nbytes for info in infos))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return sum(value.numel() for value in kept.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_actmat_reaches_the_linear_weights(name: str, tmp_path: Path) -> None:
    class_name, values, billions = PUBLISHED[name]
    places = [tmp_path / part for part in ("base", "a", "b")]
    for place in places:
        assert sparse_checkpoint(place, class_name, values) / 1e9 == pytest.approx(billions, rel=0.02)
    base, *people = map(str, places)
    started = time.process_time()
    plan = make_plan(make_recipe({"contributors": people, "base": base, "method": "actmat"}))
    print(f"{name}: {len(plan.outputs)} tensors, {plan.coverage}, {time.process_time() - started:.1f} s")
    assert plan.coverage.share >= 0.95
    assert plan.coverage.linear / 1e9 > 0.7 * billions
