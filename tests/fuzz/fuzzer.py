"""One run: a sound world, one change, one command, and what may not happen.

A run is known by its kind and its number: ``Fuzzer(root).run("adapter", 17)`` always does the same.
"""

from __future__ import annotations

import gc
import math
import os
import random
import re
import shutil
import signal
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from fuzz import child
from fuzz.kinds import KINDS, Kind, Target
from fuzz.mutations import FORMS, add_file, change_bytes, change_file, change_words
from fuzz.recipes import draw_file
from fuzz.seals import seal
from fuzz.world import RAN, SECRET, make_world

SECONDS, MEMORY = 5.0, 1 << 30
#: A screenful of an error, generously, and what a command may print in all.
ERROR_LINES, ERROR_CHARACTERS, OUTPUT_CHARACTERS = 60, 6_000, 200_000
#: What a terminal would act upon: control characters but line ends and tabs, and those that turn the direction.
_ACTS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

#: Commands that keep something on purpose when they fail: a ledger, finished cells, a repetition that differs,
#: intermediate results.
_KEEPING = ("ledger add", "experiment", "reproduce", "stages.yaml")
#: The class of no change at all: a command that refuses what it reads then is at fault.
SOUND = "none"
_Cache = type(lru_cache(lambda: None))
_ERROR = re.compile(r"^[\w.]*(?:Error|Exception|Exit|Interrupt|Panic)\w*:.*", re.MULTILINE)

Snapshot = dict[str, tuple[Any, ...]]


@dataclass
class Run:
    """What became of a run.

    Attributes:
        kind: of the input.
        number: of the run.
        change: the class of the change.
        file: that was changed.
        command: that was run.
        faults: what happened that may not, by sort: ``traceback``, ``slow``, ``memory``, ``escape``, …
    """

    kind: str
    number: int
    change: str
    file: str
    command: str
    status: int = 0
    seconds: float = 0.0
    memory: int = 0
    output: str = ""
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def accepted(self) -> str:
        """The class of a change that a command accepted; empty where it did not."""
        return f"{self.file}: {self.change}" if self.status == 0 and not self.faults else ""


def prepare() -> None:
    """Import everything that commands import, and keep libraries quiet; the environment must be set before."""
    import merganser.cli as cli

    for name, value in cli.QUIET.items():
        os.environ.setdefault(name, value)
    import matplotlib  # noqa: F401
    import peft  # noqa: F401
    import sentence_transformers  # noqa: F401
    import transformers

    transformers.logging.disable_progress_bar()


class Fuzzer:
    """Runs in a world of their own.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.inputs = make_world(self.root)
        self.out, self.home, self.scratch = self.root / "out", self.root / "home", self.root / "scratch"
        for folder in (self.out, self.home, self.scratch, self.root / "tmp"):
            folder.mkdir()
        (self.identity,) = (path.name for path in (self.inputs / "zoo").iterdir() if not path.name.startswith("."))
        self._kept = self.root / "kept"
        for name in ("in", "outside"):
            shutil.copytree(self.root / name, self._kept / name)
        self._sound = {name: _snapshot(self.root / name) for name in ("in", "outside")}
        self._environment = {"HOME": str(self.home), "TMPDIR": str(self.root / "tmp"), "COLUMNS": "100"}
        self._warm()

    def _warm(self) -> None:
        """Run every command once on sound inputs here, so that forks find everything imported.

        Raises:
            UserError: one of them fails.
        """
        for kind in KINDS.values():
            for number in range(len(kind.commands)):
                self._in_process(kind.commands[number])
                self._restore()
        _forget()

    def _in_process(self, command: str) -> None:
        import io
        from contextlib import chdir, redirect_stderr, redirect_stdout

        from merganser.cli import cli

        self._prepare_output(command)
        old = {name: os.environ.get(name) for name in self._environment}
        os.environ.update(self._environment)
        with chdir(self.inputs), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            cli.main(args=self._arguments(command), prog_name="merganser", standalone_mode=False)
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

    def run(self, kind_name: str, number: int) -> Run:
        """Change a file of a kind, run a command that reads it, and put everything back."""
        kind = KINDS[kind_name]
        draw = random.Random(f"{kind_name} {number}")
        target = draw.choices(kind.targets, [3 if not at else 1 for at in range(len(kind.targets))])[0]
        command = kind.commands[draw.choice(target.commands or range(len(kind.commands)))]
        words = self._arguments(command)
        if target.file:
            change = self._change(draw, kind, target)
        else:
            words, change = change_words(draw, words, self.root)
        return self._finish(Run(kind_name, number, change, target.file, command), kind, words)

    def _change(self, draw: random.Random, kind: Kind, target: Target) -> str:
        path = self.inputs / target.file.format(id=self.identity)
        if target.made:
            draw_file(target.made, draw, path)
            if draw.random() < 0.1:
                return SOUND
        if kind.models and draw.random() < 0.05:
            return add_file(draw, self.inputs / draw.choice(kind.models), self.root)
        sort = draw.choices(("form", "bytes", "file"), (7 if target.form else 0, 2, 1))[0]
        if sort == "file":
            others = sorted(self.inputs / name for name, entry in self._sound["in"].items() if entry[0] == "file")
            return change_file(draw, path, self.root, others)
        if sort == "bytes":
            return change_bytes(draw, path)
        change = FORMS[target.form](draw, path, self.root)
        if target.seal and draw.random() < 0.8:
            path = seal(target.seal, path)
            self._moved = path.parent.name
        return change

    def _prepare_output(self, command: str) -> None:
        """A ledger to add to, where the command adds to one of its own."""
        if command.startswith("ledger add {out}"):
            shutil.copytree(self.inputs / "ledger", self.out / "ledger")

    def _arguments(self, command: str) -> list[str]:
        """The words of a command; the zoo's model is called as its folder is now."""
        identity = next(iter(sorted(p.name for p in (self.inputs / "zoo").iterdir() if p.name[0] != ".")), "none")
        return [word.format(out=self.out, id=identity) for word in command.split()]

    def _finish(self, run: Run, kind: Kind, arguments: list[str]) -> Run:
        """Run the command, find its faults and put everything back."""
        self._prepare_output(run.command)
        run.command = " ".join(word[:500] for word in arguments).replace(f"{self.root}/", "")
        before = {name: _snapshot(self.root / name) for name in ("in", "outside")}
        old = {name: os.environ.get(name) for name in self._environment}
        os.environ.update(self._environment)
        outcome = child.run(arguments, self.inputs, self.out, self.scratch, self.root / "outside")
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        run.status, run.seconds, run.memory = outcome.status, outcome.seconds, outcome.memory
        error, printed = (part.decode(errors="replace") for part in (outcome.error, outcome.output))
        run.output = f"{printed}{error}"
        run.faults = self._faults(run, kind, outcome, before)
        if "traceback" not in run.faults:
            lines, most = error.count("\n"), math.inf if "--json" in run.command else OUTPUT_CHARACTERS
            if len(error) > ERROR_CHARACTERS or lines > ERROR_LINES or len(printed) > most:
                run.faults["long"] = f"{len(error)} characters in {lines} lines, {len(printed)} of output"
        self._restore()
        return run

    def _faults(self, run: Run, kind: Kind, outcome: child.Outcome, before: dict[str, Snapshot]) -> dict[str, str]:
        faults: dict[str, str] = {}
        text = run.output
        if "Traceback (most recent call last)" in text or outcome.status == 1 or outcome.status > 2:
            named = _ERROR.findall(text)
            faults["traceback"] = (named or text.strip().splitlines() or ["nothing"])[-1][:200]
        if run.change == SOUND and outcome.status == 2:
            faults["refused"] = text[:500]
        if outcome.seconds > SECONDS or (outcome.status == -signal.SIGKILL and outcome.memory < child.MEMORY_LIMIT):
            faults["slow"] = f"{outcome.seconds:.1f} s, {outcome.waited:.1f} s of the clock"
        if outcome.memory > MEMORY:
            faults["memory"] = f"{outcome.memory >> 20} MiB"
        if outcome.status < 0 and not faults:
            faults["killed"] = f"signal {-outcome.status}"
        for event in [event for event in outcome.events if event.startswith(child.UNUSABLE)]:
            faults["unusable"] = event.removeprefix(child.UNUSABLE)
            outcome.events.remove(event)
        if found := _ACTS.search(text):
            faults["control"] = f"{found[0]!r} after {text[max(0, found.start() - 60) : found.start()]!r}"
        if escapes := self._escapes(run, kind, outcome, before):
            faults["escape"] = "; ".join(escapes[:5])
        return faults

    def _escapes(self, run: Run, kind: Kind, outcome: child.Outcome, before: dict[str, Snapshot]) -> list[str]:
        """What was changed, copied, opened or run that should not have been."""
        found = []
        if (self.root / RAN).exists():
            (self.root / RAN).rmdir()
            found.append("code was run")
        for name in ("in", "outside"):
            after = _snapshot(self.root / name)
            for file in sorted(set(after) | set(before[name])):
                allowed = name == "in" and bool(kind.writes) and file.partition("/")[0] == kind.writes
                if after.get(file) != before[name].get(file) and not allowed and not file.startswith("zoo/.locks"):
                    found.append(f"{name}/{file} changed")
        made = sorted(self.out.rglob("*"))
        for path in made:
            if path.is_symlink():
                found.append(f"a link in the output: {path.name}")
            elif path.is_file() and path.stat().st_size < 50 << 20 and SECRET.encode() in path.read_bytes():
                found.append(f"the secret is in {path.name}")
            if ".partial" in path.name or path.name.startswith(".tmp"):
                found.append(f"litter: {path.relative_to(self.out)}")
        if SECRET in run.output and not (kind.own or run.file in run.command.split()):
            found.append("the secret was printed")
        left = [path for path in made if path.is_file() and "locks" not in str(path)]
        if run.status == 2 and left and not any(word in run.command for word in _KEEPING):
            found.append(f"an output in spite of the error: {left[0].relative_to(self.out)}")
        found += [f"litter in TMPDIR: {path.name}" for path in (self.root / "tmp").iterdir()]
        own = kind.own or run.file in run.command.split()  # a file that the user names may lie anywhere
        opened = [event for event in outcome.events if not event.startswith("open ") or not own]
        return found + sorted(set(opened))

    def _restore(self) -> list[str]:
        """Put every file back that is not as it was; returns their names."""
        put = []
        for name, sound in self._sound.items():
            folder, now = self.root / name, _snapshot(self.root / name)
            for file in sorted(set(now) - set(sound), reverse=True):
                _remove(folder / file)
            for file, entry in sorted(sound.items()):
                if now.get(file) != entry:
                    put.append(file)
                    _remove(folder / file)
                    if entry[0] == "folder":
                        (folder / file).mkdir()
                    else:
                        (folder / file).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy2(self._kept / name / file, folder / file)
        for folder in (self.out, self.home, self.root / "tmp"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return put


def _forget() -> None:
    """Empty the library's caches, in which what was read of the sound files would hide what is done to them."""
    from merganser.checkpoints import model_view

    for item in gc.get_objects():
        if type(item) is _Cache and str(item.__module__).startswith("merganser"):
            item.cache_clear()
    model_view._views.clear()


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _snapshot(folder: Path) -> Snapshot:
    """What lies in a folder: of files a hash, of what cannot be read its sort."""
    found: Snapshot = {}
    for above, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(above) / name
            state = path.lstat()
            place = str(path.relative_to(folder))
            if stat.S_ISLNK(state.st_mode):
                found[place] = ("link", os.readlink(path))  # noqa: PTH115
            elif stat.S_ISDIR(state.st_mode):
                found[place] = ("folder",)
            elif not stat.S_ISREG(state.st_mode):
                found[place] = ("special", state.st_mode)
            elif state.st_size > 64 << 20:
                found[place] = ("large", state.st_size, state.st_mtime_ns)
            else:
                found[place] = ("file", blake3(path.read_bytes()).hexdigest())
    return found
