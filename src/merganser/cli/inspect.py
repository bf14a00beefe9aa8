"""``merganser inspect``: looking at what is there."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click

from merganser.cli.common import print_table, quiet_libraries, tell
from merganser.files import human_bytes


@click.command("inspect")
@click.argument("path", metavar="PATH")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin (weights_only).")
@click.option("--validate", is_flag=True, help="Read a whole statistics file: finite, positive semi-definite.")
def inspect_command(path: str, as_json: bool, validate: bool, allow_pickle: bool) -> None:
    """Show what a model folder, a Hub reference or a statistics file holds."""
    quiet_libraries()
    is_statistics = Path(path).is_file() and Path(path).suffix == ".safetensors"
    found = _statistics(Path(path), validate) if is_statistics else _checkpoint(path, allow_pickle)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    tables = found.pop("tables")
    for key, value in found.items():
        shown = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        tell(f"{key.replace('_', ' ')}: {shown}")
    for title, (columns, rows) in tables.items():
        print_table(title, columns, [[str(cell) for cell in row] for row in rows])


def _checkpoint(reference: str, allow_pickle: bool) -> dict[str, Any]:
    from merganser.checkpoints import open_checkpoint
    from merganser.merging.provenance import FILE_NAME, manifest_of, read_provenance
    from merganser.statistics import FILE_NAME as STATISTICS

    checkpoint = open_checkpoint(reference, allow_pickle=allow_pickle, codes=True)
    infos = checkpoint.tensors.values()
    dtypes = Counter(info.dtype for info in infos)
    sizes = {dtype: sum(info.nbytes for info in infos if info.dtype == dtype) for dtype in dtypes}
    found: dict[str, Any] = {
        "model": checkpoint.name,
        "architecture": (checkpoint.config.get("architectures") or ["unknown"])[0],
        "model_type": checkpoint.config.get("model_type", "unknown"),
        "weights": human_bytes(sum(info.nbytes for info in infos)),
        "files": sorted({info.file for info in infos}),
    }
    if (quantisation := checkpoint.quantisation) is not None:
        read = "read as BF16" if quantisation.readable else "its codes cannot be read as weights, and are not merged"
        found["quantisation"] = f"{quantisation.name}, {read}"
    if checkpoint.modules:
        found["modules"] = [f"{module.path or '.'} ({module.kind})" for module in checkpoint.modules]
    labels = checkpoint.config.get("id2label")
    if labels:
        found["labels"] = list(labels.values())
    rows = [[dtype, count, human_bytes(sizes[dtype])] for dtype, count in dtypes.items()]
    tables: dict[str, Any] = {"tensors": (["dtype", "tensors", "size"], rows)}
    if (checkpoint.home.path / STATISTICS).is_file():
        inner = _statistics(checkpoint.home.path, False)
        tables.update(inner.pop("tables"))
        found["statistics"] = inner
    if (checkpoint.path / FILE_NAME).is_file():
        provenance = read_provenance(checkpoint.path)
        found["merged_by"] = provenance["recipe"]["method"]
        columns = ["contributor", "coefficient", "hash of its weights"]
        rows = [[p["model"], f"{p['coefficient']:g}", ":".join(manifest_of(p))] for p in provenance["parents"]]
        tables["contributors"] = (columns, rows)
        counts = Counter((entry["method"], entry["reason"] or "") for entry in provenance["tensors"].values())
        tables["methods really used"] = (
            ["method", "tensors", "why not the method"],
            [[method, count, reason] for (method, reason), count in counts.items()],
        )
    return {**found, "tables": tables}


def _statistics(path: Path, validate: bool) -> dict[str, Any]:
    from merganser.statistics import Statistics

    statistics = Statistics.open(path)
    if validate:
        statistics.validate()
    header = statistics.header
    kinds = Counter(layer.kind for layer in header.layers)
    return {
        "statistics": str(path),
        "size": human_bytes(path.stat().st_size),
        "protocol": header.protocol,
        "storage": statistics.storage,
        "examples": header.examples,
        "tokens": header.tokens,
        "masking": header.masking,
        "fisher": header.fisher or "none",
        **({"kfac": header.kfac} if header.kfac else {}),
        "label": header.label,
        f"weights_{header.hash_kind}": header.manifest_hash,
        "versions": dict(header.versions),
        "notes": list(header.notes),
        **({"validated": "finite, symmetric, positive semi-definite"} if validate else {}),
        "tables": {"layers with statistics": (["kind", "layers"], [[kind, count] for kind, count in kinds.items()])},
    }
