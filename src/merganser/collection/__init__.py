"""Collecting: run a model over its owner's data, and keep the statistics that a merge needs."""

from merganser.collection.collector import Collector, collect_statistics
from merganser.collection.run import CollectResult, collect

__all__ = ["CollectResult", "Collector", "collect", "collect_statistics"]
