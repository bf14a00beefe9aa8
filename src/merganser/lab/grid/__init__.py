"""Experiments as grids of independent cells: configuration, models from the zoo, cells, result rows."""
