"""Processor time of planning 10,000 tensors, beside what is paid once: imports, and transformers' empty model.

    python benchmarks/planning.py SCRATCH

Two kinds of checkpoint: a Llama of 1,100 tiny layers (9,903 tensors, the model view), and 9,000 tensors whose names
begin with 3,000 different numbers in a model that nobody knows (names on disk). Each with a view that is made for it,
which contains the empty model, and with one that is known already.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from merganser.checkpoints import model_view
from merganser.checkpoints.layers import build_empty
from merganser.merging import RunSettings, make_plan, make_recipe
from merganser.merging.inputs import without_collection
from merganser.merging.memory import fit

LAYERS = 1100


def main(scratch: Path) -> None:
    """Make the folders where they are not there, and time the steps."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, vocab_size=100, num_hidden_layers=LAYERS
    )
    llama, numbered = [scratch / f"llama-{key}" for key in "ab"], [scratch / f"numbered-{key}" for key in "ab"]
    if not llama[0].exists():
        model = transformers.LlamaForCausalLM(config)
        for folder in llama:
            model.save_pretrained(folder)
        names = (f"{number}.{part}" for number in range(3000) for part in ("a.weight", "b.weight", "c.bias"))
        tensors = {name: torch.zeros(4, 4) for name in names}
        for folder in numbered:
            folder.mkdir()
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            (folder / "config.json").write_text(json.dumps({"model_type": "of-nobody"}))
    values = json.loads((llama[0] / "config.json").read_text())
    build_empty({**values, "num_hidden_layers": 1, "layer_types": None}, scratch, LAYERS * 12)  # imports
    with without_collection():  # as planning does it
        seconds, _ = timed(lambda: build_empty(values, scratch, LAYERS * 12))
    print(f"transformers' empty model of {LAYERS} layers: {seconds:.2f} s")
    for folders in (llama, numbered):
        recipe = make_recipe({"contributors": [*map(str, folders)], "method": "ties", "base": str(folders[0])})
        for known in (False, True):
            if not known:
                model_view._views.clear()
            seconds, plan = timed(lambda recipe=recipe: make_plan(recipe))
            fitted, _ = timed(lambda plan=plan: fit(plan.steps, RunSettings()))
            said = "view known" if known else "view made"
            print(
                f"{folders[0].name}, {len(plan.outputs)} tensors, {said}: plan {seconds:.2f} s, slices {fitted:.2f} s"
            )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of some work, and what it gives."""
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
