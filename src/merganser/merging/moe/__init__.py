"""Mixtures of experts: dense models' feed-forward blocks side by side, with a router in each layer."""

from merganser.merging.moe.build import build_moe
from merganser.merging.moe.config import Expert, MoeConfig

__all__ = ["Expert", "MoeConfig", "build_moe"]
