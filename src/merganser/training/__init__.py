"""Fine-tuning on transformers' own Trainer."""

from merganser.training.fine_tune import prepare_base, train
from merganser.training.multitask import Trained, train_multitask
from merganser.training.prepare import TrainingPart
from merganser.training.settings import TrainingSettings, defaults

__all__ = ["Trained", "TrainingPart", "TrainingSettings", "defaults", "prepare_base", "train", "train_multitask"]
