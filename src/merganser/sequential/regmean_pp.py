"""RegMean++ (Nguyen et al. 2025, arXiv 2508.03121): RegMean on inputs that have passed through merged lower layers.

    merganser merge A B --method regmean_pp --data a.txt --data b.txt -o merged

Stage after stage (see :mod:`merganser.sequential.stages`), each contributor's own texts run through what is merged
already and through the contributor's own block, whose linear layers' inputs give its Gram matrices there; the block is
merged by RegMean, and the texts run on through the merged block. The Gram matrices become one statistics file a
contributor, and the result is an ordinary merge by RegMean with these files, which can be verified and made again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merganser.checkpoints.layers import Layer, kind_of, layers_of
from merganser.checkpoints.writer import TensorSpec
from merganser.collection.collector import library_versions
from merganser.collection.examples import Examples, encode, find_columns
from merganser.collection.gram import Workers
from merganser.collection.inputs import Wiring, discover
from merganser.collection.masks import (
    Batch,
    batch_masks,
    check_signals,
    describe_masking,
    split_by_length,
    widened,
    without_padding,
)
from merganser.collection.observer import Observer
from merganser.collection.placement import Placement, placed_model
from merganser.errors import ErrorCollector, RecipeError, StatisticsError, raise_all, validated
from merganser.files import local_path, scratch_folder
from merganser.merging.memory import RunSettings
from merganser.merging.merge import MergeResult, carry_out, contributors_of, prepare
from merganser.merging.recipe import Contributor, make_recipe
from merganser.methods import Facts, average
from merganser.methods.regression.regmean import REGMEAN
from merganser.methods.regression.regmean_pp import REGMEAN_PP, RegMeanPPOptions
from merganser.paths import described
from merganser.progress import track
from merganser.sequential.stages import Replay, Stage, find_stages, restricted
from merganser.statistics import LayerStatistics, StatisticsHeader, write_statistics
from merganser.statistics.writing import LazyTensors, TensorGroup, statistics_output
from merganser.tasks import task_for
from merganser.tasks.columns import Columns
from merganser.tasks.data import DataSource, read_rows
from merganser.tasks.feature_extraction import FeatureExtraction
from merganser.tasks.models import open_model, prepare_padding
from merganser.tasks.separate_texts import separate_texts
from merganser.tensors import DTYPE_NAMES, one_thread, unpack_upper
from merganser.text import listed

_TOKENS = 1024  # padded ones of a batch that one thread runs


@dataclass
class _Person:
    """A contributor while the stages are merged.

    Attributes:
        number: its place.
        title: what to call it.
        examples: its texts.
        wiring: of its model.
        batches: the numbers of its batches among all.
        masking, notes: for the header.
        layers: of its statistics so far.
        groups: its statistics so far, each stage in a file.
    """

    number: int
    title: str
    coefficient: float
    examples: Examples
    wiring: Wiring
    batches: range
    tokens: int
    masking: str
    notes: list[str]
    layers: list[LayerStatistics] = field(default_factory=list)
    groups: list[TensorGroup] = field(default_factory=list)


@dataclass(frozen=True)
class _StageShare:
    """One contributor's parameters of a stage, by their names in the model, and its Gram matrices there."""

    number: int
    coefficient: float
    parameters: Mapping[str, Tensor]
    inputs: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        return self.parameters[name].clone()

    stored = tensor

    def gram(self, weight: str) -> Tensor:
        return unpack_upper(self.tensors[f"gram.{self.inputs[weight]}"])

    def mean(self, weight: str) -> Tensor:
        return self.tensors[f"mean.{self.inputs[weight]}"]


def merge_regmean_pp(
    models: Sequence[str | Path | Contributor | Mapping[str, Any]],
    data: Sequence[DataSource],
    output: str | Path,
    *,
    coefficients: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    statistics_folder: str | Path | None = None,
    overwrite: bool = False,
    settings: RunSettings | None = None,
    **recipe: Any,
) -> MergeResult:
    """Merge by RegMean++: layer after layer, with texts of every contributor at hand.

    Args:
        models: the checkpoints, or contributors of a recipe.
        data: what each was trained on, one for each model, as :func:`merganser.collect` takes it.
        output: the folder to write; written whole or not at all.
        coefficients: one weight a model, relative; equal by default.
        options: see :class:`~merganser.methods.regression.regmean_pp.RegMeanPPOptions`.
        statistics_folder: for the statistics files that the result is made from; by default ``OUTPUT-statistics``.
        overwrite: replace what an earlier merge has written.
        settings: how the last merge is run.
        recipe: other keys of :class:`~merganser.merging.Recipe`.

    Returns:
        What was written, by ``regmean`` with the statistics files.

    Raises:
        UserError: anything the user can mend, before any work; several at once as ``Problems``.
    """
    started, settings = time.monotonic(), settings or RunSettings.make()
    chosen = validated(RegMeanPPOptions, dict(options or {}), f"options of {REGMEAN_PP.name}")
    people = contributors_of(models, coefficients)
    if not isinstance(data, list | tuple):
        mend = "give a list, of one for each model: [data of the first, data of the second]"
        raise RecipeError(f"data are a list, and this is {described(data)}", where="data", mend=mend)
    if len(data) != len(people):
        what = f"{len(data)} data for {len(people)} models"
        raise RecipeError(what, where="--data", mend="give one for each model, in order")
    if local_path(output) is None and statistics_folder is None:
        what = "an output elsewhere leaves no place for the statistics that it is made from"
        raise RecipeError(what, where="-o", mend="write into a local folder")
    folder = Path(f"{output}-statistics" if statistics_folder is None else statistics_folder)
    checked = prepare(
        make_recipe({"contributors": people, "method": "simple", **recipe}), output, settings, overwrite=overwrite
    )
    titles = [parent.title for parent in checked.inputs.parents]
    files = [folder / f"{number}-{title}.safetensors" for number, title in enumerate(titles, 1)]
    places = [statistics_output(file, checked.reads, overwrite=overwrite) for file in files]
    raise_all([problem for place in places for problem in place.problems()])
    numbers = [_one_number(parent.contributor.coefficient, parent.title) for parent in checked.inputs.parents]
    with scratch_folder() as scratch:
        done = _Stages(people, titles, numbers, data, chosen, scratch, settings).run()
        folder.mkdir(parents=True, exist_ok=True)
        for person, file, place in zip(done, files, places, strict=True):
            write_statistics(file, _header(person, titles, chosen), LazyTensors(person.groups), output=place)
    final = make_recipe(
        {
            **recipe,
            "contributors": [{**one, "statistics": str(file)} for one, file in zip(people, files, strict=True)],
            "method": "regmean",
            "options": _regmean_options(chosen),
        }
    )
    result = carry_out(prepare(final, output, settings, overwrite=overwrite), output, overwrite=overwrite)
    return MergeResult(result.path, result.plan, time.monotonic() - started, result.verdict)


def _one_number(coefficient: float | tuple[float, ...], title: str) -> float:
    if isinstance(coefficient, tuple):
        mend = "give one number for all layers, or merge by regmean"
        raise RecipeError(f"{REGMEAN_PP.name} has one coefficient for each model", where=title, mend=mend)
    return coefficient


def _regmean_options(options: RegMeanPPOptions) -> dict[str, Any]:
    """RegMean's, for the stages and for the result."""
    return {
        "alpha": options.alpha, "ridge": options.ridge, "augment_bias": options.augment_bias, "embeddings": False,
    }  # fmt: skip


def _header(person: _Person, titles: Sequence[str], options: RegMeanPPOptions) -> StatisticsHeader:
    """Of a contributor's file; the label goes into the provenance of what is merged with it."""
    checkpoint = person.examples.opened.checkpoint
    header = StatisticsHeader(
        layers=tuple(person.layers),
        hash_kind="blake3",
        manifest_hash=checkpoint.manifest_hash("blake3"),
        tensor_hashes={name: checkpoint.hash(name, "blake3") for name in sorted(checkpoint.tensors)},
        examples=len(person.examples),
        tokens=person.tokens,
        masking=person.masking,
        versions=library_versions(),
        label=f"RegMean++ of {listed(list(titles), 8)}: inputs of {person.title} after the merged layers below",
        notes=(
            f"RegMean++: each layer's inputs are of {person.title}'s own texts after the lower layers of the merge of "
            f"{listed(list(titles), 8)} (off-diagonals times {options.alpha:g}); of use in this merge alone",
            f"task: {person.examples.task.name}",
            person.examples.columns_read,
            *person.notes,
        ),
    )
    return header.model_copy(update={"protocol": header.protocol_with(3)})


class _Stages:
    """The merge of all stages: one model in memory, the contributors' parameters stage by stage on the disk."""

    def __init__(
        self,
        people: Sequence[Mapping[str, Any]],
        titles: Sequence[str],
        coefficients: Sequence[float],
        data: Sequence[DataSource],
        options: RegMeanPPOptions,
        scratch: Path,
        settings: RunSettings,
    ) -> None:
        self._people, self._titles, self._coefficients, self._data = people, titles, coefficients, data
        self._options, self._scratch, self._settings = options, scratch, settings
        self._method = REGMEAN.configured(REGMEAN.options_type.model_validate(_regmean_options(options)))
        self._batches: list[Batch] = []
        self._stages: list[Stage] = []

    def run(self) -> list[_Person]:
        """Each contributor with its statistics."""
        errors = ErrorCollector()
        examples = [errors.catch(self._examples, number) for number in range(len(self._people))]
        errors.raise_all()
        model: nn.Module | None = None
        people = []
        for number, own in enumerate(examples):
            if own is None:
                raise RuntimeError("a step failed without an error")
            with placed_model(own.opened, own.task, Placement(), allow_pickle=self._settings.allow_pickle) as loaded:
                people.append(self._person(number, own, loaded))
                model = loaded if model is None else model
        if model is None:
            raise RuntimeError("a recipe has a contributor")
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._put(model, self._averaged(people, len(self._stages), shapes))
        folder = None
        if self._options.activations == "disk":
            folder = self._scratch / "activations"
            folder.mkdir()
        with (
            Workers(self._settings.threads) as workers,
            Replay(model, self._batches, folder) as replay,
            torch.no_grad(),
        ):
            for place, stage in enumerate(track(self._stages, "merging stages", "stages", len(self._stages))):
                shares = [self._observe(model, person, place, stage, workers) for person in people]
                self._put(model, self._merged(model, people[0], stage, shares))
                replay.advance(stage, workers)
        return people

    def _examples(self, number: int) -> Examples:
        """The first texts of a contributor, tokenised; labels are not read but where they are a decoder's inputs."""
        opened = open_model(self._people[number]["model"], allow_pickle=self._settings.allow_pickle)
        rows = read_rows(
            self._data[number], limit=self._options.examples, prefer=("train",), called=f"data {number + 1}"
        )
        task = task_for(self._options.task, opened.config)
        task.check_head(opened)
        columns = Columns()
        separate = separate_texts(rows, opened, columns) if task.name == FeatureExtraction.name else None
        if separate is not None:
            rows, columns = separate.apply(rows), Columns("text")
        found, _ = find_columns(rows, task, opened, columns, None, use_labels=False)
        reader = task.load_reader(opened)
        return encode(rows, task, opened, reader, found, None, self._options.max_length, range(len(rows)))

    def _person(self, number: int, examples: Examples, model: nn.Module) -> _Person:
        """Learn how a contributor's model sees its texts, and put its parameters on the disk, stage by stage."""
        prepare_padding(model, examples.tokenizer)
        batches = [tensors for _, tensors in examples.batches(range(len(examples)), self._options.batch_size, 0)]
        if not batches:
            raise StatisticsError("there are no examples", where=self._titles[number], mend="give at least one text")
        check_signals(batches[0])
        checkpoint = examples.opened.checkpoint
        with torch.no_grad():
            layers = [
                layer
                for layer in layers_of(model, checkpoint)
                if layer.experts is None
                and (layer.kind == "convolution" or len(checkpoint.tensors[layer.weight].shape) == 2)
                and layer.kind != "unknown"
                and hasattr(model.get_submodule(layer.module), "weight")
            ]
            wiring = discover(model, layers, batches[0])
            masking, notes = describe_masking(batches[0], model)
            stages = find_stages(model, wiring, batches[0])
        if not self._stages:
            self._stages = stages
        elif [stage.modules for stage in stages] != [stage.modules for stage in self._stages]:
            what = f"{self._titles[number]} has other blocks than {self._titles[0]}"
            raise StatisticsError(what, where=examples.opened.name, mend="merge models of one architecture")
        pieces = [piece for batch in batches for piece in _pieces(batch, model, wiring)]
        first = len(self._batches)
        self._batches += pieces
        named = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for place, stage in enumerate(self._stages):
            own = {name: named.pop(name) for name in list(named) if stage.holds(name)}
            save_file({name: value.contiguous() for name, value in own.items()}, self._file(number, place))
        save_file({name: value.contiguous() for name, value in named.items()}, self._file(number, len(self._stages)))
        return _Person(
            number, self._titles[number], self._coefficients[number], examples, wiring,
            range(first, len(self._batches)), sum(batch_masks(piece, model).real for piece in pieces), masking,
            [*notes, *wiring.notes],
        )  # fmt: skip

    def _file(self, number: int, place: int) -> Path:
        return self._scratch / f"{number}-{place}.safetensors"

    def _averaged(self, people: Sequence[_Person], place: int, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The average of what is in no stage, of contributors that have the shape of the first."""
        loaded = [load_file(self._file(person.number, place)) for person in people]
        shares: list[Any] = [
            _StageShare(person.number, person.coefficient, own, {}, {})
            for person, own in zip(people, loaded, strict=True)
        ]
        with one_thread():
            return {
                name: average(name, shares)
                for name in loaded[0]
                if all(name in own and own[name].shape == shapes[name] for own in loaded)
            }

    def _observe(self, model: nn.Module, person: _Person, place: int, stage: Stage, workers: Workers) -> _StageShare:
        """A contributor's Gram matrices in a stage: its own parameters on what the merged ones below give."""
        own = load_file(self._file(person.number, place))
        self._put(model, own)
        wiring = restricted(person.wiring, stage)
        layers: tuple[LayerStatistics, ...] = ()
        tensors: dict[str, Tensor] = {}
        if wiring.layers:
            observer = Observer(model, wiring, workers, next(model.parameters()).device)
            observer.start(place)
            for number in person.batches:
                observer.add(self._batches[number])
            layers, tensors = observer.result()
        person.layers += layers
        if tensors:
            file = self._scratch / f"statistics-{person.number}-{place}.safetensors"
            save_file(tensors, file)
            specs = [TensorSpec(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
            person.groups.append((specs, lambda: load_file(file)))
        inputs = {f"{layer.module}.weight": layer.input for layer in layers if layer.input is not None}
        return _StageShare(person.number, person.coefficient, own, inputs, tensors)

    def _merged(
        self, model: nn.Module, first: _Person, stage: Stage, shares: Sequence[_StageShare]
    ) -> dict[str, Tensor]:
        """The merged parameters of a stage; what has another shape in some contributor stays as it is."""
        given: Sequence[Any] = shares
        shapes = {name: value.shape for name, value in shares[0].parameters.items()}
        alike = [name for name in shapes if all(one.parameters[name].shape == shapes[name] for one in shares)]
        facts = []
        for name in alike:
            module, _, leaf = name.rpartition(".")
            bias = f"{module}.bias"
            kind = kind_of(model.get_submodule(module))
            layer: Layer | None = None
            if kind is not None and f"{module}.weight" in shapes:
                layer = Layer(module, kind, f"{module}.weight", bias if bias in shapes else None, False)
            grams = tuple(one.inputs.get(name) for one in shares)
            is_weight = leaf == "weight"
            facts.append(
                Facts(name, tuple(shapes[name]), layer if is_weight else None, None if is_weight else layer, grams)
            )
        with one_thread():
            units, _ = self._method.units(facts)
            found = {name: value for unit in units for name, value in self._method.merge(unit, given).tensors.items()}
            return found | {name: average(name, given) for name in alike if name not in found}

    def _put(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Give the model these parameters, where they have its shapes."""
        with torch.no_grad():
            for name, value in parameters.items():
                parameter = model.get_parameter(name)
                if parameter.shape == value.shape:
                    parameter.copy_(value)


def _pieces(batch: Batch, model: nn.Module, wiring: Wiring) -> list[Batch]:
    """A batch in pieces of similar length, or of one where padding cannot be told."""
    pieces = without_padding(batch, model) if wiring.padding_free else split_by_length(batch, model, _TOKENS)
    return [widened(piece, model, wiring.multiple) for piece in pieces]
