"""The checkpoints that a grid is given rather than makes: the pretrained model, and fine-tuned models of one's own."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

from safetensors.torch import save_file

from merganser.checkpoints import PickledWeights, open_checkpoint
from merganser.errors import CheckpointError

_HALF = {"F16": "float16", "BF16": "bfloat16"}


@lru_cache(maxsize=32)
def weights_sha256(reference: str, allow_pickle: bool = False) -> str:
    """The hash of all weights of a checkpoint.

    Raises:
        CheckpointError: it is neither on this machine nor to be had; says what to download and where to put it.
    """
    try:
        checkpoint = open_checkpoint(reference, allow_pickle=allow_pickle)
        checkpoint.fetch()
    except PickledWeights:
        raise
    except CheckpointError as error:
        name = reference.partition("@")[0]
        mend = (
            f"where there is a network, run: hf download {name} --local-dir {Path(name).name}; copy that folder "
            "here and give it as pretrained.model (--templates base=FOLDER in the named configurations), put it into "
            "resources_dir (--templates resources=…), or fill the Hugging Face cache ($HF_HOME)"
        )
        what = f"the pretrained model cannot be had: {error.what}"
        raise CheckpointError(what, where=reference, mend=mend) from error
    return checkpoint.manifest_sha256()


def half_precision(reference: str, allow_pickle: bool = False) -> str | None:
    """What to say of a base whose weights are stored in 16 bits; None where they are not."""
    infos = open_checkpoint(reference, allow_pickle=allow_pickle).tensors.values()
    found = sorted({_HALF[info.dtype] for info in infos if info.dtype in _HALF})
    if not found:
        return None
    return f"{reference}: weights in {' and '.join(found)} are trained, and saved, in float32"


def copy_model(reference: str, folder: Path, allow_pickle: bool = False) -> str:
    """Copy a model folder, its weights as safetensors where they were pickled; returns their hash."""
    checkpoint = open_checkpoint(reference, allow_pickle=allow_pickle)
    checkpoint.fetch()
    shutil.copytree(checkpoint.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.bin", "checkpoint-*"))
    if not any(folder.glob("*.safetensors")):
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return checkpoint.manifest_sha256()
