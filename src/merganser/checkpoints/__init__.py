"""Reading and writing model folders: lazy tensors, hashes, names of layers on disk."""

from merganser.checkpoints.adapter_changes import ChangesCheckpoint, NothingChanged, lack_their_base, open_changes
from merganser.checkpoints.adapters import AdapterCheckpoint
from merganser.checkpoints.header import TensorInfo
from merganser.checkpoints.opening import open_checkpoint
from merganser.checkpoints.pickles import PickledWeights
from merganser.checkpoints.quantisation import QuantisedWeights
from merganser.checkpoints.quantised import CodedCheckpoint, QuantisedCheckpoint
from merganser.checkpoints.reader import Checkpoint, hash_tensor, sha256_file

__all__ = [
    "AdapterCheckpoint",
    "ChangesCheckpoint",
    "Checkpoint",
    "CodedCheckpoint",
    "NothingChanged",
    "PickledWeights",
    "QuantisedCheckpoint",
    "QuantisedWeights",
    "TensorInfo",
    "hash_tensor",
    "lack_their_base",
    "open_changes",
    "open_checkpoint",
    "sha256_file",
]
