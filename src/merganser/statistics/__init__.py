"""Statistics that a data owner publishes with a checkpoint: collection, the file format, algebra."""

from merganser.statistics.collection import collect_statistics
from merganser.statistics.format import (
    FILE_NAME,
    PROTOCOL,
    FisherKind,
    LayerStatistics,
    Statistics,
    StatisticsHeader,
)
from merganser.statistics.writing import write_statistics

__all__ = [
    "FILE_NAME",
    "PROTOCOL",
    "FisherKind",
    "LayerStatistics",
    "Statistics",
    "StatisticsHeader",
    "collect_statistics",
    "write_statistics",
]
