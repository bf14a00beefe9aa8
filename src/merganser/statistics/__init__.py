"""Statistics that a data owner publishes with a checkpoint: the file format, reading, writing and arithmetic."""

from merganser.statistics.format import FILE_NAME, PROTOCOL, FisherKind, KfacKind, LayerStatistics, StatisticsHeader
from merganser.statistics.reading import Statistics
from merganser.statistics.writing import write_statistics

__all__ = [
    "FILE_NAME",
    "PROTOCOL",
    "FisherKind",
    "KfacKind",
    "LayerStatistics",
    "Statistics",
    "StatisticsHeader",
    "write_statistics",
]
