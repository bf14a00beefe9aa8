"""A full checkpoint as the target of a plan: which file each tensor goes to, and the small files around the weights.

With heads kept separate, the shared tensors are one set of shards, each contributor's own tensors lie in
``heads/<name>/head.safetensors``, and an index in each folder joins the two: ``from_pretrained`` opens the root (with
the first contributor's head) and ``heads/<name>`` alike, and nothing is stored twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from merganser.checkpoints import Checkpoint, open_checkpoint
from merganser.checkpoints.adapter_configuration import resize, untied
from merganser.checkpoints.model_view import view_of
from merganser.checkpoints.reader import TensorHash, read_json
from merganser.checkpoints.tokenizer_files import add_tokens, is_tokenizer_file
from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec, index_json, shard
from merganser.errors import CheckpointError, UserError
from merganser.files import Staging, local_path, new_remote_folder, parse_size, space_error
from merganser.merging.chat_templates import write_chat_template
from merganser.merging.configuration import merged_config
from merganser.merging.execution import TensorRecord, storable
from merganser.merging.inputs import Inputs, Parent
from merganser.merging.judging import NOTHING_JUDGED, Verdict
from merganser.merging.outputs import check_remote, merge_output, remote_problems
from merganser.merging.plan import BUFFER, HEADS, KEPT, Plan, Step
from merganser.merging.provenance import model_card, public_name, write_provenance
from merganser.methods import Merged
from merganser.tensors import DTYPES, is_floating
from merganser.text import code, listed

_SPARE = 64_000_000  # bytes for everything that is not weights
_CONFIG, _INDEX = "config.json", "model.safetensors.index.json"


@dataclass(frozen=True)
class Layout:
    """Where the tensors go.

    Attributes:
        files: the tensors of each file, as named inside it.
        places: file and name inside it of each tensor of the result.
        heads: the folder of each contributor's own tensors, by its number, and their names.
    """

    files: dict[str, list[TensorSpec]]
    places: dict[str, tuple[str, str]]
    heads: dict[int, tuple[str, list[str]]]


def make_layout(plan: Plan) -> Layout:
    """Derive the layout from the plan."""
    heads: dict[int, tuple[str, list[str]]] = {}
    for step in plan.steps:
        if step.method == KEPT:
            folder, _, own = step.unit.names[0].rpartition("/")
            heads.setdefault(step.takers[0], (folder, []))[1].append(own)
    root = [spec for spec in plan.outputs if plan.file_of(spec.name)[0] is None]
    stem = _inside(plan, "model")
    files = shard(root, stem, parse_size(plan.recipe.max_shard_size)) if root else {}
    apart = any(folder.startswith(f"{HEADS}/") for folder in plan.folders)
    if apart and len(files) == 1:  # a lone model.safetensors would be taken for the whole model
        files = {f"{stem}-00001-of-00001.safetensors": root}
    places = {spec.name: (file, spec.name) for file, specs in files.items() for spec in specs}
    for spec in plan.outputs:
        file, inside = plan.file_of(spec.name)
        if file is not None:
            files.setdefault(file, []).append(TensorSpec(inside, spec.dtype, spec.shape))
            places[spec.name] = (file, inside)
    return Layout(files, places, heads)


def _inside(plan: Plan, file: str) -> str:
    """A file of the model's own, as seen from the result's folder."""
    return f"{plan.main}/{file}" if plan.main else file


_MADE = """Made with merganser: {}. `provenance.json` holds the recipe, the plan, the hash of every parent and of every
tensor, and the method that was really used for each; `merganser verify` checks it and `merganser reproduce` repeats the
merge byte for byte."""


class RecordingTarget:
    """What becomes of each tensor of a result, without writing it.

    Args:
        plan: what is carried out.
        names: the only tensors that count; all by default.

    Attributes:
        records: what became of each tensor.
        total: bytes of the work.
    """

    def __init__(self, plan: Plan, names: Collection[str] | None = None) -> None:
        self.records: dict[str, TensorRecord] = {}
        self._specs = {name: spec for name, spec in plan.specs.items() if names is None or name in names}
        self._hashes: dict[str, TensorHash] = {}
        self.total = sum(spec.nbytes for spec in self._specs.values())

    def take(self, step: Step, firsts: Mapping[str, int], merged: Merged) -> int:
        """Take the tensors of a slice that count."""
        done = 0
        for name, tensor in merged.tensors.items():
            if (spec := self._specs.get(name)) is not None:
                dtype = DTYPES[spec.dtype]
                free = step.reason == BUFFER  # whose numbers may be infinite
                stored = tensor.to(dtype).contiguous() if free else storable(tensor, dtype, name, step.method)
                self._put(name, stored, firsts[name])
                self._hashes.setdefault(name, TensorHash(spec.dtype, spec.shape, "blake3")).update(stored)
                done += stored.nbytes
        return done

    def finish(self, step: Step, note: str | None) -> None:
        """Note what became of the tensors."""
        for name in step.unit.names:
            if name in self._specs:
                digest = self._hashes.pop(name).hexdigest()
                self.records[name] = TensorRecord(digest, step.method, step.reason, note)

    def _put(self, name: str, stored: Tensor, first: int) -> None:
        """Rows of a tensor as they are stored, from row ``first`` on."""


class CheckpointTarget(RecordingTarget):
    """The weight files of a result, being written. Use as a context manager, see :class:`SafetensorsWriter`.

    Args:
        plan: what is carried out.
        layout: where each tensor goes.
        folder: receives the files; thrown away by the caller when anything goes wrong.
        files: the only files to write; all by default.
    """

    def __init__(self, plan: Plan, layout: Layout, folder: Path, files: Collection[str] | None = None) -> None:
        wanted = {file: specs for file, specs in layout.files.items() if files is None or file in files}
        super().__init__(plan, {name for name in plan.specs if layout.places[name][0] in wanted})
        self._places = layout.places
        self._writer, self._open = SafetensorsWriter(folder, wanted), ExitStack()

    def __enter__(self) -> CheckpointTarget:
        self._open.enter_context(self._writer)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def _put(self, name: str, stored: Tensor, first: int) -> None:
        self._writer.write(*self._places[name], stored, first)


def complete(
    plan: Plan,
    reference: Parent,
    layout: Layout,
    folder: Path,
    records: Mapping[str, TensorRecord],
    people: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any] | None,
    made: str = _MADE,
    *,
    verdict: Verdict = NOTHING_JUDGED,
    **more: Any,
) -> None:
    """Write the card and the provenance, when everything else is there.

    Args:
        plan: what was done.
        reference: whose side files the result has.
        layout: where each tensor went.
        folder: of the result.
        records: what became of each tensor.
        people, base: see :func:`merganser.merging.provenance.describe_inputs`.
        made: what the card says of how it was made.
        verdict: what was found of the statistics, for both.
        more: what else provenance is to say.
    """
    nested = bool(reference.checkpoint.modules)
    front = {
        "base_model": list(dict.fromkeys(public_name(one["model"], one["revision"]) for one in people)),
        "base_model_relation": "merge",
        "library_name": "sentence-transformers" if nested else "transformers",
    }
    listing = "\n".join(
        "- " + code(f'from_pretrained(folder, subfolder="{head}")') for head, _ in layout.heads.values()
    )
    heads = (
        f"\n## Heads\n\nEach contributor's own head is kept under `{HEADS}/`; the root opens with the first. "
        f"Download the whole folder, then\n\n{listing}\n"
    )
    sections = (heads if layout.heads else "") + verdict.section()
    card = model_card(
        plan, people, records, front=front, made=made, sections=sections, notes=plan.notes + verdict.notes
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    more |= verdict.record()
    write_provenance(plan, folder, records, people, base, layout.files, layout.places, **more)


def write_small_files(plan: Plan, inputs: Inputs, layout: Layout, folder: Path) -> None:
    """Everything but weights, card and provenance: configuration, tokenizer, indices, heads.

    Files are copied byte for byte from the reference, the tokenizer's from the model whose order of tokens the rows
    have; ``config.json`` changes only where the merge changed what it says (labels, vocabulary, storage dtype).
    """
    tokens, reference = _tokenizer_of(plan, inputs), inputs.reference
    _copy(reference.checkpoint, folder, tokenizer=None if tokens is reference else False)
    if tokens is not reference:
        _copy(tokens.checkpoint, folder, tokenizer=True)
    if plan.vocabulary is not None and plan.vocabulary.added:
        others = [parent.checkpoint.tokenizer_path for parent in inputs.parents]
        add_tokens(tokens.checkpoint.tokenizer_path, plan.vocabulary.added, others).save_pretrained(folder)
    if plan.chat_template is not None:
        write_chat_template(folder, plan.chat_template)
    _write_config(reference.checkpoint, folder / plan.main, _config_of(plan, inputs, reference))
    for inner in plan.folders:
        if not inner.startswith(f"{HEADS}/"):
            config = read_json(folder / inner / _CONFIG, missing={})
            if changes := _stated_dtype(plan, config, inner):
                _put_config({**config, **changes}, folder / inner)
    _write_indices(plan, layout, folder)
    for number, (head, _) in layout.heads.items():
        checkpoint = inputs.parents[number].checkpoint
        config = checkpoint.model_path / _CONFIG
        if not config.is_file():
            raise CheckpointError("has no config.json", where=checkpoint.name, mend="restore it")
        shutil.copyfile(config, folder / head / _CONFIG)
        if plan.own_vocabularies:
            _copy(checkpoint, folder / head, tokenizer=True)
        _write_config(checkpoint, folder / head, _config_of(plan, inputs, inputs.parents[number], head=True))


def _tokenizer_of(plan: Plan, inputs: Inputs) -> Parent:
    """Whose tokenizer the result has."""
    if plan.vocabulary_from < 0 and inputs.base is not None:
        return inputs.base
    return inputs.parents[plan.vocabulary_from] if plan.vocabulary_from > 0 else inputs.reference


def _copy(checkpoint: Checkpoint, folder: Path, *, tokenizer: bool | None) -> None:
    """Copy the files beside the weights: those of the tokenizer, all others, or (None) both."""
    for file, path in checkpoint.side_paths().items():
        if tokenizer is None or is_tokenizer_file(file) == tokenizer:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / file)


def _write_config(checkpoint: Checkpoint, folder: Path, config: Mapping[str, Any]) -> None:
    """``config.json`` anew where the merge changes what it says, or an adapter what its base says."""
    if config != read_json(checkpoint.model_path / _CONFIG, missing={}):
        _put_config(config, folder)


def _put_config(config: Mapping[str, Any], folder: Path) -> None:
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_indices(plan: Plan, layout: Layout, folder: Path) -> None:
    shared = {name: file for name, (file, _) in layout.places.items() if plan.file_of(name)[0] is None}
    size = sum(plan.specs[name].nbytes for name in shared)
    beside = {name: PurePosixPath(file).name for name, file in shared.items()}
    index, up = folder / plan.main / _INDEX, "../" * len(PurePosixPath(plan.main).parts)
    if layout.heads or len(set(shared.values())) > 1:
        index.write_bytes(index_json(beside, size))
    for number, (head, names) in layout.heads.items():
        (folder / head).mkdir(parents=True, exist_ok=True)
        total = size + sum(plan.specs[f"{head}/{name}"].nbytes for name in names)
        outward = {name: f"../../{file}" for name, file in shared.items()}
        inward = dict.fromkeys(names, "head.safetensors")
        (folder / head / _INDEX).write_bytes(index_json({**outward, **inward}, total))
        if number == 0:  # the root opens with the first contributor's head
            inner = dict.fromkeys(names, f"{up}{head}/head.safetensors")
            index.write_bytes(index_json({**beside, **inner}, total))


def _config_of(plan: Plan, inputs: Inputs, own: Parent, *, head: bool = False) -> dict[str, Any]:
    """The configuration of the result, or of a contributor's head in a folder of its own."""
    shared = not head or plan.vocabulary is not None  # then token ids are those of the root's tokenizer
    config = merged_config(plan.recipe, inputs, own, _tokenizer_of(plan, inputs) if shared else None)
    if plan.vocabulary is not None:  # whose heights are those of the models that have to fit together
        people = inputs.people  # of which the first stands for the first contributor, under other names perhaps
        before = plan.vocabulary.heights[people.index(own) if own in people else 0]
        config = resize(config, before, plan.vocabulary.size)
    if plan.labels is not None and not head:
        config["id2label"] = {str(i): label for i, label in enumerate(plan.labels)}
        config["label2id"] = {label: i for i, label in enumerate(plan.labels)}
    config = untied(config) if plan.untied else config
    return {**config, **_stated_dtype(plan, config)}


def check_opening(folder: Path, reference: Checkpoint) -> list[UserError]:
    """What does not open as a whole of a result that is written: every model folder in it, from its headers.

    What the reference itself lacks, or has too much, is let be: it opens no better.

    Args:
        folder: of the result.
        reference: the contributor whose names it has.
    """
    written, problems = open_checkpoint(folder), list[UserError]()
    heads = sorted(path.parent for path in folder.glob(f"{HEADS}/*/{_CONFIG}"))
    shapes = [{name: info.shape for name, info in one.tensors.items()} for one in (written, reference)]
    if not heads and shapes[0] == shapes[1] and _without_dtype(written.config) == _without_dtype(reference.config):
        return []  # it opens as the reference does
    known = view_of(reference)
    for place in [folder, *heads]:
        found = view_of(open_checkpoint(place))
        if known.model is None or found.model is None:
            continue
        wrong = [f"{name} is {list(has)} instead of {list(wanted)}" for name, (has, wanted) in found.mismatched.items()]
        if place == folder:
            wrong += [f"{name} is missing" for name in found.missing if name not in known.missing]
            wrong += [f"{name} has no place" for name in sorted(found.unused - known.unused)]
        if wrong:
            text = f"the result would not open as a whole with its configuration: {listed(wrong, 5)}"
            mend = "give contributors whose configurations describe their own weights"
            problems.append(CheckpointError(text, where=reference.name, mend=mend))
    return problems


def _stated_dtype(plan: Plan, config: Mapping[str, Any], inner: str | None = None) -> dict[str, Any]:
    """What a configuration should say of the dtype: from_pretrained opens a model in the one that is stated.

    Args:
        plan: of the merge.
        config: as it is.
        inner: the folder of a further module that it belongs to; None: the model itself.
    """
    file = None if inner is None else plan.folders[inner]
    stored = {DTYPES[s.dtype] for s in plan.outputs if is_floating(s.dtype) and plan.file_of(s.name)[0] == file}
    name = str(stored.pop()).removeprefix("torch.") if len(stored) == 1 else None
    return _with_dtype(config, name) if name else {}


def _without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what it says of the dtype, which no shape depends on."""
    found = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    return {key: _without_dtype(value) if isinstance(value, dict) else value for key, value in found.items()}


def _with_dtype(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The entries of a configuration that state another dtype, corrected; those of its parts too."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and value is not None and value != name:
            found[key] = name
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            inner = _with_dtype(value, name)
            found |= {key: {**value, **inner}} if inner else {}
    return found


def output_problems(output: str | Path, overwrite: bool, reads: Sequence[Path], nbytes: int) -> list[UserError]:
    """Why a result cannot be written; what a command that was killed has left there is tidied up first.

    Args:
        output: a folder, or an fsspec URL.
        overwrite: whether an earlier result may be replaced.
        reads: folders and files that are read.
        nbytes: of the weights, as far as they are written on this machine.

    Raises:
        FileError: the URL cannot be reached.
    """
    folder = local_path(output)
    if folder is None:
        return remote_problems(str(output), overwrite, nbytes + _SPARE)
    found = merge_output(folder, reads, overwrite=overwrite).problems()
    return found or [problem for problem in [space_error(folder, nbytes + _SPARE)] if problem is not None]


@contextmanager
def new_output(output: str | Path, overwrite: bool, reads: Sequence[Path] = ()) -> Iterator[Staging]:
    """A folder to fill, which becomes the output when everything is there; nothing is left of it after an error."""
    folder = local_path(output)
    if folder is None:
        with new_remote_folder(str(output), check_remote(overwrite)) as staging:
            yield staging
    else:
        with merge_output(folder, reads, overwrite=overwrite).new() as work:
            yield Staging(work, str(work.resolve()))
