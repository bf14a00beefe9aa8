"""Fine-tuning on transformers' own Trainer."""

from merganser.training.classification import fine_tune, prepare_base

__all__ = ["fine_tune", "prepare_base"]
