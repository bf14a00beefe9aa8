"""The ledger: the sums of a merge on disk, so that contributors join and leave one at a time.

A Gram merge depends on its contributors through sums alone. A ledger keeps them, with the base model as the fixed
reference of all differences, so that any site can add without the others' weights or statistics, at a cost that does
not grow with their number. See docs/ledger.md.
"""

from merganser.merging.ledger.record import LedgerError, LedgerMember, LedgerRecord
from merganser.merging.ledger.result import solve
from merganser.merging.ledger.verbs import add, combine, init, remove, show

__all__ = ["LedgerError", "LedgerMember", "LedgerRecord", "add", "combine", "init", "remove", "show", "solve"]
