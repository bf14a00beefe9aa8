"""Fine-tuning on transformers' own Trainer."""

from merganser.training.fine_tune import Trained, prepare_base, train
from merganser.training.multitask import Part, TrainedParts, train_multitask
from merganser.training.settings import TrainingSettings, defaults

__all__ = [
    "Part",
    "Trained",
    "TrainedParts",
    "TrainingSettings",
    "defaults",
    "prepare_base",
    "train",
    "train_multitask",
]
