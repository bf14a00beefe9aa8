"""Fine-tuning on transformers' own Trainer."""

from merganser.training.classification import fine_tune, prepare_base
from merganser.training.fine_tune import Trained, train
from merganser.training.multitask import Part, TrainedParts, train_multitask
from merganser.training.settings import TrainingSettings, defaults

__all__ = [
    "Part",
    "Trained",
    "TrainedParts",
    "TrainingSettings",
    "defaults",
    "fine_tune",
    "prepare_base",
    "train",
    "train_multitask",
]
