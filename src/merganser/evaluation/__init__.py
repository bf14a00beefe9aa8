"""Scoring models and ensembles on data sets."""
