"""Kills commands between any two things that they do to files, and has the same commands run again."""

from __future__ import annotations

import random
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kill.cases import FIRST, Case, Command, make_world
from kill.child import Ended, Stop, run
from kill.judge import KINDS, Fault, Judge
from kill.trees import Tree

#: Acts after which something is there, or is not any more, for whoever looks.
_WEIGHTY = re.compile(r"os\.(rename|remove|rmdir|mkdir|link|symlink)|fcntl\.flock")
_LAST = 12  # acts that are all met
_ASKED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass
class Findings:
    """What came of the kills of a case.

    Attributes:
        windows: how many moments there are between two acts.
        met: those of them that a kill has met.
        kills: how many there were.
        faults: what went wrong.
    """

    windows: int = 0
    met: set[int] = field(default_factory=set)
    kills: int = 0
    faults: list[Fault] = field(default_factory=list)


class Harness:
    """One world, put back before each command.

    Args:
        place: an empty folder.
        seed: of what is killed when.
    """

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.world, self.logs, self._first = place, place / "world", place / "logs", place / "first"
        self.random = random.Random(seed)
        self.logs.mkdir()
        make_world(self.world)
        for command in FIRST:
            self._succeed(command)
        self.world.rename(self._first)

    def run_case(self, case: Case, kills: int) -> Findings:
        """Kill a command some times."""
        self._restore(self._first)
        for command in case.before:
            self._succeed(command)
        start = Path(tempfile.mkdtemp(dir=self.place)) / "start"
        self.world.rename(start)
        trees, ended = [], []
        for _ in range(2):  # what differs between two runs is no fault
            self._restore(start)
            before = Tree(self.world)
            ended.append(self._succeed(case.command))
            trees.append(Tree(self.world))
        volatile = frozenset(name for name, one in trees[1].items() if trees[0].get(name, one) != one)
        judge = Judge(case, before, trees[0], volatile)
        if case.view(before) == case.view(trees[0]):
            raise RuntimeError(f"{case.name}: the command changes nothing")
        if left := [name for name in trees[0] if name.startswith("tmp/")]:
            raise RuntimeError(f"{case.name}: scratch is left by a command that nobody stopped: {left}")
        findings = Findings(windows=len(ended[0].acts))
        for stop in self._stops(ended[0], kills):
            self._restore(start)
            killed = run(case.command, self.world, self.logs, stop)
            act = ""
            if stop.act is not None:
                findings.met.add(stop.act)
                act = f" ({ended[0].acts[stop.act]})"
            findings.kills += 1
            findings.faults += [(kind, f"{stop}{act}: {what}") for kind, what in self._look(judge, stop, killed)]
        shutil.rmtree(start.parent)
        return findings

    def _look(self, judge: Judge, stop: Stop, ended: Ended) -> Iterator[Fault]:
        """What is wrong after a stop, and after the same command has run again."""
        case, tree = judge.case, Tree(self.world)
        state, faults = judge.state(tree)
        yield from faults
        if stop.act is not None:  # by the clock it may come before the command has begun, or when it is through
            if "Traceback" in ended.said:
                yield "other", f"a traceback: {ended.said[-800:]}"
            if stop.signal in _ASKED and ended.status < 0:
                yield "other", "the signal is not answered"
        if stop.signal in _ASKED and state != "beside":
            yield from judge.litter(tree)
        again = run(case.command, self.world, self.logs)
        if again.status == 2 and state in ("new", "beside") and case.again is not None:  # it is there: that is said
            now, faults = judge.state(Tree(self.world))
            yield from faults if now == "new" else [("rerun failed", f"{again.said[-800:]}, and the result is {now}")]
            again = run(case.again, self.world, self.logs) if case.again != case.command else again
        if again.status and not (again.status == 2 and state == "new" and case.again == case.command):
            yield "rerun failed", f"exit status {again.status}: {again.said[-800:]}"
        else:
            yield from judge.rerun(Tree(self.world))

    def _stops(self, whole: Ended, kills: int) -> list[Stop]:
        """The windows near the end and around what changes names first, then others; an eighth by the clock."""
        n = len(whole.acts)
        weighty = [i for i, act in enumerate(whole.acts) if _WEIGHTY.match(act)]
        first = {j for i in weighty for j in (i, i + 1) if j < n} | set(range(max(0, n - _LAST), n))
        rest = sorted(set(range(n)) - first)
        by_act = kills - kills // 8
        chosen = self.random.sample(sorted(first), min(len(first), by_act))
        chosen += self.random.sample(rest, min(len(rest), by_act - len(chosen)))
        acts = [Stop(self._signal(number), act) for number, act in enumerate(chosen)]
        times = [
            whole.seconds * self.random.random() ** 0.5 for _ in range(kills - len(acts))
        ]  # the later the likelier
        return acts + [Stop(self._signal(number), None, seconds) for number, seconds in enumerate(times)]

    def _signal(self, number: int) -> signal.Signals:
        """Every fourth is one that a command can answer."""
        return self.random.choice(_ASKED) if number % 4 == 3 else signal.SIGKILL

    def _succeed(self, command: Command) -> Ended:
        ended = run(command, self.world, self.logs)
        if ended.status:
            raise RuntimeError(f"{' '.join(command)} ends with {ended.status}: {ended.said}")
        return ended

    def _restore(self, start: Path) -> None:
        shutil.rmtree(self.world, ignore_errors=True)
        shutil.copytree(start, self.world, symlinks=True)


def table(findings: Mapping[str, Findings]) -> str:
    """The findings as people read them."""
    rows = [["", "windows", "met", "kills", *KINDS]]
    for name, found in findings.items():
        counts = Counter(kind for kind, _ in found.faults)
        rows.append([name, *map(str, (found.windows, len(found.met), found.kills, *(counts[kind] for kind in KINDS)))])
    rows.append(["all", *(str(sum(int(row[i]) for row in rows[1:])) for i in range(1, len(rows[0])))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
