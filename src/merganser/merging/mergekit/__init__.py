"""Configurations of mergekit: read strictly, translated into our recipes, and carried out in stages."""

from merganser.merging.mergekit.schema import Configuration, is_mergekit, read_configuration
from merganser.merging.mergekit.stages import (
    Stage,
    explain_stages,
    make_intermediates,
    read_stages,
    ready_stages,
    stage_recipe,
)
from merganser.merging.mergekit.translation import Translation, translate

__all__ = [
    "Configuration",
    "Stage",
    "Translation",
    "explain_stages",
    "is_mergekit",
    "make_intermediates",
    "read_configuration",
    "read_stages",
    "ready_stages",
    "stage_recipe",
    "translate",
]
