"""Merged folders of each kind beside their parents, and copies that may be changed, for tests of tampering."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from merganser.checkpoints import hash_tensor, sha256_file
from merganser.merging import merge
from merganser.merging.provenance import FILE_NAME, file_digest, own_hash, read_provenance
from merganser.tensors import DTYPE_NAMES
from sentence_examples import save_encoder

Record = dict[str, Any]
Family = Callable[..., tuple[Path, list[Path]]]
KINDS = ("regmean", "ties", "heads", "sentences", "adapter")


def merged_trees(family: Family) -> dict[str, Path]:
    """The folders of a merge of each kind; each lies beside its parents, which it knows by their bare names."""
    base, models = family("bert", 2)
    tree = base.parent
    for model in models:
        (model / "chat_template.jinja").write_text("{{ messages }}")
        (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        (model / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nduck\n")
    for seed in (1, 2):
        save_encoder(tree / f"sentence-{seed}", seed)
    names, here = ["tuned-0", "tuned-1"], Path.cwd()
    os.chdir(tree)
    try:
        merge(names, "regmean", coefficients=[1, 2], max_shard_size="20kB")
        merge(names, "ties", method="ties", base="base")
        merge(names, "heads", method="regmean", keep_separate=["classifier.*"], names="first")
        merge(["sentence-1", "sentence-2"], "sentences", method="simple")
        merge(names, "adapter", method="ties", base="base", as_adapter=4)
    finally:
        os.chdir(here)
    return {kind: tree / kind for kind in KINDS}


class Copy:
    """A merge's folder that may be changed; the parents too, if asked for."""

    def __init__(self, kind: str, original: Path, place: Path, *, parents: bool = False) -> None:
        self.tree = place
        for path in original.parent.iterdir():
            if path.name == kind or (path.name not in KINDS and parents):
                shutil.copytree(path, place / path.name)
            elif path.name not in KINDS:
                (place / path.name).symlink_to(path, target_is_directory=True)
        self.folder = place / kind
        self.record: Record = read_provenance(self.folder)

    def write(self, *, thorough: bool) -> None:
        """Write the record down, with every hash that a thorough tamperer makes right."""
        if thorough:
            self.record["sha256"] = own_hash(self.record)
        (self.folder / FILE_NAME).write_text(json.dumps(self.record))

    def hash_files(self) -> None:
        """Give the record the hashes of the files and tensors that are there."""
        plan = self.record["plan"]
        above = {file: f"{inner}/" for inner, file in plan.get("folders", {}).items()}
        files = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in (FILE_NAME, "README.md"):
                weights = path.suffix == ".safetensors"
                files[name] = file_digest(path, "blake3:") if weights else sha256_file(path)
                for tensor, value in (load_file(path) if weights else {}).items():
                    entry = self.record["tensors"].setdefault(
                        above.get(name, "") + tensor, {"method": "average", "reason": None, "note": None}
                    )
                    entry["blake3"] = hash_tensor(value, DTYPE_NAMES[value.dtype], "blake3")
        self.record["files"] = files
