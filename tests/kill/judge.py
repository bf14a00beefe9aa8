"""What may be there after a kill: the old result or the new one, whole, and nothing else once the command has rerun.

Behind a URL, where nothing can be exchanged in one step, the new result may also lie whole beside its place, with a
manifest. What opens as a model meanwhile must be one of the two all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kill.cases import BUCKET, Case, keys
from kill.trees import Tree, is_whole

KINDS = ("old result lost", "half a result", "litter", "rerun failed", "other")
_OPENERS = ("config.json", "modules.json", "adapter_config.json")

#: Kind of a fault, and what is to be known of it.
Fault = tuple[str, str]


def opens(name: str) -> bool:
    """Whether a model is opened by this file."""
    return name.rpartition("/")[2] in _OPENERS


@dataclass(frozen=True)
class Judge:
    """Compares what lies in the world with what was there before a command, and after one that nobody stopped.

    Attributes:
        case: the command.
        before, after: the world.
        volatile: files whose bytes differ from run to run, such as those with a time.
    """

    case: Case
    before: Tree
    after: Tree
    volatile: frozenset[str]

    def state(self, tree: Tree) -> tuple[str, list[Fault]]:
        """What is there of the result (``old``, ``new``, ``beside`` or ``half``), and what is wrong with everything."""
        old, new, found = (self.case.view(one) for one in (self.before, self.after, tree))
        faults = list(self._changed(tree, old))
        if self.case.resumed:  # rows come one by one
            lost = [name for name in old if found.get(name) != old[name]]
            made = {name: one for name, one in found.items() if ".partial-" not in name}  # the rest is litter or none
            half = [name for name, one in made.items() if name not in old and not self._same(tree, name, one, new)]
            state = "new" if found.keys() == new.keys() else "old"
        elif found == old:
            return ("beside" if self._is_beside(tree, new) else "old"), faults
        elif found.keys() == new.keys() and all(self._same(tree, name, one, new) for name, one in found.items()):
            return "new", faults
        elif self._is_beside(tree, new):
            state, lost = "beside", list[str]()
            half = [] if not any(map(opens, found)) or any(_is_whole(found, one) for one in (old, new)) else list(found)
        else:
            state = "half"
            lost = list(old) if not found or (any(map(opens, old)) and not any(map(opens, found))) else []
            half = [] if lost else list(found)
        faults += [("old result lost", _some(lost))] * bool(lost) + [("half a result", _some(half))] * bool(half)
        return state, faults

    def litter(self, tree: Tree) -> Iterator[Fault]:
        """What neither the state before nor the state after has; of work that is resumed, scratch alone."""
        found = sorted(tree.keys() - self.before.keys() - self.after.keys())
        if left := [name for name in found if name.startswith("tmp/") or not self.case.resumed]:
            yield "litter", _some(left)

    def rerun(self, tree: Tree) -> Iterator[Fault]:
        """What differs from the world after a run that nobody stopped."""
        if litter := sorted(tree.keys() - self.after.keys()):
            yield "litter", f"after the next command: {_some(litter)}"
        if missing := sorted(self.after.keys() - tree.keys()):
            yield "rerun failed", f"missing after it: {_some(missing)}"
        if differing := [
            name for name in tree if name in self.after and not self._same(tree, name, tree[name], self.after)
        ]:
            yield "rerun failed", f"not as without the kill: {_some(differing)}"

    def _changed(self, tree: Tree, old: Mapping[str, str]) -> Iterator[Fault]:
        """Files besides the result that are not as they were, nor as they are to be."""
        there = [name for name in self.before if name not in old and not name.startswith("store/")]
        wrong = [name for name in there if tree.get(name) not in (self.before[name], self.after.get(name))]
        if found := [name for name in wrong if name not in self.volatile]:
            yield "other", f"changed besides: {_some(found)}"

    def _is_beside(self, tree: Tree, new: Mapping[str, str]) -> bool:
        """Whether the new result lies whole in a prefix of its own, with a manifest."""
        place, stored = f"{BUCKET}/{self.case.prefix}", keys(tree)
        for manifest in (
            key for key in stored if key.startswith(f"{place}.partial-") and key.endswith("/manifest.json")
        ):
            files = f"{manifest.removesuffix('manifest.json')}files/"
            staged = {place + key.removeprefix(files[:-1]): one for key, one in stored.items() if key.startswith(files)}
            if self.case.prefix and staged == new:
                return True
        return False

    def _same(self, tree: Tree, name: str, one: str, wanted: Mapping[str, str]) -> bool:
        return is_whole(tree.root / name) if name in self.volatile else wanted.get(name) == one


def _is_whole(found: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether what can be opened has all its files, and those of no other result; some of it may be closed."""
    rest = {name: one for name, one in found.items() if not opens(name)}
    return rest == {name: one for name, one in wanted.items() if not opens(name)} and all(
        wanted.get(name) == one for name, one in found.items()
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
