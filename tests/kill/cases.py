"""What is killed: commands that write, the state that they start from, and where their results lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
import yaml

from conftest import make_model, save_tokenizer
from kill.store import PROTOCOL
from kill.trees import Tree
from lab.grid.conftest import write_suite

Command = Sequence[str]
#: The files of the result, by name, of everything that lies in the world.
View = Callable[[Tree], Mapping[str, str]]

BUCKET = "bucket"
_DATA = [
    "the food was good",
    "a bad movie",
    "I liked it , yes !",
    "Anna saw Acme in Paris",
    "not very good .",
    "no - no",
]


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes:
        name: as the table shows it.
        command: arguments of ``merganser``.
        view: its result.
        before: commands that make the state that it starts from.
        share: of all kills; a case with more to do, or more to lose, has more.
        replaces: whether the same command may run again when its result is there. Where it may not, it ends with exit
            status 2, and is run with ``--overwrite`` if it has such a flag.
        resumed: whether what is finished of the work is kept on purpose when the command is stopped.
    """

    name: str
    command: Command
    view: View
    before: Sequence[Command] = ()
    share: float = 1.0
    replaces: bool = False
    resumed: bool = False

    @property
    def again(self) -> Command | None:
        """The command where its result is there already, and it says so; None where it has nothing against that."""
        flagged = self.command[0] in ("merge", "collect", "stats")
        return None if self.replaces else [*self.command, "--overwrite"] if flagged else self.command

    @property
    def prefix(self) -> str:
        """Where in the bucket the result goes; empty where it goes into a folder."""
        found = next((part for part in self.command if part.startswith(f"{PROTOCOL}://")), "")
        return found.removeprefix(f"{PROTOCOL}://{BUCKET}/")


def folder(name: str) -> View:
    """Everything in a folder, or a file."""
    return lambda tree: {path: one for path, one in tree.items() if path == name or path.startswith(f"{name}/")}


def objects(prefix: str) -> View:
    """The objects below a prefix of the bucket."""
    return lambda tree: {key: one for key, one in keys(tree).items() if key.startswith(f"{BUCKET}/{prefix}/")}


def keys(tree: Tree) -> dict[str, str]:
    """Everything in the object store."""
    return {unquote(path.removeprefix("store/")): one for path, one in tree.items() if path.startswith("store/")}


def sums(name: str) -> View:
    """What a ledger says, and the sums that it names."""

    def view(tree: Tree) -> dict[str, str]:
        record = tree.text(f"{name}/ledger.json")
        named = yaml.safe_load(record)["file"] if record else None
        return {path: tree[path] for path in (f"{name}/ledger.json", f"{name}/{named}") if path in tree}

    return view


def cells(name: str) -> View:
    """The rows of an experiment."""
    return lambda tree: {path: one for path, one in tree.items() if path.startswith(f"{name}/cells/")}


def make_world(world: Path) -> None:
    """Three fine-tunes with a tokenizer, their base, data, a grid to run, scratch space and an empty store."""
    for name in ("tmp", "store"):
        (world / name).mkdir(parents=True)
    for number, name in enumerate(("base", "a", "b", "c")):
        model = make_model("bert", 0)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * bool(number) * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(world / name)
        save_tokenizer(world / name, "bert")
    for number, name in enumerate(("dense", "expert-1", "expert-2")):
        make_model("llama", number).save_pretrained(world / name)
    experts = [{"source_model": name, "positive_prompts": ["x"]} for name in ("expert-1", "expert-2")]
    (world / "moe.yaml").write_text(yaml.safe_dump({"base_model": "dense", "gate_mode": "random", "experts": experts}))
    first = {"name": "first", "merge_method": "linear", "models": [_weighed("a"), _weighed("b")]}
    last = {"merge_method": "task_arithmetic", "base_model": "base", "models": [_weighed("first"), _weighed("c")]}
    (world / "stages.yaml").write_text(yaml.safe_dump_all([first, last]))
    (world / "data.txt").write_text("\n".join(_DATA * 4) + "\n")
    write_suite(world / "suite")
    grid = {
        "name": "trial",
        "suite": {"name": "emotion", "root": str(world / "suite")},
        "pretrained": {"model": str(world / "base"), "title": "tiny"},
        "training": {"epochs": 1, "learning_rate": 5e-3, "max_length": 16},
        "statistics": {"examples": 16},
        "contributors": ["one", "two"],
        "layout": "pairs",
        "methods": ["simple", "regmean"],
        "comparators": ["individual"],
    }
    for file, seeds in (("half.yaml", [1]), ("whole.yaml", [1, 2])):
        (world / file).write_text(yaml.safe_dump({**grid, "seeds": seeds}))


def _weighed(model: str) -> dict[str, Any]:
    return {"model": model, "parameters": {"weight": 0.5}}


#: Run once in a new world, so that every case finds statistics.
FIRST: list[Command] = [["collect", model, "--data", "data.txt"] for model in ("a", "b", "c")]

_MERGE = ["merge", "a", "b", "--threads", "1"]
_SHARDED = [*_MERGE, "--method", "regmean", "--max-shard-size", "20kB"]
_OLD = ["merge", "b", "c", "--method", "simple", "--threads", "1"]
_EXPERIMENT = ["--results", "results", "--zoo", "zoo", "--device", "cpu"]
_EXPERIMENT_AT_URL = ["experiment", "half.yaml", *_EXPERIMENT, "--zoo", f"{PROTOCOL}://{BUCKET}/zoo"]
_LEDGER: list[Command] = [
    ["ledger", "init", "sums", "--base", "base"],
    ["ledger", "add", "sums", "a", "--threads", "1"],
]

CASES = [
    Case("merge", [*_SHARDED, "-o", "out"], folder("out")),
    Case("merge over an old one", [*_SHARDED, "-o", "out", "--overwrite"], folder("out"),
         [[*_OLD, "-o", "out"]], share=2, replaces=True),
    Case("merge to a URL", [*_SHARDED, "-o", f"kept://{BUCKET}/x/out"], objects("x/out"), share=2),
    Case("merge over an old one at a URL", [*_SHARDED, "-o", f"kept://{BUCKET}/out", "--overwrite"], objects("out"),
         [[*_OLD, "-o", f"kept://{BUCKET}/out"]], share=3, replaces=True),
    Case("merge as an adapter", [*_MERGE, "--base", "base", "--as-adapter", "2", "-o", "out", "--overwrite"],
         folder("out"), [[*_MERGE, "--base", "base", "--as-adapter", "1", "-o", "out"]], replaces=True),
    Case("extract over an old one", ["extract", "a", "--base", "base", "--rank", "2", "-o", "out", "--overwrite"],
         folder("out"), [["extract", "b", "--base", "base", "--rank", "1", "-o", "out"]], replaces=True),
    Case("merge in stages", ["merge", "stages.yaml", "-o", "out", "--threads", "1"], folder("out"), resumed=True),
    Case("merge by activations", [*_MERGE, "--method", "activations", "--data", "data.txt", "-o", "out"],
         folder("out")),
    Case("mixture of experts", ["moe", "moe.yaml", "-o", "out"], folder("out")),
    Case("collect", ["collect", "base", "--data", "data.txt"], folder("base/merge_statistics.safetensors")),
    Case("collect over an old one", ["collect", "a", "--data", "data.txt", "--shard-examples", "7", "--overwrite"],
         folder("a/merge_statistics.safetensors"), replaces=True),
    Case("stats compress", ["stats", "compress", "a", "--storage", "bfloat16", "-o", "small.safetensors"],
         folder("small.safetensors")),
    Case("ledger init", ["ledger", "init", "sums", "--base", "base"], sums("sums")),
    Case("ledger add", ["ledger", "add", "sums", "b", "--threads", "1"], sums("sums"), _LEDGER),
    Case("ledger remove", ["ledger", "remove", "sums", "a", "--threads", "1"], sums("sums"),
         [*_LEDGER, ["ledger", "add", "sums", "b", "--threads", "1"]]),
    Case("ledger solve", ["ledger", "solve", "sums", "-o", "out", "--overwrite", "--threads", "1"], folder("out"),
         [*_LEDGER, ["ledger", "solve", "sums", "-o", "out"], ["ledger", "add", "sums", "b"]], replaces=True),
    Case("ledger sum", ["ledger", "sum", "sums", "site", "-o", "total"], sums("total"),
         [*_LEDGER, ["ledger", "init", "site", "--base", "base"], ["ledger", "add", "site", "b"]]),
    Case("experiment", ["experiment", "half.yaml", *_EXPERIMENT], cells("results/trial"), share=0.6,
         replaces=True, resumed=True),
    Case("experiment, zoo at a URL", _EXPERIMENT_AT_URL, cells("results/trial"), share=0.6,
         replaces=True, resumed=True),
    Case("experiment, a larger grid", ["experiment", "whole.yaml", *_EXPERIMENT], cells("results/trial"),
         [["experiment", "half.yaml", *_EXPERIMENT]], share=0.6, replaces=True, resumed=True),
]  # fmt: skip
