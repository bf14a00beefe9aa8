"""merganser: fuse fine-tuned language models by merging their weights, without anyone's training data."""
__version__ = "0.1.0"
