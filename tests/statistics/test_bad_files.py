"""A statistics file from a stranger is data: whatever is wrong with it is said, and nothing explodes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import VOCABULARY, make_model
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics
from merganser.errors import UserError
from merganser.statistics import FILE_NAME, Statistics, write_statistics
from merganser.statistics.algebra import add

State = dict[str, torch.Tensor]
READ = "(?i)truncated|cannot be read|unreadable|does not fill"


def batches(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, 4, 7), generator=generator)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A statistics file of a tiny model, with Fisher information."""
    folder = tmp_path / "model"
    model = make_model("bert")
    model.save_pretrained(folder)
    header, tensors = collect_statistics(model, open_checkpoint(folder), batches(1, 3), fisher="expected")
    return write_statistics(folder / FILE_NAME, header, tensors)


def rewrite(
    path: Path,
    change: Callable[[State], None] = lambda state: None,
    amend: Callable[[dict[str, Any]], None] = lambda header: None,
) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["merganser"])
    state = load_file(path)
    change(state)
    amend(header)
    save_file(state, path, metadata={"merganser": json.dumps(header)})


def refused(path: Path, message: str, *, validate: bool = False) -> None:
    with pytest.raises(UserError, match=message) as caught:
        statistics = Statistics.open(path)
        if validate:
            statistics.validate()
    assert FILE_NAME in str(caught.value)


def first(state: State, prefix: str) -> str:
    return next(name for name in sorted(state) if name.startswith(prefix))


def test_a_sound_file_is_accepted(published: Path) -> None:
    Statistics.open(published).validate()
    rewrite(published)
    Statistics.open(published).validate()


def test_truncated(published: Path) -> None:
    whole = published.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        published.write_bytes(whole[:size])
        refused(published, READ)


def test_what_was_hashed_is_what_is_read(published: Path) -> None:
    """A file that was replaced after its hash was taken is not read any more."""
    statistics, whole = Statistics.open(published), published.read_bytes()
    assert statistics.sha256() == hashlib.sha256(whole).hexdigest()
    published.unlink()
    published.write_bytes(whole)
    with pytest.raises(UserError, match="changed while it was being read"):
        statistics.gram(next(iter(statistics.inputs)))


def test_a_newer_protocol(published: Path) -> None:
    rewrite(published, amend=lambda header: header.update(protocol=99))
    refused(published, "99")


def test_no_header_or_a_malformed_one(published: Path) -> None:
    state = load_file(published)
    save_file(state, published)
    refused(published, "no merganser|header|metadata")
    save_file(state, published, metadata={"merganser": "{not json"})
    refused(published, "JSON")
    save_file(state, published, metadata={"merganser": '{"protocol": 1}'})
    refused(published, "manifest_hash")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("prefix", ["gram.", "mean.", "fisher."])
def test_not_finite(published: Path, prefix: str, value: float) -> None:
    rewrite(published, lambda state: state[first(state, prefix)].view(-1)[0:1].fill_(value))
    refused(published, "(?i)nan|finite", validate=True)


def test_a_full_matrix_that_could_be_asymmetric_is_no_gram(published: Path) -> None:
    def square(state: State) -> None:
        name = first(state, "gram.")
        state[name] = torch.randn(16, 16)

    rewrite(published, square)
    refused(published, "gram")


def test_not_positive_semi_definite(published: Path) -> None:
    def spoil(state: State) -> None:
        packed = state[first(state, "gram.")]
        packed[1] = 100 * packed.abs().max()  # an off-diagonal far beyond what the diagonal allows

    rewrite(published, spoil)
    refused(published, "positive semi-definite", validate=True)


def test_negative_counts_and_fisher(published: Path) -> None:
    rewrite(published, lambda state: state[first(state, "count.")][:1].fill_(-1))
    refused(published, "negative", validate=True)


def test_shapes_that_would_explode_are_refused_before_allocation(published: Path) -> None:
    whole = published.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    name = first(header, "gram.")
    header[name]["shape"] = [10**15]
    text = json.dumps(header).encode()
    published.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    refused(published, READ)


def test_missing_tensors(published: Path) -> None:
    rewrite(published, lambda state: state.__delitem__(first(state, "gram.")))
    refused(published, "is missing")


def test_tensors_that_no_layer_explains(published: Path) -> None:
    rewrite(published, lambda state: state.update({"gram.elsewhere": torch.ones(3)}))
    refused(published, "belongs to no layer")


def test_statistics_of_two_halves_add_up_to_the_whole(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = make_model("bert")
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    everything = batches(3, 5)
    parts = [
        Statistics.in_memory(*collect_statistics(model, checkpoint, half, fisher="expected"))
        for half in (everything[:2], everything[2:])
    ]
    header, tensors = collect_statistics(model, checkpoint, everything, fisher="expected")
    summed_header, summed = add(parts)
    assert (summed_header.examples, summed_header.tokens) == (header.examples, header.tokens) == (20, 140)
    assert set(summed) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(summed[name], tensor, rtol=1e-4, atol=1e-6)


def test_statistics_of_other_weights_do_not_add(tmp_path: Path) -> None:
    parts = []
    for seed in (1, 2):
        model = make_model("bert", seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        checkpoint = open_checkpoint(tmp_path / str(seed))
        parts.append(Statistics.in_memory(*collect_statistics(model, checkpoint, batches(seed, 1))))
    with pytest.raises(UserError):
        add(parts)


def test_an_interrupted_write_leaves_nothing(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = Statistics.open(published)
    tensors = {name: statistics.packed(name) for name in statistics.tensors}
    target = published.parent / "other" / FILE_NAME
    target.parent.mkdir()

    def stopped(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_statistics(target, statistics.header, tensors)
    assert list(target.parent.iterdir()) == []


def test_protocol_1_stays_readable(resources_of_old: Path) -> None:
    """A file written by the first version; a reader of protocol N reads every older one."""
    statistics = Statistics.open(resources_of_old)
    statistics.validate()
    header = statistics.header
    assert header.protocol == 1 and header.examples == 8 and header.label == "kept for ever"
    layer = statistics.layer("classifier.weight")
    assert layer is not None and layer.input is not None
    gram = statistics.gram(layer.input)
    assert gram.shape == (16, 16) and torch.equal(gram, gram.T)
    assert statistics.mean(layer.input).shape == (16,)
    total = statistics.count("bert.embeddings.word_embeddings").sum()
    assert int(total) == header.tokens


@pytest.fixture
def resources_of_old() -> Path:
    return Path(__file__).parent / "data" / "protocol-1.safetensors"
