"""Images, alone or with text, through a model: to collect statistics of vision towers.

merganser collect my-vit --data photos.jsonl             {"image_path": "photos/1.png"}, beside the file
merganser collect my-llava --data photos.jsonl --task image-text-features             … with "text", too
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from merganser.errors import CheckpointError, DataError, UserError
from merganser.paths import real
from merganser.tasks.base import Config, Metric, Task, Truths, architecture
from merganser.tasks.batches import Collation, Feature
from merganser.tasks.columns import USUAL, Columns, another_column, column_values, texts
from merganser.tasks.data import Rows
from merganser.tasks.models import Opened, first_line, quiet
from merganser.tasks.tokens import Encoded

_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Picture(Feature):
    """One image, which is decoded when its batch is made.

    Attributes:
        digest: SHA-256 of its bytes.
        content: a path, the bytes of a file, or an image of Pillow's.
        prompt: the text beside it.
        most_tokens: at which the text is cut; 0: it is not, because it holds the places of its image.
    """

    digest: str = ""
    content: Any = field(default=None, repr=False)
    prompt: str | None = None
    most_tokens: int = 0


@dataclass(frozen=True)
class Preparation(Collation):
    """How pictures become tensors: by the model's own processor, in its own colours.

    Attributes:
        processor: of transformers.
        mode: of Pillow: ``RGB``, or ``L`` for models of one channel.
    """

    processor: Any = None
    mode: str = "RGB"

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """Tensors that are ready for ``model(**batch)``.

        Raises:
            DataError: images of one batch that become tensors of different sizes.
        """
        prepared = [self._prepare(picture) for picture in features if isinstance(picture, Picture)]
        if len({tuple((key, value.shape) for key, value in one.items()) for one in prepared}) > 1:
            what = "the processor makes tensors of different sizes of these images"
            raise DataError(what, mend="collect with --batch-size 1")
        return {key: torch.cat([one[key] for one in prepared]) for key in prepared[0]}

    def _prepare(self, picture: Picture) -> dict[str, Tensor]:
        image = open_image(picture.content).convert(self.mode)
        with quiet():
            if picture.prompt is None:
                made = self.processor(images=image, return_tensors="pt")
            elif getattr(self.processor, "chat_template", None):
                content = [{"type": "image", "image": image}, {"type": "text", "text": picture.prompt}]
                made = self.processor.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
                )
            elif token := getattr(self.processor, "image_token", None):
                made = self.processor(images=image, text=f"{token}{picture.prompt}", return_tensors="pt")
            else:
                cut = {"truncation": True, "max_length": picture.most_tokens}
                made = self.processor(images=image, text=picture.prompt, return_tensors="pt", **cut)
        return {key: value for key, value in made.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Reader:
    """The processor of a model, with what is asked of a tokenizer."""

    processor: Any

    @property
    def model_max_length(self) -> int | None:
        """The most tokens of a text."""
        return getattr(getattr(self.processor, "tokenizer", None), "model_max_length", None)

    @property
    def has_places(self) -> bool:
        """Whether an image takes places in the text, so that a text cannot be cut."""
        return any(getattr(self.processor, name, None) for name in ("chat_template", "image_token"))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """None that a length must leave room for where there is no text."""
        tokenizer = getattr(self.processor, "tokenizer", None)
        return 0 if tokenizer is None else int(tokenizer.num_special_tokens_to_add(pair=pair))


@dataclass(frozen=True)
class ImageFeatures(Task):
    """Images only, for models that take nothing else."""

    name = "image-features"
    auto_class = "AutoModel"
    heads = ("ForImageClassification", "VisionModel", "Model")
    metrics: ClassVar[Mapping[str, Metric]] = {}
    needs: ClassVar[tuple[str, ...]] = ("image",)
    wants = ()
    label_role = None
    complete = False
    modalities: ClassVar[frozenset[str]] = frozenset({"image"})

    def has_head(self, config: Mapping[str, Any]) -> bool:
        """Whether transformers' class of the architecture takes just what this task gives."""
        return _modalities(config) == self.modalities

    def check_head(self, opened: Opened) -> None:
        """Refuse a model that takes something else than this task gives.

        Raises:
            CheckpointError: such a model.
        """
        if not self.has_head(opened.config):
            taken = " and ".join(sorted(_modalities(opened.config))) or "an input that transformers does not name"
            what = f"a {architecture(opened.config) or 'model without architectures'} takes {taken}"
            mend = "choose another task, such as image-text-features where it takes both"
            raise CheckpointError(
                f"{what}, and {self.name} gives it {' and '.join(sorted(self.modalities))}",
                where=opened.where,
                mend=mend,
            )

    def check_scoring(self, opened: Opened) -> None:
        """There is nothing to score."""
        what = f"{self.name} is for collecting statistics, it has no scores"
        raise CheckpointError(what, where=opened.where, mend="collect, and evaluate with the code you trained with")

    def model_class(self, config: Mapping[str, Any]) -> str:
        """The architecture itself."""
        return architecture(config)

    def load_reader(self, opened: Opened) -> Reader:
        """The processor of the model, from its own files.

        Raises:
            CheckpointError: there is none, or it cannot be loaded.
            UserError: Pillow is not installed.
        """
        if importlib.util.find_spec("PIL") is None:
            raise UserError("images need Pillow, which is not installed", where=self.name, mend="pip install pillow")
        places = [opened.root / opened.subfolder, opened.root]
        place = next((p for p in places if any((p / file).is_file() for file in _FILES)), None)
        mend = f"put the processor's files ({' or '.join(_FILES)}; the tokenizer's, too, for text) beside the weights"
        if place is None:
            raise CheckpointError("there is no processor for images", where=places[0], mend=mend)
        kind = transformers.AutoProcessor if "text" in self.modalities else transformers.AutoImageProcessor
        try:
            with quiet():
                return Reader(kind.from_pretrained(str(place), local_files_only=True, trust_remote_code=False))
        except Exception as error:  # damaged files, missing packages; the loaders raise many kinds
            what = f"the processor cannot be loaded: {first_line(error)}"
            raise CheckpointError(what, where=place, mend=mend) from None

    def encode(
        self, rows: Rows, tokenizer: Any, config: Config, columns: Columns, max_length: int, references: Truths = None
    ) -> Encoded:
        """The pictures and their prompts. Each file is looked at, and none is kept in memory.

        Raises:
            DataError: an image that is missing or damaged, or a path that leaves the folder of the data.
        """
        prompts = texts(rows, columns.text) if columns.text else [None] * len(rows)
        cut = max_length if columns.text and not tokenizer.has_places else 0
        column, features = columns.image or "image", list[Feature]()
        for number, (value, where) in enumerate(column_values(rows, column, "image")):
            content = _located(value, rows, number, where)
            try:
                with quiet():
                    digest = _digest(content)
                    open_image(content).verify()
            except Exception as error:  # damaged or foreign files; Pillow raises many kinds
                what = f"{column!r} is not an image that can be read: {first_line(error)}"
                raise DataError(what, where=where, mend=another_column("image")) from None
            features.append(Picture([0], digest=digest, content=content, prompt=prompts[number], most_tokens=cut))
        return Encoded(features, frozenset(), cut)

    def collation(self, tokenizer: Any, config: Mapping[str, Any]) -> Collation:
        """How pictures become tensors."""
        mode = "L" if config.get("num_channels") == 1 else "RGB"
        return Preparation(0, None, None, tokenizer.processor, mode)


@dataclass(frozen=True)
class ImageTextFeatures(ImageFeatures):
    """Images with text, one example at a time: how many tokens an image becomes differs from one to the other."""

    name = "image-text-features"
    needs = ("image", "text")
    usual: ClassVar[Mapping[str, tuple[str, ...]]] = {"text": ("prompt", "caption", "question", *USUAL["text"])}
    modalities = frozenset({"image", "text"})

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Only where it is asked for: such models are used, and merged, for their text most of all."""
        return False

    def has_head(self, config: Mapping[str, Any]) -> bool:
        """Whether the model takes images and text, whatever else."""
        return self.modalities <= _modalities(config)

    def collation(self, tokenizer: Any, config: Mapping[str, Any]) -> Collation:
        """How a picture with its text becomes tensors."""
        return Preparation(0, None, 1, tokenizer.processor)


def open_image(content: Any) -> Any:
    """An image of Pillow's, from a path, the bytes of a file, or itself."""
    from PIL import Image

    if isinstance(content, bytes):
        return Image.open(io.BytesIO(content))
    return Image.open(content) if isinstance(content, Path) else content.copy()


def _digest(content: Any) -> str:
    data = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).hexdigest()


def _located(value: Any, rows: Rows, number: int, where: str) -> Any:
    """What a row gives as its image: an image, bytes, or the path of a file below the folder of the data.

    Raises:
        DataError: anything else, or a path that leaves that folder.
    """
    path = value
    file = Path(rows.places[number][0])
    if isinstance(value, Mapping):  # as datasets stores images
        if value.get("bytes"):
            return value["bytes"]
        path = value.get("path")
        if isinstance(path, str) and not file.is_file():
            return Path(path)  # of a data set that the library has found itself
    if hasattr(path, "convert") or isinstance(path, bytes):
        return path
    if not isinstance(path, str):
        what = f"an image is {type(value).__name__}, neither an image nor the path of one"
        raise DataError(what, where=where, mend=another_column("image"))
    folder = real(file).parent
    found = real(folder / path)
    if not file.is_file() or not found.is_relative_to(folder):
        what = f"the image {path!r} does not lie in the folder of the data file"
        raise DataError(what, where=where, mend="put the images beside the file, and give paths relative to it")
    if not found.is_file():
        raise DataError(f"there is no image {path!r}", where=where, mend="check the path, relative to the data file")
    return found


def _modalities(config: Mapping[str, Any]) -> frozenset[str]:
    """What transformers' class of an architecture takes."""
    found = getattr(getattr(transformers, architecture(config) or "-", None), "input_modalities", ())
    return frozenset((found,) if isinstance(found, str) else found or ())
