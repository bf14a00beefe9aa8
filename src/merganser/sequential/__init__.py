"""Merging layer after layer with data at hand: statistics of inputs that have passed through merged lower layers."""

from merganser.sequential.regmean_pp import merge_regmean_pp

__all__ = ["merge_regmean_pp"]
