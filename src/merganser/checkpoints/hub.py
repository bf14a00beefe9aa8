"""Checkpoints on the Hugging Face Hub: small files and headers first, weights only when a plan holds.

Follows the Hub client's own conventions: its cache, its tokens, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from merganser.checkpoints import adapters
from merganser.checkpoints.folder import local_tensors, pickled
from merganser.checkpoints.header import tensor_infos
from merganser.checkpoints.reader import Checkpoint
from merganser.errors import CheckpointError

_WEIGHTS = ["*.safetensors"]
_PICKLES = "pytorch_model*.bin"
_UNWANTED = [
    "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.pkl", "onnx/*", "openvino/*",
    "checkpoint-*/*",
]  # fmt: skip
_STATISTICS = "merge_statistics.safetensors"  # small beside the weights, and needed to plan


def open_hub(name: str, repo: str, revision: str | None, *, allow_pickle: bool = False) -> Checkpoint:
    """Open ``repo`` at ``revision``: its configuration and headers now, its weights on ``fetch()``.

    Weights that are published as pickles alone have no header, and are downloaded at once where they are allowed.

    Raises:
        CheckpointError: the repository is not there, or not cached while offline.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, NotASafetensorsRepoError

    def snapshot(revision: str | None, **options: Any) -> Path:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, **options))

    try:
        if constants.HF_HUB_OFFLINE:
            folder = snapshot(revision, local_files_only=True, ignore_patterns=_UNWANTED)
            tensors = local_tensors(folder, allow_pickle=allow_pickle)
            return Checkpoint(name, folder, tensors, revision=folder.name)
        # By the name that was given, so that the cache remembers what it stands for; from then on by its commit.
        folder = snapshot(revision, ignore_patterns=_WEIGHTS + _UNWANTED)
        commit = folder.name
        if (folder / "modules.json").is_file():  # nested modules may hold weights that no index lists
            folder = snapshot(commit, ignore_patterns=_UNWANTED)
            return Checkpoint(name, folder, local_tensors(folder), revision=commit)
        try:
            headers = huggingface_hub.get_safetensors_metadata(repo, revision=commit).files_metadata
        except NotASafetensorsRepoError:
            if any(Path(f).match(_PICKLES) for f in huggingface_hub.list_repo_files(repo, revision=commit)):
                if not allow_pickle:
                    raise pickled(name, "pytorch_model") from None
                folder = snapshot(commit, ignore_patterns=[p for p in _UNWANTED if p != "*.bin"])
                return Checkpoint(name, folder, local_tensors(folder, allow_pickle=True), revision=commit)
            if not (folder / adapters.CONFIG).is_file():
                raise
            file = adapters.WEIGHTS
            headers = {file: huggingface_hub.parse_safetensors_file_metadata(repo, file, revision=commit)}
        with suppress(EntryNotFoundError):
            huggingface_hub.hf_hub_download(repo, _STATISTICS, revision=commit)
    except CheckpointError:
        raise
    except Exception as error:  # the client raises many kinds; all mean that the reference cannot be had
        raise CheckpointError(
            f"cannot be had from the Hub: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=name,
            mend=f"check the name and the network, or download it where there is one (hf download {repo}) "
            "and give the folder",
        ) from None
    tensors = {}
    for file, parsed in headers.items():
        header = {
            key: {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
            for key, t in parsed.tensors.items()
        }
        infos = tensor_infos(header, 0, 1 << 62, Path(name) / file, file)
        tensors.update({info.name: info for info in infos})
    checkpoint = Checkpoint(name, folder, tensors, revision=commit)

    def fetch() -> None:
        place = snapshot(commit, allow_patterns=_WEIGHTS, ignore_patterns=_UNWANTED)
        checkpoint.path, checkpoint.tensors = place, local_tensors(place)

    checkpoint._fetch = fetch
    return checkpoint
