"""Opening the models of tasks: the reference, its configuration, tokenizer and weights in float32.

A reference is a folder or a Hub name as :func:`merganser.checkpoints.open_checkpoint` takes it;
``folder::heads/name`` means the model in a sub-folder, which transformers opens as ``from_pretrained(folder,
subfolder="heads/name")``. A LoRA adapter is its base, whose weights are changed where they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils import logging as transformers_logging

from merganser.checkpoints import AdapterCheckpoint, Checkpoint, CodedCheckpoint, QuantisedCheckpoint, open_checkpoint
from merganser.checkpoints.layers import load_config
from merganser.checkpoints.opening import model_reference
from merganser.checkpoints.quantisation import refusal
from merganser.checkpoints.reader import read_json
from merganser.checkpoints.tokenizer_files import is_tokenizer_file
from merganser.documents import MAX_BYTES
from merganser.errors import CheckpointError, UserError
from merganser.paths import check_file, expanded, inside

SEPARATOR = "::"
_GENERATION = "generation_config.json"
LONGEST = 512  # tokens of a text, where neither the user nor the model says anything
#: Model types whose positions start behind the padding id: RoBERTa and its descendants.
_SHIFTED_POSITIONS = {
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
_TOKENIZER_MEND = "put the tokenizer's files (tokenizer.json, tokenizer_config.json, …) beside the weights"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
    "spm.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A model whose weights have not been loaded yet.

    Attributes:
        name: as the user gave it.
        checkpoint: its configuration and tensors.
        root: the folder that transformers is to open.
        subfolder: where in that folder the model lies; empty for the folder itself.
        config: its ``config.json``.
    """

    name: str
    checkpoint: Checkpoint
    root: Path
    subfolder: str
    config: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The place of the configuration, for messages."""
        return str(self.root / self.subfolder / "config.json")


def open_model(reference: str | Path, *, allow_pickle: bool = False, codes: bool = False) -> Opened:
    """Open a reference, reading its configuration and the headers of its weights only.

    Args:
        reference: a folder, a Hub name or ``folder::heads/name``.
        allow_pickle: accept pickled weights.
        codes: accept quantised weights that only transformers can load (see :func:`open_checkpoint`): enough to score
            a model, not to know its weights.

    Raises:
        CheckpointError: nothing there, no configuration, or weights that cannot be used.
    """
    name = model_reference(reference)
    folder, _, subfolder = name.partition(SEPARATOR)
    if subfolder:
        parts = PurePosixPath(subfolder).parts
        if PurePosixPath(subfolder).is_absolute() or ".." in parts:
            mend = "give a folder inside it, as model::heads/name"
            raise CheckpointError(f"{subfolder!r} leaves the model folder", where=name, mend=mend)
    root = expanded(folder)
    if subfolder and root.is_dir():
        if not (root / subfolder).is_dir():
            raise _no_subfolder(root, subfolder)
        checkpoint = open_checkpoint(root / subfolder, allow_pickle=allow_pickle, codes=codes)
        config = checkpoint.config
    else:
        checkpoint = open_checkpoint(folder, allow_pickle=allow_pickle, codes=codes)
        root, config = checkpoint.path, checkpoint.config
        if subfolder:
            config = read_json(root / subfolder / "config.json", missing={})
            if not config:
                raise _no_subfolder(root, subfolder)
    if isinstance(checkpoint, CodedCheckpoint) and not _loads(checkpoint.quantisation.method):
        raise refusal(
            name, config, checkpoint.quantisation
        )  # transformers would load the codes as if they were numbers
    if not config and not checkpoint.modules:
        raise CheckpointError("no config.json here", where=name, mend="give a model folder in Hugging Face layout")
    opened = Opened(name, checkpoint, root, subfolder or checkpoint.main, config)
    _check_files(opened)
    return opened


def _check_files(opened: Opened) -> None:
    """Refuse files that libraries would open of a model, where they lie elsewhere or would keep a reader waiting.

    Raises:
        CheckpointError: a link that leads out of the model's folder, a pipe or a device.
    """
    checkpoint, root = opened.checkpoint, opened.root
    modules = (root / module.path for module in checkpoint.modules)
    for folder in {root, root / opened.subfolder, checkpoint.tokenizer_path, *modules}:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix == ".json" or is_tokenizer_file(path.name):
                home = root if folder.is_relative_to(root) else folder
                inside(folder, path.name, CheckpointError, root=home, where=folder, what="the file")
                if not path.exists() or path.is_dir():
                    continue
                if path.suffix == ".json" and (size := check_file(path, CheckpointError)) > MAX_BYTES:
                    what = f"the file has {size} bytes, {MAX_BYTES} are accepted"
                    raise CheckpointError(what, where=path, mend="restore the file")
                check_file(path, CheckpointError)


def _loads(method: str | None) -> bool:
    """Whether transformers knows the quantisation that a configuration names."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return any(known in (method, f"{method}_4bit") for known in AUTO_QUANTIZER_MAPPING)


def _no_subfolder(root: Path, subfolder: str) -> CheckpointError:
    found = sorted(path.parent.relative_to(root).as_posix() for path in root.glob("heads/*/config.json"))
    mend = f"choose one of {', '.join(found)}" if found else "leave it out: the model has no separate heads"
    return CheckpointError(f"there is no {subfolder!r} in this model", where=root, mend=mend)


def load_tokenizer(opened: Opened) -> Any:
    """The tokenizer of a model; a head in a sub-folder (``heads/name``) shares that of the whole folder.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    own = opened.root / opened.subfolder
    trained = [opened.checkpoint.tokenizer_path] if isinstance(opened.checkpoint, AdapterCheckpoint) else []
    places = [*trained, own, opened.root, *([own.parent.parent] if own.parent.name == "heads" else [])]
    place = next((p for p in places if any((p / file).is_file() for file in _TOKENIZER_FILES)), None)
    if place is None:
        raise _no_tokenizer(own, "there is none")
    with quiet(), blamed("the tokenizer cannot be loaded", place, _TOKENIZER_MEND):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(place), local_files_only=True, trust_remote_code=False
        )
        words = len(tokenizer) - len(tokenizer.all_special_tokens)
    if words <= 0:  # made up by transformers from a configuration alone
        raise _no_tokenizer(place, "it has no vocabulary")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise _no_tokenizer(place, f"its model_max_length {tokenizer.model_max_length!r} is no number")
    return tokenizer


def _no_tokenizer(place: Path, why: str) -> CheckpointError:
    return CheckpointError(f"the tokenizer cannot be loaded: {why}", where=place, mend=_TOKENIZER_MEND)


@contextmanager
def blamed(what: str, where: str | Path | None, mend: str) -> Iterator[None]:
    """Make an error of the user's of whatever a stranger's files provoke in the library that reads or runs them.

    Libraries raise many kinds of exceptions, and what is written in Rust panics, which is no ``Exception``.

    Args:
        what: cannot be done, as the beginning of the message.
        where: the files.
        mend: for all of it.

    Raises:
        CheckpointError: in place of anything that is no error of our own.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {first_line(error)}", where=where, mend=mend) from None


def load_model(
    opened: Opened,
    class_name: str,
    *,
    complete: bool = True,
    allow_pickle: bool = False,
    placement: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model in float32 and eval mode, on the CPU.

    Args:
        opened: what :func:`open_model` returned.
        class_name: the transformers class to load it with, such as ``AutoModelForSequenceClassification``.
        complete: every parameter must be in the checkpoint. A head that is not would be random, and so its
            scores.
        allow_pickle: accept pickled weights.
        placement: ``from_pretrained``'s options for where the weights go, such as ``device_map``.

    Raises:
        CheckpointError: the weights do not fit the architecture, or lack a part that the task needs.
    """
    checkpoint = opened.checkpoint
    checkpoint.fetch()
    try:
        with quiet():
            model, info = from_pretrained(
                opened, class_name, allow_pickle, output_loading_info=True, **(placement or {})
            )
    except Exception as error:  # whatever damaged weights or a stranger's configuration provoke
        what = f"cannot be loaded as {class_name}: {first_line(error)}"
        mend = "check that config.json and weights belong together"
        if isinstance(checkpoint, CodedCheckpoint):
            what += f" (its weights are quantised: {checkpoint.quantisation.name})"
            mend = "install what transformers asks for, or give the model in full precision that was quantised"
        raise CheckpointError(what, where=opened.name, mend=mend) from None
    missing = sorted(info.get("missing_keys") or ())
    if complete and missing:
        what = f"the checkpoint has no weights for {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}"
        raise CheckpointError(what, where=opened.name, mend="choose a task that the checkpoint was trained for")
    return model.eval()


def from_pretrained(opened: Opened, class_name: str, allow_pickle: bool = False, **settings: Any) -> Any:
    """transformers' own loading, in float32, of a model's files; of tensors where these are computed.

    So an adapter on its base, and quantised weights, go through transformers' own conversions, which pack experts and
    fuse projections. It would keep FP8 or MXFP4 codes where the device computes with them, and needs other packages to
    read some of them. What is scored, trained and collected from are the weights that would be merged.

    Args:
        opened: what :func:`open_model` returned, its weights downloaded.
        class_name: of the transformers class.
        allow_pickle: accept pickled weights.
        settings: more arguments of ``from_pretrained``, such as ``config``.
    """
    loader: Any = getattr(transformers, class_name)
    settings |= {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    checkpoint = opened.checkpoint
    if not isinstance(checkpoint, AdapterCheckpoint | QuantisedCheckpoint):
        place, safe = str(opened.root), None if allow_pickle else True
        return loader.from_pretrained(place, subfolder=opened.subfolder, use_safetensors=safe, **settings)
    settings.setdefault("config", load_config(checkpoint))
    if hasattr(loader, "_model_mapping"):  # the automatic classes load from folders only
        loader = _get_model_class(settings["config"], loader._model_mapping)
    state = {name: _Unread(checkpoint, name) for name in checkpoint.tensors if "/" not in name}
    found = loader.from_pretrained(None, state_dict=state, **settings)
    model = found[0] if isinstance(found, tuple) else found
    if (checkpoint.path / _GENERATION).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.path)
    return found


@dataclass(frozen=True)
class _Unread:
    """A tensor that is read when transformers asks for it, as it asks for a slice of a safetensors file."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.checkpoint.read(self.name)[index]


def length_limit(config: Mapping[str, Any], tokenizer: Any) -> int | None:
    """The most tokens that a model and its tokenizer take; None where neither says."""
    limits = []
    tokenizer_limit = getattr(tokenizer, "model_max_length", None)
    if tokenizer_limit and tokenizer_limit < 1_000_000:  # transformers' word for "no limit" is 1e30
        limits.append(int(tokenizer_limit))
    if config.get("model_type") not in ("t5", "mt5", "umt5", "longt5", "switch_transformers"):  # n_positions is unused
        inner = config.get("text_config")  # of a model that sees images, too
        text = inner if isinstance(inner, Mapping) else {}
        names = ("max_position_embeddings", "n_positions")
        positions = next((found for name in names for part in (config, text) if (found := part.get(name))), None)
        if isinstance(positions, int) and positions > 0:
            shifted = config.get("model_type") in _SHIFTED_POSITIONS
            limits.append(positions - (int(config.get("pad_token_id") or 0) + 1 if shifted else 0))
    return min(limits) if limits else None


def usual_length(opened: Opened, tokenizer: Any) -> int:
    """The length at which a model's own texts are cut, where the user says none.

    That is what sentence-transformers' file says, or else the model's own limit, and at most :data:`LONGEST`: a Gram
    matrix needs many texts rather than the ends of a few long ones.
    """
    said = read_json(opened.root / opened.subfolder / "sentence_bert_config.json", missing={}).get("max_seq_length")
    if isinstance(said, int) and said > 0:
        return said
    return min(LONGEST, length_limit(opened.config, tokenizer) or LONGEST)


def choose_length(asked: int | None, config: Mapping[str, Any], tokenizer: Any, *, pairs: bool) -> int:
    """The length at which texts are cut: the asked one (or 128), or the model's limit where that is less.

    Raises:
        UserError: too short to hold a token beside the special tokens.
    """
    length = asked or 128
    length = min(length, length_limit(config, tokenizer) or length)
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if length <= special:
        what = f"a maximum length of {length} leaves no room beside {special} special tokens"
        raise UserError(what, where="max_length", mend=f"give at least {special + 1}")
    return length


def padding_id(tokenizer: Any) -> int:
    """The id to pad with: the padding token's, or the end of text's, or any: padding is always masked."""
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def prepare_padding(model: nn.Module, tokenizer: Any) -> None:
    """Tell a model without a padding token which one the batches use (decoders that classify look for it)."""
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = padding_id(tokenizer)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading bars and reports off the terminal; our own errors say what matters."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
