"""From a recipe to a plan to a merged folder with its provenance."""
