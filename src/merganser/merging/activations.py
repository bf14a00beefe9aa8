"""What the units of contributors do on the same texts: for methods that look at data at hand (``Needs.data``).

All contributors read the same tokens, one model after the other in memory, and what comes into the layers that a method
asks for is kept for a sample of the tokens, in files beside the work that are gone when the merge is done. Nothing of
the texts or of the activations goes into the result but the texts' hash.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merganser.checkpoints.sources import Source
from merganser.checkpoints.writer import SafetensorsWriter, TensorSpec
from merganser.errors import CheckpointError, DataError, ErrorCollector, RecipeError
from merganser.files import scratch_folder
from merganser.merging.inputs import Inputs, Parent
from merganser.merging.memory import RunSettings
from merganser.merging.plan import Step
from merganser.methods import Method
from merganser.progress import track
from merganser.tensors import one_thread

_BATCH = 16  # texts
_FILE = "activations.safetensors"
_SAME = "give models with one tokenizer, such as fine-tunes of one model"


@dataclass(frozen=True)
class Texts:
    """What a method looks at; the options of the method say it.

    Attributes:
        data: a file or data set of texts.
        tokens: how many of their tokens.
        seed: draws these.
    """

    data: str
    tokens: int
    seed: int

    @classmethod
    def of(cls, method: Method) -> Texts:
        """As the options of a method have it."""
        return cls(method.options.data, method.options.tokens, method.options.seed)


@dataclass(frozen=True)
class Activations:
    """The inputs of layers of contributors on the same tokens.

    Attributes:
        folders: of each contributor, for each weight the folder of the file that has the inputs of its layer.
    """

    folders: Mapping[int, Mapping[str, Path]]

    def of(self, number: int, weight: str) -> Tensor:
        """The inputs of the layer with this weight (the result's name), (tokens, width) in float32.

        Args:
            number: of the contributor.
            weight: the name.
        """
        from safetensors import safe_open

        with safe_open(self.folders[number][weight] / _FILE, "pt") as file:
            found: Tensor = file.get_tensor(weight)
        return found


def check_texts(methods: Iterable[Method], parents: Sequence[Parent], problems: ErrorCollector) -> list[str]:
    """Whether all contributors read the texts of these methods as the same tokens, before any weight is read.

    Returns:
        a note with the hash of each method's texts.
    """
    notes = (_check_texts(method, parents, problems) for method in methods)
    return list(dict.fromkeys(note for note in notes if note is not None))


def _check_texts(method: Method, parents: Sequence[Parent], problems: ErrorCollector) -> str | None:
    if not method.options.data:
        what = f"method {method.name!r} looks at what the models do on texts, and none are given"
        problems.add(RecipeError(what, where="data", mend="add --data FILE, or --option data=FILE"))
        return None
    encoded = problems.catch(_encoded, Texts.of(method), parents)
    if encoded is None:
        return None
    digest = hashlib.sha256(json.dumps(encoded.ids).encode()).hexdigest()
    return f"aligned by what the models do on {len(encoded.ids)} texts, whose tokens have the sha256 {digest}"


@contextmanager
def recorded_activations(steps: Sequence[Step], inputs: Inputs, settings: RunSettings) -> Iterator[Activations | None]:
    """What the units of these steps do, for as long as the block lasts; None where no method asks for it.

    Args:
        steps: of a plan.
        inputs: its open files.
        settings: threads and device.

    Raises:
        UserError: a model that cannot be run on the texts.
    """
    wanted: dict[Texts, list[Step]] = {}
    for step in steps:
        if step.treatment is not None and step.treatment.needs.data:
            wanted.setdefault(Texts.of(step.treatment), []).append(step)
    if not wanted:
        yield None
        return
    with ExitStack() as stack:
        folders: dict[int, dict[str, Path]] = {number: {} for number in range(len(inputs.parents))}
        for texts, those in wanted.items():
            encoded = _encoded(texts, inputs.parents)
            for number, parent in enumerate(inputs.parents):
                last = [(step.unit.names[-1], step.sources[number]) for step in those]
                layers = {name: sources[name] for name, sources in last if name in sources}
                if layers:  # it takes part
                    folder = stack.enter_context(scratch_folder())
                    _record(parent, layers, encoded, texts, folder, settings)
                    folders[number] |= dict.fromkeys(layers, folder)
        yield Activations(folders)


@dataclass(frozen=True)
class _Encoded:
    """Texts as tokens.

    Attributes:
        ids: of each text.
        batches: that models are run on.
    """

    ids: list[list[int]]
    batches: Any


def _encoded(texts: Texts, parents: Sequence[Parent]) -> _Encoded:
    """The texts as all contributors read them.

    Raises:
        UserError: texts or tokenizers that cannot be read, or that do not agree.
    """
    from merganser.tasks.batches import make_batches
    from merganser.tasks.columns import Columns
    from merganser.tasks.data import read_rows
    from merganser.tasks.feature_extraction import FeatureExtraction
    from merganser.tasks.models import choose_length, usual_length

    task, rows, problems = FeatureExtraction(), read_rows(texts.data, prefer=("train",)), ErrorCollector()
    columns, found = task.columns(rows, Columns(), labelled=False), list[tuple[str, Any]]()
    for parent in parents:
        opened = _opened(parent)
        if opened.config.get("is_encoder_decoder"):
            what = "has a decoder beside its encoder; what units do is looked at in encoders and in decoders alone"
            raise CheckpointError(what, where=parent.title, mend="choose another method, such as rebasin")
        tokenizer = task.load_reader(opened)
        length = choose_length(usual_length(opened, tokenizer), opened.config, tokenizer, pairs=bool(columns.text_pair))
        features = task.encode(rows, tokenizer, opened.config, columns, length).features
        if found and [one.input_ids for one in features] != [one.input_ids for one in found[0][1]]:
            what = f"{parent.title} reads the texts as other tokens than {found[0][0]}"
            problems.add(CheckpointError(what, where=texts.data, mend=_SAME))
        found.append((parent.title, features))
        collate = task.collation(tokenizer, opened.config)
    problems.raise_all()
    features = found[0][1]
    if sum(len(one.input_ids) for one in features) < 2:
        raise DataError("one token shows no correlation", where=texts.data, mend="give more texts")
    return _Encoded([one.input_ids for one in features], make_batches(features, collate, _BATCH))


def _record(
    parent: Parent, layers: Mapping[str, Source], encoded: _Encoded, texts: Texts, folder: Path, settings: RunSettings
) -> None:
    """Run a model on the texts and keep the inputs of some layers at the sampled tokens.

    Args:
        parent: the model.
        layers: for each weight by the result's name, where this model has it.
        encoded: the texts.
        texts: how many tokens are kept.
        folder: receives the file.
        settings: threads and device.

    Raises:
        CheckpointError: the model cannot be run, or does not use one of the layers as a module.
    """
    from merganser.checkpoints.layers import layers_of
    from merganser.tasks.models import blamed, load_model

    model: Any = load_model(_opened(parent), "AutoModel", complete=False, allow_pickle=settings.allow_pickle)
    modules = {layer.weight: layer.module for layer in layers_of(model, parent.checkpoint)}
    device = settings.torch_device or torch.device("cpu")
    model.to(device)
    chosen, starts = _sample(encoded, texts)
    here, widths = threading.local(), {name: source.shape(parent.checkpoint) for name, source in layers.items()}
    inner = {name: model.get_submodule(modules[source.leaf.tensor]) for name, source in layers.items()}
    specs = [TensorSpec(name, "F32", (len(chosen), _inputs_of(inner[name], widths[name]))) for name in layers]

    def see(module: Any, given: tuple[Tensor, ...]) -> None:
        here.seen[id(module)] = given[0]

    with (
        SafetensorsWriter(folder, {_FILE: specs}) as writer,
        ExitStack() as hooks,
        one_thread(),
        ThreadPoolExecutor(settings.threads) as pool,
        blamed("the model cannot be run on the texts", parent.title, "check that its configuration and weights fit"),
    ):
        for module in {id(module): module for module in inner.values()}.values():
            hooks.callback(module.register_forward_pre_hook(see).remove)

        def run(number: int, batch: Mapping[str, Tensor]) -> None:
            start, stop = starts[number], starts[number + 1]
            low, high = (int(torch.searchsorted(chosen, place)) for place in (start, stop))
            if low == high:
                return
            here.seen = {}
            with torch.inference_mode():
                model(**{key: value.to(device) for key, value in batch.items()})
            places = batch["attention_mask"].flatten().nonzero().flatten()[chosen[low:high] - start]
            for name in layers:
                rows = here.seen[id(inner[name])].reshape(batch["attention_mask"].numel(), -1)
                writer.write(_FILE, name, rows[places.to(rows.device)].to("cpu", torch.float32), low)

        jobs = (pool.submit(run, number, batch) for number, (_, batch) in enumerate(encoded.batches))
        for job in track([*jobs], f"texts through {parent.title}", "batches", len(encoded.batches)):
            job.result()


def _opened(parent: Parent) -> Any:
    """A contributor's open files as tasks take them."""
    from merganser.tasks.models import Opened

    files = parent.checkpoint
    return Opened(parent.contributor.model, files, files.path, files.main, files.config)


def _sample(encoded: _Encoded, texts: Texts) -> tuple[Tensor, list[int]]:
    """Which of all real tokens are kept, ascending, and the number of the first one of each batch."""
    starts = [0]
    for indices, _ in encoded.batches:
        starts.append(starts[-1] + sum(len(encoded.ids[index]) for index in indices))
    draw = torch.Generator().manual_seed(texts.seed)
    return torch.randperm(starts[-1], generator=draw)[: texts.tokens].sort().values, starts


def _inputs_of(module: Any, shape: tuple[int, ...]) -> int:
    """The number of inputs of a layer: the last dimension of its weight, of GPT-2's the first."""
    return shape[0] if type(module).__name__ == "Conv1D" else shape[1]
