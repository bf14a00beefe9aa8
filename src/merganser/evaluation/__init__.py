"""Scoring models and ensembles on data sets."""

from merganser.evaluation.result import Evaluation, Score
from merganser.evaluation.run import ENSEMBLE, evaluate

__all__ = ["ENSEMBLE", "Evaluation", "Score", "evaluate"]
