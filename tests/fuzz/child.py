"""One command in a forked process: what it prints, how long it takes, how much memory, what it opens and leaves.

The process that forks has imported everything, so that a run costs what the command itself costs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Seconds of processor time after which a run is stopped, seconds in which it does nothing, and seconds of the clock,
#: which a busy machine needs more of.
CPU_LIMIT, IDLE_LIMIT, WALL_LIMIT = 8, 4, 60
#: Bytes above the forking process at which a run is stopped, so that the machine survives it.
MEMORY_LIMIT = 3 << 30
#: Bytes of the largest file that a run may write.
FILE_LIMIT = 1 << 30
#: Begins what is noted of an output that cannot be used.
UNUSABLE = "unusable: "


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        status: its exit status; negative: the signal that stopped it.
        output: what it printed on standard output.
        error: what it printed on standard error.
        seconds: of processor time.
        waited: seconds of the clock.
        memory: bytes above the forking process.
        events: what the interpreter was asked to open or start, as the audit hook saw it.
    """

    status: int
    output: bytes
    error: bytes
    seconds: float
    waited: float
    memory: int
    events: list[str] = field(default_factory=list)


def run(arguments: list[str], folder: Path, output: Path, scratch: Path, watched: Path) -> Outcome:
    """Run a command line of merganser in a fork.

    Args:
        arguments: of the command line.
        folder: the working directory.
        output: where the command writes; a model there has to open.
        scratch: for what is recorded of the run, outside of everything that is compared.
        watched: a folder whose files nobody should open.
    """
    printed, told, events = scratch / "printed", scratch / "told", scratch / "events"
    for path in (printed, told, events):
        path.unlink(missing_ok=True)
        path.touch()
    sys.stdout.flush()
    sys.stderr.flush()
    base, began = _look_at(os.getpid())[2], time.monotonic()
    child = os.fork()
    if child == 0:
        _child(arguments, folder, output, (printed, told), events, watched)
    status, usage = _wait(child, base, began)
    base, *seen = events.read_text(errors="replace").splitlines() or [base]
    return Outcome(
        os.waitstatus_to_exitcode(status),
        printed.read_bytes()[: 64 << 20],
        told.read_bytes()[: 64 << 20],
        usage.ru_utime + usage.ru_stime,
        time.monotonic() - began,
        usage.ru_maxrss * 1024 - int(base),  # its own at the start: a fork does not take all pages over
        seen,
    )


def _wait(child: int, base: int, began: float) -> tuple[int, Any]:
    """Wait for the child, and kill it when it takes too much memory, too long, or waits for something for ever."""
    pause, used, since = 0.002, -1, began
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage
        now = time.monotonic()
        state, processor, memory = _look_at(child)
        if processor != used or state == "R":
            used, since = processor, now
        if now - began > WALL_LIMIT or now - since > IDLE_LIMIT or memory - base > MEMORY_LIMIT:
            os.kill(child, signal.SIGKILL)
        time.sleep(pause)
        pause = min(0.02, pause * 1.2)


def _look_at(pid: int) -> tuple[str, int, int]:
    """State, ticks of processor time and bytes of memory of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return "Z", 0, 0
    return fields[0], int(fields[11]) + int(fields[12]), int(fields[21]) * resource.getpagesize()


def _unusable(model: Path, parts: bool) -> str:
    """Why a merged model cannot be used: it does not open, opens with other keys, or holds NaN; empty where it can.

    Args:
        model: the folder that was written; where there is none, or no plain transformers model, nothing is said.
        parts: its heads lie in folders of their own, so that they are missing.
    """
    file = next((file for file in ("adapter_config.json", "config.json") if (model / file).is_file()), None)
    if file is None:
        return ""
    import torch

    try:
        made, told = _open(model, json.loads((model / file).read_text()))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wrong = {name: sorted(map(str, keys))[:3] for name, keys in told.items() if keys}
    if parts:
        wrong.pop("missing_keys", None)
    if wrong:
        return str(wrong)
    written = ("lora_", "modules_to_save") if file == "adapter_config.json" else ("",)  # the rest is the base's own
    tensors = {name: one for name, one in made.state_dict().items() if any(part in name for part in written)}
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    return f"not finite: {broken[:3]}" if broken else ""


def _open(model: Path, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model, or an adapter on the base that its configuration names, and what was missing or too much in it."""
    import peft
    import torch
    import transformers

    if "peft_type" in values:
        path = Path(values["base_model_name_or_path"])
        try:
            base, told = _open(path, json.loads((path / "config.json").read_text()))
        except Exception:  # the base does not open, or there is none: that is not the adapter's fault
            return torch.nn.Module(), {}
        return peft.PeftModel.from_pretrained(base, model), told
    writes = str((values.get("architectures") or [""])[0]).endswith("ForCausalLM")
    opens = transformers.AutoModelForCausalLM if writes else transformers.AutoModelForSequenceClassification
    return opens.from_pretrained(model, output_loading_info=True)  # type: ignore[no-any-return]


def _child(
    arguments: list[str], folder: Path, output: Path, printed: tuple[Path, Path], events: Path, watched: Path
) -> None:
    """Run the command and leave the process, whatever happens."""
    status = 70
    try:
        os.setsid()
        for number, path in enumerate(printed, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = open(1, "w", encoding="utf-8", errors="strict", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        faulthandler.enable(2)  # what dies of a signal says where
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
        os.fsync = lambda descriptor: None  # nobody pulls the plug here, and disks are slow
        os.chdir(folder)
        Path(events).write_text(f"{_look_at(os.getpid())[2]}\n")
        _audit(os.open(events, os.O_WRONLY | os.O_APPEND), str(watched))
        from merganser.cli import main

        try:
            main(arguments)
        except SystemExit as leave:
            status = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
        if status == 0 and (problem := _unusable(output / "model", "--keep-separate" in arguments)):
            with events.open("a") as stream:
                stream.write(f"{UNUSABLE}{problem!r:.300}\n")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        status = 1
    finally:
        os._exit(status)


def _audit(descriptor: int, watched: str) -> None:
    """Note every opening of a watched file, and every start of another program or connection."""
    started = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn", "socket.connect"}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            name = os.fsdecode(arguments[0])
            if "\0" not in name and os.path.realpath(name).startswith(watched):
                os.write(descriptor, f"open {name!r}\n".encode())
        elif event in started:
            os.write(descriptor, f"{event} {arguments!r:.200}\n".encode())

    sys.addaudithook(hook)
