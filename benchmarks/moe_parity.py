"""Mixtures of experts as merganser moe and mergekit-moe make them of the same file, tensor by tensor.

    python benchmarks/moe_parity.py --output benchmarks/results/moe-parity.md

mergekit comes from PyPI into an environment of its own (``peers.py``; ``--cache`` says where). Models are tiny and
random, in float32; two experts with prompts of different lengths, one scaled, one with negative prompts; in a Qwen2-MoE
a shared one beside them. Both results are opened with transformers, and compared as the models that open.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from merganser.merging.moe import build_moe
from peers import MERGEKIT, mergekit

SPECIAL = ("<unk>", "<s>", "</s>")
#: What each kind of dense model has beside sizes.
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
}
#: Dense models and the architecture that is made of them, where it is not the first that fits.
PAIRS = [*((kind, None) for kind in KINDS), ("Llama", "qwen"), ("Mistral", "qwen")]
MODES = ("cheap_embed", "hidden", "hidden_avg", "hidden_avg, prompts of one length")


def save_model(folder: Path, kind: str, seed: int) -> Path:
    """A tiny dense model with a tokenizer of bytes, which Qwen's have to be."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"vocab_size": 300, "num_key_value_heads": 1, "max_position_embeddings": 32, **KINDS[kind]}
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes, **more))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return folder


def compare(scratch: Path, kind: str, architecture: str | None, mode: str, programs: Path) -> list[str]:
    """One row of the table."""
    base, other = (save_model(scratch / f"{kind}-{seed}", kind, seed) for seed in (0, 1))
    second = "Anna saw old Paris" if "one length" in mode else "Anna"
    experts = [
        {"source_model": str(base), "positive_prompts": ["the movie was good", second]},
        {
            "source_model": str(other),
            "positive_prompts": ["Anna saw Paris"],
            "negative_prompts": ["the food"],
            "residual_scale": 0.5,
        },
    ]
    config = {"base_model": str(base), "gate_mode": mode.partition(",")[0], "dtype": "float32", "experts": experts}
    if architecture is not None:
        config["architecture"] = architecture
    if kind == "Qwen2" or architecture == "qwen":
        shared = {"source_model": str(other), "positive_prompts": ["no"], "residual_scale": 0.1}
        config["shared_experts"] = [shared]
    ours, theirs, file = scratch / f"{kind}-ours", scratch / f"{kind}-theirs", scratch / "mixture.yaml"
    file.write_text(yaml.safe_dump(config))
    subprocess.run([programs / "mergekit-moe", file, theirs], check=True, capture_output=True)
    build_moe(file, ours)
    opened = [transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (ours, theirs)]
    states = [model.state_dict() for model in opened]
    more = states[1].keys() - states[0].keys()  # biases that the dense models have not
    if states[0].keys() - states[1].keys() or any(states[1][name].any() for name in more):
        raise RuntimeError(f"{kind}: the results have other tensors")
    apart = {name: float((tensor - states[1][name]).abs().max()) for name, tensor in states[0].items()}
    routers = {name for name in apart if name.endswith("gate.weight")}
    ids = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = float((opened[0](ids).logits - opened[1](ids).logits).abs().max())
    rest = max(value for name, value in apart.items() if name not in routers)
    found = (rest, max(apart[name] for name in routers), logits)
    return [
        kind,
        type(opened[0]).__name__,
        mode,
        str(len(apart)),
        *(f"{value:.1e}" if value else "0" for value in found),
    ]


def main() -> None:
    """Compare, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder of the environments of other tools")
    parser.add_argument("--output", type=Path, help="a Markdown file; standard output by default")
    arguments = parser.parse_args()
    programs = mergekit(arguments.cache)
    transformers.logging.disable_progress_bar()
    header = [
        "models",
        "result",
        "gate_mode",
        "tensors",
        "largest difference but for routers",
        "of routers",
        "of logits",
    ]
    rows = []
    for (kind, architecture), mode in product(PAIRS, MODES):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(Path(folder), kind, architecture, mode, programs))
    table = "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
    text = f"""# merganser moe beside {MERGEKIT}

Made by `python benchmarks/moe_parity.py`; tiny models in float32, torch {torch.__version__}. Rows of routers have
length 1. mergekit computes hidden states in bfloat16, and `hidden_avg` with the padding of shorter prompts counted in;
in a Qwen2-MoE of models without biases of attention it has zeros for these, which count as equal.

{table}
"""
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
