"""The parts of a merge as mergekit sees it: layers of the result, and the models that each is merged from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merganser.errors import ErrorCollector, RecipeError, did_you_mean
from merganser.merging.mergekit.methods import METHODS, MergekitMethod
from merganser.merging.mergekit.schema import Configuration, Parameters, Slice
from merganser.text import listed

#: The parts that mergekit knows models of several parts to have, by patterns of the names of their tensors. The first
#: that matches counts: a text decoder's tensors have no prefix of their own in some models, and are all that is left.
MODULES: Mapping[str, tuple[str, ...]] = {
    "multi_modal_projector": ("*multi_modal_projector.*", "*visual.merger.*", "*visual.deepstack_merger_list.*"),
    "vision_tower": ("*vision_tower.*", "*visual.*"),
    "vision_model": ("*vision_model.*",),
    "encoder": ("encoder.*", "model.encoder.*"),
    "decoder": ("decoder.*", "model.decoder.*"),
    "shared": ("shared.*", "lm_head.*"),
    "text_decoder": ("*",),
}


@dataclass(frozen=True)
class Source:
    """A model that a part is merged from; ``range`` are its layers, None for all."""

    model: str
    parameters: Parameters
    range: tuple[int, int] | None = None


@dataclass(frozen=True)
class Part:
    """Layers of the result (or all of it) that are merged from some sources, with the places of its parameters.

    Attributes:
        sources: what it is merged from.
        places: where its parameters can stand, the innermost first.
        where: in the configuration.
        first: the number of its first layer in the result.
    """

    sources: tuple[Source, ...]
    places: tuple[Parameters, ...]
    where: str
    first: int = 0


@dataclass
class Work:
    """A configuration at work, with what is found to be wrong and to be told.

    Attributes:
        configuration: what was read.
        where: it stands, for errors.
        method: mergekit's.
        problems: mistakes so far.
        notes: what to tell, in order.
        missing: what is missing, with its mend, and the places where it is.
    """

    configuration: Configuration
    where: str
    method: MergekitMethod = field(init=False)
    problems: ErrorCollector = field(default_factory=ErrorCollector)
    notes: dict[str, None] = field(default_factory=dict)
    missing: dict[tuple[str, str], dict[str, None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.configuration.merge_method
        if name not in METHODS:
            raise RecipeError(f"unknown merge_method {name!r}", where=self.where, mend=did_you_mean(name, METHODS))
        self.method = METHODS[name]

    def refuse(self, what: str, mend: str) -> None:
        """Keep a mistake."""
        self.problems.add(RecipeError(what, where=self.where, mend=mend))

    def raise_all(self) -> None:
        """Raise the mistakes so far, those of one cause at many places as one."""
        for (what, mend), places in self.missing.items():
            self.refuse(f"{listed([*places], 3)}: {what} is missing", mend)
        self.problems.raise_all()

    def note(self, text: str) -> None:
        """Keep what is to be told, once."""
        self.notes.setdefault(text)

    def contributors(self, part: Part) -> list[Source]:
        """The sources that are contributors here; where a base is one of two ends, it comes first."""
        base = self.configuration.base_model
        if self.method.base == "input" or base is None:
            return list(part.sources)
        if self.method.base == "first":
            return sorted(part.sources, key=lambda source: source.model != base)
        return [source for source in part.sources if source.model != base]

    @property
    def by_module(self) -> bool:
        """Whether the parts are modules of a model that has several."""
        return bool(self.configuration.modules) and set(self.configuration.modules) != {"default"}


def find_parts(work: Work) -> list[Part]:
    """The parts of the result, every one with the places that its parameters can stand at."""
    conf, everything = work.configuration, work.configuration.parameters
    if work.by_module:
        return list(_modules(work))
    if conf.models:
        return [_whole(work, conf.models, (everything,), "models")]
    places: tuple[Parameters, ...] = (everything,)
    slices, where = conf.slices, "slices"
    if conf.modules:
        (module,) = conf.modules.values()
        if module.models:
            return [_whole(work, module.models, (module.parameters, everything), "modules.default.models")]
        places, slices, where = (module.parameters, everything), module.slices, "modules.default.slices"
    parts, first = list[Part](), 0
    for number, one in enumerate(slices):
        parts.append(_slice(work, one, places, f"{where}[{number}]", first))
        start, stop = one.sources[0].layer_range
        first += max(stop - start, 0)
    return parts


def _modules(work: Work) -> Iterable[Part]:
    """Parts by the names of modules; each has to be whole models, since ``layers`` means a model's only stack."""
    for name, module in work.configuration.modules.items():
        place = f"modules.{name}"
        if name not in MODULES:
            work.refuse(f"unknown module {name!r}", did_you_mean(name, [*MODULES, "default"]))
        elif module.slices:
            what = f"{place}.slices: layers of one of several modules cannot be chosen here"
            work.refuse(what, f"give {place}.models, with whole models")
        else:
            yield _whole(work, module.models, (module.parameters, work.configuration.parameters), place)


def _whole(work: Work, models: Sequence[Any], places: tuple[Parameters, ...], where: str) -> Part:
    """Whole models; mergekit adds a base model that is not among them as the last."""
    sources = [Source(one.model, one.parameters) for one in models]
    base = work.configuration.base_model
    if base is not None and all(source.model != base for source in sources):
        sources.append(Source(base, {}))
    return Part(tuple(sources), places, where)


def _slice(work: Work, one: Slice, places: tuple[Parameters, ...], where: str, first: int) -> Part:
    sources = tuple(Source(source.model, source.parameters, source.layer_range) for source in one.sources)
    if one.base_model not in (None, work.configuration.base_model):
        mend = "give one base_model for the whole merge, or merge in stages, one for each base model"
        work.refuse(f"{where}.base_model: one merge has one base model here", mend)
    if one.residual_weight is not None:
        work.note(f"{where}.residual_weight is skipped: no method of mergekit 0.1.5 reads it")
    ranges = [source.layer_range for source in one.sources]
    lengths = {stop - start for start, stop in ranges}
    if any(start < 0 for start, _ in ranges) or min(lengths) < 1:
        mend = "give the first layer and the one after the last, such as [0, 8]"
        work.refuse(f"{where}: a layer_range is empty or negative", mend)
    if len(lengths) > 1:
        what = f"{where}: its sources have different numbers of layers: {sorted(lengths)}"
        work.refuse(what, "give every source of a slice as many layers")
    return Part(sources, places if not one.parameters else (one.parameters, *places), where, first)


def check_inputs(work: Work, part: Part) -> None:
    """The method gets as many models as it merges, and the base that it needs, as mergekit asks of it."""
    method, base = work.method, work.configuration.base_model
    name, models = work.configuration.merge_method, [source.model for source in part.sources]
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        work.refuse(f"{part.where}: {twice} is there twice", "name each model once; add up its weights")
        return
    if method.base in ("origin", "first") and base is None:
        work.refuse(f"merge_method {name} needs a base model", "add base_model: MODEL")
        return
    if method.base != "input" and base is not None and base not in models:
        mend = "add it to the sources, with the layers that the others' weights are compared with"
        work.refuse(f"{part.where}: the base model {base} is none of its sources", mend)
    (low, high), count = method.inputs, len(work.contributors(part))
    if count < low or (high is not None and count > high):
        wanted = f"at least {low}" if high is None else f"exactly {low}"
        beside = " besides the base model" if method.base.startswith("origin") and base is not None else ""
        there = "there is 1" if count == 1 else f"there are {count}"
        mend = "add or leave out models" + "; put every model into a slice of its own" * (name == "passthrough")
        work.refuse(f"{part.where}: merge_method {name} merges {wanted}{beside}, and {there}", mend)
