"""Training a LoRA adapter in place of a model's weights, with PEFT: what is adapted, and what is saved.

The head that a task adds is trained and saved as a whole (``modules_to_save``), since the base has none; a
language-modelling head is the base's and stays as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from merganser.errors import UserError, did_you_mean
from merganser.tasks.base import Problem
from merganser.training.heads import PROBLEM_TYPES, Start
from merganser.training.settings import LoraSettings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: PEFT's word for a task, by which readers of an adapter know the model's class.
_TASKS: dict[Problem, str] = {
    "classification": "SEQ_CLS",
    "multi_label": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "next_token": "CAUSAL_LM",
    "sequence": "SEQ_2_SEQ_LM",
}


def with_adapter(model: Any, start: Start, lora: LoraSettings, folder: Path | None = None) -> Any:
    """The model with an adapter on it, whose parameters alone are trained.

    Args:
        model: the base with the task's head.
        start: what it was made from.
        lora: the adapter's settings.
        folder: an adapter of an earlier training to go on from.

    Raises:
        UserError: no layer has one of the names to adapt.
    """
    import peft

    outside = [(name, child) for name, child in model.named_children() if name != model.base_model_prefix]
    heads = [name for name, child in outside if any(True for _ in child.parameters())]
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=_layers(model, lora),
        modules_to_save=heads if start.task.problem in PROBLEM_TYPES else None,
        task_type=_TASKS[start.task.problem] if start.task.problem else None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),
    )
    adapted = peft.get_peft_model(model, config)
    if folder is not None:
        peft.set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS))
    return adapted


def _layers(model: Any, lora: LoraSettings) -> list[str]:
    """The names of the linear layers of the base model that are adapted."""
    prefix = f"{model.base_model_prefix}."
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    inside = [name for name in linear if name.startswith(prefix)]
    last = {name: name.rpartition(".")[2] for name in inside}
    for target in lora.targets:
        if target not in last.values():
            mend = did_you_mean(target, set(last.values()))
            raise UserError(f"no linear layer of the base model is called {target!r}", where="lora.targets", mend=mend)
    return [name for name in inside if not lora.targets or last[name] in lora.targets]


def plain_model(model: Any) -> Any:
    """The transformers model below an adapter; a model without one is itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save_model(model: Any, folder: Path) -> None:
    """Save a model, or its adapter with a ``config.json`` beside it that names the head's labels."""
    below = plain_model(model)
    if below is model:
        model.save_pretrained(folder)
        return
    model.save_pretrained(folder, save_embedding_layers=False)  # which are the base's, since no token is added
    below.config.architectures = [type(below).__name__]
    below.config.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form of a model card, not filled in
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for name in ("target_modules", "modules_to_save"):  # which PEFT writes in the order of a set
        if isinstance(settings.get(name), list):
            settings[name] = sorted(settings[name])
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")
