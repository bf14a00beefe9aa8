"""What lies in a folder, byte for byte: told without any code of merganser."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

#: Where the object store keeps what it does not show.
HIDDEN = "store/.unfinished"


class Tree(dict[str, str]):
    """Path → SHA-256 of a file, ``/`` for a folder, where a link leads."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if HIDDEN in name:
                continue
            if path.is_symlink():
                self[name] = f"-> {path.readlink()}"
            elif path.is_dir():
                self[name] = "/"
            else:
                self[name] = hashlib.sha256(path.read_bytes()).hexdigest()

    def text(self, name: str) -> str | None:
        """A file, while the folder is as it was."""
        path = self.root / name
        return path.read_text() if path.is_file() else None


def is_whole(path: Path) -> bool:
    """Whether a file whose bytes differ from run to run is complete in itself."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        if len(data) < 8:
            return False
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return len(data) == 8 + length + max(ends, default=0)
    if path.suffix == ".json":
        try:
            json.loads(data)
        except ValueError:
            return False
    return bool(data)
