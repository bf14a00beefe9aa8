"""Collecting: run a model over its owner's data, and keep the statistics that a merge needs."""

from merganser.collection.collector import Collector, collect_statistics
from merganser.collection.run import collect

__all__ = ["Collector", "collect", "collect_statistics"]
