"""Feature extraction: text through a model without a head, to collect statistics of base encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import transformers

from merganser.errors import CheckpointError
from merganser.tasks.base import Metric, Task, architecture
from merganser.tasks.models import Opened

_SCORED = "name what its embeddings are for: --task sts or --task retrieval; or evaluate a fine-tuned checkpoint"


@dataclass(frozen=True)
class FeatureExtraction(Task):
    """Text only. A pooler that the checkpoint lacks does no harm: only weights on disk get statistics."""

    name = "feature-extraction"
    auto_class = "AutoModel"
    heads = ("Model", "ForMaskedLM", "ForPreTraining")
    metrics: ClassVar[Mapping[str, Metric]] = {}
    label_role = None
    complete = False

    def fits(self, config: Mapping[str, Any]) -> bool:
        """A base model, or an encoder that was only pre-trained."""
        return self.has_head(config) and not architecture(config).endswith("LMHeadModel")

    def check_head(self, opened: Opened) -> None:
        """Any encoder will do; a decoder wants a target, which this task does not read."""
        name = architecture(opened.config)
        if opened.config.get("is_encoder_decoder") and not name.endswith("EncoderModel"):
            what = f"{name or 'this model'} has a decoder, which needs a target text"
            mend = "use a checkpoint with its language-modelling head and --task seq2seq"
            raise CheckpointError(what, where=opened.where, mend=mend)

    def check_scoring(self, opened: Opened) -> None:
        """There is nothing to score."""
        what = "a model without a head makes no predictions that could be scored"
        raise CheckpointError(what, where=opened.where, mend=_SCORED)

    def model_class(self, config: Mapping[str, Any]) -> str:
        """The architecture itself where it reads text alone: the head of a masked language model counts."""
        name = architecture(config)
        usable = name.endswith(("Model", "ForMaskedLM")) and isinstance(getattr(transformers, name, None), type)
        return name if usable else self.auto_class
