"""What comes into each layer of a dense decoder for some texts, with the weights of one layer in memory at a time.

The model is transformers' own, without memory. It is run once on each text with layers that let everything through and
note what they are given beside it (masks, positions); then each real layer gets its weights, works on all texts, and is
forgotten. So a base model of any size has its states looked at in little memory, quantised or with an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merganser.checkpoints.layers import build_empty, load_config
from merganser.checkpoints.sources import read_source
from merganser.errors import CheckpointError
from merganser.merging.inputs import Parent
from merganser.merging.memory import RunSettings
from merganser.merging.shares import read_finite
from merganser.progress import track
from merganser.tensors import one_thread

MEND = "give a base model that opens and whose tokenizer belongs to it, or choose gate_mode: random"
EMBEDDING = "model.embed_tokens.weight"

Ids = tuple[int, ...]


class _Through(nn.Module):
    """A layer that lets states through and notes what else it is given."""

    def forward(self, states: Tensor, **given: Any) -> Tensor:
        """The states."""
        self.given = given
        return states


def embedded(base: Parent, texts: Sequence[Ids]) -> dict[Ids, Tensor]:
    """The embeddings of each text, (tokens, hidden size) in float32; only their rows are read.

    Raises:
        CheckpointError: the tokenizer gives a token that has none.
    """
    source = base.sources[EMBEDDING]
    height = source.shape(base.checkpoint)[0]
    rows: dict[int, Tensor] = {}
    for number in sorted({number for ids in texts for number in ids}):
        if number >= height:
            what = f"its tokenizer gives the token {number}, and there are {height} embeddings"
            raise CheckpointError(what, where=base.title, mend=MEND)
        rows[number] = read_source(base.checkpoint, source, number, number + 1).to(torch.float32)
    return {ids: torch.cat([rows[number] for number in ids]) for ids in texts}


def layer_states(base: Parent, texts: Sequence[Ids], settings: RunSettings) -> Iterator[Mapping[Ids, Tensor]]:
    """What comes into each layer, in order: for each text (tokens, hidden size) in float32.

    Texts go through a layer one by one, so that there is no padding whose states could enter, and each on one thread,
    so that the numbers do not depend on how many there are.

    Args:
        base: the model; its tensors by the names that transformers would write.
        texts: as tokens.
        settings: threads and device.
    """
    checkpoint, device = base.checkpoint, settings.torch_device or torch.device("cpu")
    model: Any = build_empty(checkpoint.config, checkpoint.model_path, len(checkpoint.tensors))
    decoder, config = model.model, load_config(checkpoint)
    layers = [layer.eval() for layer in decoder.layers]
    through = nn.ModuleList(_Through() for _ in layers)
    decoder.layers, decoder.norm = through, nn.Identity()
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)
    states = {ids: rows[None].to(device) for ids, rows in embedded(base, texts).items()}
    given: dict[Ids, list[Any]] = {}
    with torch.inference_mode():
        for ids, rows in states.items():
            decoder(inputs_embeds=rows, use_cache=False)
            given[ids] = [layer.given for layer in through]

    def run(layer: Any, number: int, ids: Ids) -> Tensor:
        with torch.inference_mode():
            found = layer(states[ids], **given[ids][number])
        return found[0] if isinstance(found, tuple) else found

    with one_thread(), ThreadPoolExecutor(settings.threads) as pool:
        for number, layer in enumerate(track(layers, "prompts", "layers", len(layers))):
            yield {ids: rows[0].to("cpu") for ids, rows in states.items()}
            if number + 1 < len(layers):  # what comes out of the last is nobody's
                _fill(layer, base, f"model.layers.{number}.", device)
                states = dict(zip(texts, pool.map(partial(run, layer, number), texts), strict=True))
                layer.to("meta")


def _fill(layer: nn.Module, base: Parent, prefix: str, device: torch.device) -> None:
    """Give a layer its weights, in float32."""
    found = {
        name: read_finite(base, base.sources[f"{prefix}{name}"]).to(device, torch.float32)
        for name in layer.state_dict()
    }
    layer.load_state_dict(found, assign=True)
