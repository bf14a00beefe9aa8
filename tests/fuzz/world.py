"""A small sound example of everything that strangers can send: models, statistics, a merge, a ledger, a zoo, rows.

The models have two layers. Everything is made by the library's own commands and lies in one folder, so that a run of
the fuzzer changes one file, runs one command and puts the file back.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

#: What lies outside of every input and must not be found in any output.
SECRET = "a-secret-that-nobody-sends"
#: Made by whatever code a changed input brings along, if anything runs it.
RAN = "code-was-run"
#: Of every model.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MOODS = {"LABEL_0": "bad no not", "LABEL_1": "good liked yes"}


class _Runs:
    """What a hostile pickle holds: it makes a file when it is loaded without ``weights_only``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def make_world(root: Path) -> Path:
    """Make ``root/in`` (the inputs) and ``root/outside`` (a secret, code that leaves a mark), and return the first.

    Args:
        root: an existing folder; paths in the files are absolute, so it cannot be moved afterwards.
    """
    folder = root / "in"
    folder.mkdir()
    _write_outside(root)
    _write_models(folder)
    _write_rows(folder)
    _write_merges(folder)
    _write_lab(folder)
    return folder


def _write_outside(root: Path) -> None:
    import pickle

    outside = root / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(f"{SECRET}\n")
    (outside / "secret.json").write_text(json.dumps({"text": SECRET, "label": SECRET, SECRET: SECRET}))
    (outside / "marked.bin").write_bytes(pickle.dumps(_Runs(root / RAN)))
    (outside / "marked.py").write_text(f"import os\nos.mkdir({str(root / RAN)!r})\n")


def _write_models(folder: Path) -> None:
    import torch
    import transformers

    from adapter_examples import adapt_linears
    from conftest import make_model, save_tokenizer

    for seed, name in enumerate(("base", "a", "b")):
        model = make_model("bert", seed, num_labels=2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name, "bert")
    shutil.copytree(folder / "a", folder / "sharded")
    (folder / "sharded" / "model.safetensors").unlink()
    transformers.BertForSequenceClassification.from_pretrained(folder / "a").save_pretrained(
        folder / "sharded", max_shard_size="8KB"
    )
    adapt_linears(folder / "adapter", folder / "base", ("query", "value"))
    _write_sentence_model(folder / "sentences", folder / "a")
    for seed, name in enumerate(("dense", "expert-1", "expert-2")):
        make_model("llama", seed).save_pretrained(folder / name)
        save_tokenizer(folder / name, "llama")
    for name in ("base", "a", "b", "dense", "expert-1", "expert-2"):
        (folder / name / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _write_sentence_model(folder: Path, model: Path) -> None:
    """A sentence-transformers model: the transformer in a folder of its own, then pooling."""
    shutil.copytree(model, folder / "0_Transformer")
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {}, "similarity_fn_name": "cosine"})
    )


def _write_rows(folder: Path) -> None:
    import random

    import pyarrow
    import pyarrow.parquet

    def made(seed: int) -> list[dict[str, Any]]:
        draw = random.Random(seed)
        texts = []
        for number in range(12 + seed):
            more = draw.choices(["the", "a", "movie", "food"], k=draw.randrange(1, 6))
            texts.append(f"{MOODS[f'LABEL_{number % 2}']} {' '.join(more)}")
        return [{"text": text, "label": number % 2} for number, text in enumerate(texts)]

    target, rows = folder / "rows", made(0)
    target.mkdir()
    (target / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made(1)))
    (target / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (target / "rows.json").write_text(json.dumps(rows))
    for name, mark in (("rows.csv", ","), ("rows.tsv", "\t")):
        lines = [mark.join(("text", "label")), *(f"{row['text']}{mark}{row['label']}" for row in rows)]
        (target / name).write_text("\n".join(lines) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target / "rows.parquet")
    (target / "rows.txt").write_text("".join(f"{row['text']}\n" for row in rows))
    for name in ("one", "two"):
        (folder / "sets" / name).mkdir(parents=True)
        for split in ("train", "dev", "test"):
            named = [{**row, "label": f"LABEL_{row['label']}"} for row in rows]
            (folder / "sets" / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))


def _write_merges(folder: Path) -> None:
    """Statistics, and what is made of them: merges, a ledger, recipes."""
    import random

    import yaml

    import merganser
    from fuzz.recipes import draw_file
    from merganser.merging import ledger

    for name, rows in (("a", "rows.jsonl"), ("b", "more.jsonl")):
        merganser.collect(folder / name, folder / "rows" / rows, fisher="expected")
    shutil.copy(folder / "a" / "merge_statistics.safetensors", folder / "statistics.safetensors")
    merganser.merge([folder / "a", folder / "b"], folder / "merged", method="regmean")
    for name, model in (("ledger", "b"), ("second", "a")):
        ledger.init(folder / name, folder / "base")
        ledger.add(folder / name, folder / model)
    recipe = {
        "contributors": [
            {"model": str(folder / "a"), "coefficient": 1.0, "name": "first"},
            {"model": str(folder / "b"), "coefficient": 2.0, "statistics": str(folder / "b")},
        ],
        "method": "regmean",
        "base": str(folder / "base"),
        "options": {"alpha": 0.9, "ridge": 0.0},
        "exclude": ["*embeddings*"],
        "keep_separate": ["classifier*"],
        "dtype": "F32",
        "max_shard_size": "5GB",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for file, made in (("rules", "rules"), ("mergekit", "mergekit"), ("stages", "stages"), ("moe", "experts")):
        draw_file(made, random.Random(0), folder / f"{file}.yaml")


def _write_lab(folder: Path) -> None:
    """A zoo with a model, an experiment that could use it, and result rows."""
    import yaml

    from lab.report.synthetic import all_at_once
    from merganser.lab.zoo import Zoo

    zoo = Zoo(folder / "zoo")

    def copy(target: Path) -> dict[str, object]:
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / "a" / file, target / file)
        return {"score": 0.5, "labels": ["LABEL_0", "LABEL_1"]}

    entry = zoo.build({"suite": "text-classification", "set": "one", "model": "tiny", "seed": 1}, copy)
    zoo.attach(
        entry, "statistics/ab.safetensors", lambda path: bool(shutil.copy(folder / "statistics.safetensors", path))
    )
    shutil.copytree(folder / "zoo" / entry.id, folder / "zoo-entry")
    experiment = {
        "name": "trial",
        "suite": {"name": "text-classification", "root": str(folder / "sets"), "limits": {"train": 8}},
        "pretrained": {"model": str(folder / "base"), "title": "{title}"},
        "templates": {"title": "tiny"},
        "training": {"epochs": 1, "learning_rate": 5e-3, "max_length": 16},
        "statistics": {"examples": 16, "fisher_examples": 8},
        "contributors": {"one": {"load_from_zoo": "maybe"}, "two": {}},
        "layout": "pairs",
        "methods": ["simple", {"method": "regmean", "options": {"alpha": 0.9}, "search": {"grid": 3}}],
        "seeds": [1, 2],
        "tests": {"out_of_domain": ["two"], "out_split": "all"},
    }
    (folder / "parent.yaml").write_text(yaml.safe_dump({"batch_size": 16}))
    (folder / "experiment.yaml").write_text(yaml.safe_dump({"extends": "parent.yaml", **experiment}))
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in all_at_once()[3:]))
