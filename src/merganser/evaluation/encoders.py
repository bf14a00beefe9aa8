"""Encoders of sentences: a model as sentence-transformers opens it, with its own pooling, prompts and length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.checkpoints import AdapterCheckpoint
from merganser.errors import CheckpointError
from merganser.files import scratch_folder
from merganser.paths import real
from merganser.tasks.columns import Columns, texts
from merganser.tasks.data import Rows
from merganser.tasks.embedding import Embedding, saved_type
from merganser.tasks.models import Opened, blamed, first_line, load_model, quiet
from merganser.tasks.predict import Prediction


def load_encoder(opened: Opened, place: str, *, allow_pickle: bool = False) -> Any:
    """The model in float32 and eval mode, with all of its modules.

    A model without ``modules.json`` gets what sentence-transformers gives it: the mean of its tokens.

    Args:
        opened: the model; an adapter, or a head in a sub-folder, changes the transformer of the whole folder.
        place: the device.
        allow_pickle: accept pickled weights.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    import sentence_transformers

    checkpoint = opened.checkpoint
    checkpoint.fetch()
    sparse = saved_type(opened) == "SparseEncoder"
    encoder_class = sentence_transformers.SparseEncoder if sparse else sentence_transformers.SentenceTransformer
    weights: dict[str, Any] = {"dtype": torch.float32}
    if not allow_pickle:
        weights["use_safetensors"] = True
    try:
        with quiet(), _folder(opened) as folder:
            encoder = encoder_class(str(folder), device=place, local_files_only=True, model_kwargs=weights)
    except Exception as error:  # whatever damaged weights or a stranger's configuration provoke
        what = f"sentence-transformers cannot open it: {first_line(error)}"
        raise CheckpointError(what, where=opened.name, mend="check that its modules and weights are whole") from None
    if isinstance(checkpoint, AdapterCheckpoint) or _is_head(opened):
        inner = encoder[0].model
        network = load_model(opened, type(inner).__name__, complete=False, allow_pickle=allow_pickle)
        inner.load_state_dict(network.state_dict())
    return encoder.float().eval()


@contextmanager
def _folder(opened: Opened) -> Iterator[Path]:
    """The folder to open: the model's; where modules lie beside an adapter, one of links to these and to the base."""
    places = [opened.root, opened.checkpoint.modules_path]
    if places[1] == opened.root or not isinstance(opened.checkpoint, AdapterCheckpoint):
        yield opened.root
        return
    with scratch_folder() as scratch:
        for place in places:
            for path in sorted(place.rglob("*")):
                link = scratch / path.relative_to(place)
                if path.is_file() and not path.name.startswith("adapter_"):
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.unlink(missing_ok=True)
                    link.symlink_to(real(path))
        yield scratch


def _is_head(opened: Opened) -> bool:
    return opened.subfolder not in ("", opened.checkpoint.main)


def compare_embeddings(
    encoder: Any,
    task: Embedding,
    rows: Rows,
    columns: Columns,
    *,
    name: str,
    batch_size: int,
    max_length: int | None,
    bar: Any = None,
) -> Prediction:
    """What an encoder's embeddings say of rows.

    Args:
        encoder: as :func:`load_encoder` gave it.
        task: what is made of the embeddings.
        rows: the data; truths are not read.
        columns: as the task found them.
        name: of the model, for messages.
        batch_size: texts in a batch.
        max_length: tokens at which a text is cut; by default, and at most, what the model says.
        bar: a progress bar, advanced by rows.

    Raises:
        CheckpointError: embeddings that are not finite.
    """
    own = encoder.max_seq_length
    length = min(filter(None, (own, max_length)), default=0)
    if length:
        encoder.max_seq_length = length
    try:
        encode = partial(_encode, encoder, batch_size, name)
        aligned = task.compare(encode, encoder.similarity, rows, columns)
    finally:
        if length:
            encoder.max_seq_length = own
    if bar is not None:
        bar.update(len(rows))
    return Prediction(aligned, _cut(encoder, rows, columns, length), length)


def _encode(encoder: Any, batch_size: int, name: str, given: Sequence[str], side: str) -> Tensor:
    verbs = {"query": encoder.encode_query, "document": encoder.encode_document}
    with blamed("the model cannot be run", name, "check that configuration, weights and tokenizer belong together"):
        found = verbs.get(side, encoder.encode)(
            list(given), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
    dense: Tensor = found.to_dense() if found.is_sparse else found
    if not bool(torch.isfinite(dense).all()):
        what = "the model's embeddings are not finite"
        raise CheckpointError(what, where=name, mend="look for NaN in the weights with merganser inspect")
    return dense


def _cut(encoder: Any, rows: Rows, columns: Columns, length: int) -> int:
    """How many rows have a text that is longer than ``length``; prompts aside."""
    tokenizer = getattr(encoder, "tokenizer", None)
    if (
        not length
        or tokenizer is None
        or not hasattr(tokenizer, "num_special_tokens_to_add")
        or not callable(tokenizer)
    ):
        return 0  # of words alone
    with quiet():
        sides = [
            tokenizer(texts(rows, column or ""), truncation=False)["input_ids"]
            for column in (columns.text, columns.text_pair)
        ]
    return sum(any(len(ids) > length for ids in pair) for pair in zip(*sides, strict=True))
