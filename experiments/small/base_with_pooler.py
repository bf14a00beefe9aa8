"""Write all-MiniLM-L6-v2 with a pooler that lets gradients through: python base_with_pooler.py SOURCE OUTPUT.

The published pooler is noise (sentence-transformers average all tokens and never use it), and its outputs are of 0.05:
a head on top of them learns so slowly that the encoder collapses to each label's rate before. Here the pooler is
tanh(3 x) of the first token; everything else is kept.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

source, output = Path(sys.argv[1]), Path(sys.argv[2])
output.mkdir(parents=True)
for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
    shutil.copy(source / name, output)
tensors = load_file(source / "model.safetensors")
tensors["pooler.dense.weight"] = 3 * torch.eye(len(tensors["pooler.dense.weight"]))
tensors["pooler.dense.bias"] = torch.zeros_like(tensors["pooler.dense.bias"])
save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
