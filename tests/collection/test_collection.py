"""Gram matrices, means and counts of every architecture, against inputs captured without padding."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from conftest import ARCHITECTURES, make_model
from merganser.checkpoints import open_checkpoint
from merganser.collection import collect_statistics
from merganser.collection.inputs import discover
from merganser.collection.masks import batch_masks
from merganser.collection.observer import Observer
from merganser.errors import DataError, StatisticsError
from merganser.statistics import Statistics, write_statistics
from merganser.tensors import unpack_upper
from statistics_examples import Example, alone, batched, collate, make_examples

BUCKETS = 16  # rows of the tiny DeBERTa's relative embeddings; no example has this many tokens


@pytest.fixture
def model_and_checkpoint(tmp_path: Path):  # type: ignore[no-untyped-def]
    def make(architecture: str = "bert", model_class: Any = None, **config: Any) -> tuple[Any, Any]:
        model = (
            make_model(architecture, **config)
            if model_class is None
            else model_class(ARCHITECTURES[architecture][0](**config)).eval()
        )
        model.save_pretrained(tmp_path / "model")
        return model, open_checkpoint(tmp_path / "model")

    return make


def captured(model: nn.Module, examples: list[Example]) -> dict[str, list[Tensor]]:
    """Inputs of each Linear, Conv1D and Embedding, example by example, float64 (ids as they are)."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D, nn.Embedding)
    found: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            handles.append(
                module.register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0].clone()))
            )
    with torch.no_grad():
        for example in examples:
            model(**alone(model, example))
    for handle in handles:
        handle.remove()
    return found


def expected_rows(inputs: list[Tensor]) -> Tensor:
    """(n, d) float64 of all inputs that are tokens; of all inputs where none is."""
    tokens = [x for x in inputs if x.shape[-2] != BUCKETS] or inputs
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in tokens]).double()


def check(header: Any, tensors: dict[str, Tensor], inputs: dict[str, list[Tensor]], vocabulary: dict[str, int]) -> None:
    """Each layer's statistics equal the captured inputs'; layers with equal inputs share."""
    seen = set()
    for layer in header.layers:
        seen.add(layer.module)
        if layer.kind == "embedding":
            ids = torch.cat([x.reshape(-1) for x in inputs[layer.module]])
            counts = torch.bincount(ids, minlength=vocabulary[layer.module])
            assert torch.equal(tensors[f"count.{layer.module}"], counts), layer.module
            assert layer.rows == len(ids)
            continue
        x = expected_rows(inputs[layer.module])
        gram = unpack_upper(tensors[f"gram.{layer.input}"]).double()
        truth = x.T @ x / len(x)
        assert (gram - truth).abs().max() <= 2e-6 * truth.abs().max(), layer.module
        mean = tensors[f"mean.{layer.input}"].double()
        assert (mean - x.mean(0)).abs().max() <= 2e-6 * x.abs().max(), layer.module
        if len(x) % BUCKETS:
            assert layer.rows == len(x), layer.module
    ours = {name for name in inputs if "relative_attention_bias" not in name}
    assert seen == ours  # nothing but pairs of positions is left out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_grams_and_counts_equal_inputs_without_padding(model_and_checkpoint, architecture: str) -> None:
    model, checkpoint = model_and_checkpoint(architecture)
    examples = make_examples(model)
    inputs = captured(model, examples)
    vocabulary = {n: m.num_embeddings for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for size, order in ((4, 1), (3, -1), (1, 1), (9, 1)):
        header, tensors = collect_statistics(model, checkpoint, batched(model, examples[::order], size))
        check(header, tensors, inputs, vocabulary)
        assert header.examples == len(examples)
        real = sum(len(e["input_ids"]) + len(e.get("labels", ())) for e in examples)
        assert header.tokens == real
    Statistics.in_memory(header, tensors).validate()


@pytest.mark.parametrize(
    ("architecture", "model_class", "config"),
    [
        ("gpt2", transformers.GPT2ForSequenceClassification, {"pad_token_id": 0}),
        ("llama", transformers.LlamaForSequenceClassification, {"pad_token_id": 0}),
        ("t5", transformers.T5EncoderModel, {}),
        ("bert", transformers.BertForTokenClassification, {}),
        ("bert", transformers.BertModel, {}),
        ("bert", transformers.BertForMaskedLM, {}),
        ("deberta-v2", transformers.DebertaV2ForTokenClassification, {}),
        ("roberta", transformers.RobertaForSequenceClassification, {"num_labels": 1}),
    ],
)
def test_other_heads(model_and_checkpoint, architecture: str, model_class: Any, config: dict[str, Any]) -> None:
    model, checkpoint = model_and_checkpoint(architecture, model_class, **config)
    model.config.is_encoder_decoder = False
    examples = make_examples(model)
    vocabulary = {n: m.num_embeddings for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    header, tensors = collect_statistics(model, checkpoint, batched(model, examples, 4))
    inputs = captured(model, examples)
    saved = {layer.module for layer in header.layers}
    check(header, tensors, {n: x for n, x in inputs.items() if n in saved or "relative" in n}, vocabulary)
    assert len(saved) > 8


def test_deberta_with_projections_of_positions_alone(tmp_path: Path) -> None:
    config = ARCHITECTURES["deberta-v2"][0]()
    config.share_att_key = False
    model = transformers.DebertaV2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    examples = make_examples(model)
    header, tensors = collect_statistics(model, open_checkpoint(tmp_path), batched(model, examples, 4))
    check(header, tensors, captured(model, examples), {"deberta.embeddings.word_embeddings": 40})
    projections = [layer for layer in header.layers if "pos_key_proj" in layer.module]
    assert projections and all("pos_key_proj" in layer.input for layer in projections)
    name = projections[0].module
    assert f"{name}: sees no tokens; every row of its inputs was counted" in header.notes


def test_one_example_as_long_as_the_relative_positions_are_many(model_and_checkpoint) -> None:
    """(1, 16, d) of tokens and (1, 16, d) of relative positions look the same: the probe tells them apart."""
    model, checkpoint = model_and_checkpoint("deberta-v2")
    ids = torch.arange(BUCKETS)[None] + 3
    header, tensors = collect_statistics(model, checkpoint, [{"input_ids": ids}])
    x: list[Tensor] = []
    query = model.deberta.encoder.layer[0].attention.self.query_proj
    handle = query.register_forward_pre_hook(lambda _, args: x.append(args[0].detach()))
    model(ids)
    handle.remove()
    assert len(x) == 2 and x[0].shape == x[1].shape
    layer = next(la for la in header.layers if la.module.endswith("layer.0.attention.self.query_proj"))
    truth = x[0][0].T @ x[0][0] / BUCKETS
    assert torch.allclose(unpack_upper(tensors[f"gram.{layer.input}"]), truth, atol=1e-5)


def test_layers_with_one_input_share_one_gram(model_and_checkpoint) -> None:
    model, checkpoint = model_and_checkpoint("t5")
    header, tensors = collect_statistics(model, checkpoint, batched(model, make_examples(model), 4))
    inputs = {layer.module: layer.input for layer in header.layers}
    own = "encoder.block.0.layer.0.SelfAttention"
    assert len({inputs[f"{own}.{x}"] for x in "qkv"}) == 1
    cross = {inputs[f"decoder.block.{b}.layer.1.EncDecAttention.{x}"] for b in range(2) for x in "kv"}
    assert len(cross) == 1 and next(iter(cross)) != inputs["decoder.block.0.layer.1.EncDecAttention.q"]
    grams = [name for name in tensors if name.startswith("gram.")]
    assert len(grams) == len({i for i in inputs.values() if i}) < len(inputs) / 1.5


def test_encoder_and_decoder_of_one_length(model_and_checkpoint) -> None:
    model, checkpoint = model_and_checkpoint("t5")
    examples = [
        {"input_ids": [5, 6, 7, 8], "labels": [9, 10]},
        {"input_ids": [5, 9], "labels": [11, 12, 13, 14]},
        {"input_ids": [7, 8, 9], "labels": [4]},
    ]
    batch = collate(model, examples)
    assert batch["input_ids"].shape == batch["labels"].shape
    header, tensors = collect_statistics(model, checkpoint, [batch])
    vocabulary = {n: m.num_embeddings for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    check(header, tensors, captured(model, examples), vocabulary)


def test_decoder_mask_wins_over_labels(model_and_checkpoint) -> None:
    model, checkpoint = model_and_checkpoint("t5")
    batch = collate(model, make_examples(model, 4))
    masks = batch_masks(batch, model)
    assert masks.decoder is not None and masks.decoder.rows == int((batch["labels"] != -100).sum())
    batch["decoder_attention_mask"] = torch.zeros_like(batch["labels"])
    batch["decoder_attention_mask"][:, 0] = 1
    header, _ = collect_statistics(model, checkpoint, [batch])
    rows = {layer.module: layer.rows for layer in header.layers}
    assert rows["lm_head"] == 4 and header.masking == "attention_mask; decoder_attention_mask"


def test_a_gap_in_the_labels_is_inside_the_decoder(model_and_checkpoint) -> None:
    model, _ = model_and_checkpoint("t5")
    batch = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([[5, -100, 6, -100]])}
    masks = batch_masks(batch, model)
    assert masks.decoder is not None and masks.decoder.mask.tolist() == [[True, True, True, False]]


def test_without_a_mask_every_token_counts_and_a_note_says_so(model_and_checkpoint) -> None:
    model, checkpoint = model_and_checkpoint()
    header, _ = collect_statistics(model, checkpoint, [{"input_ids": torch.randint(3, 40, (4, 7))}])
    assert header.tokens == 28 and header.masking == "none"
    assert any("no attention_mask" in note for note in header.notes)


def test_left_padding_is_left_out(model_and_checkpoint) -> None:
    model, checkpoint = model_and_checkpoint("llama")
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    header, tensors = collect_statistics(model, checkpoint, [{"input_ids": ids, "attention_mask": mask}])
    counts = tensors["count.model.embed_tokens"]
    assert header.tokens == 8 and counts[0] == 0 and int(counts.sum()) == 8


def test_a_pair_of_texts_counts_token_types(model_and_checkpoint) -> None:
    model, checkpoint = model_and_checkpoint()
    batch = {
        "input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "token_type_ids": torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]]),
    }
    _, tensors = collect_statistics(model, checkpoint, [batch])
    assert tensors["count.bert.embeddings.token_type_embeddings"].tolist() == [3, 3]
    positions = tensors["count.bert.embeddings.position_embeddings"]
    assert positions[:5].tolist() == [2, 2, 1, 1, 0] and positions.dtype == torch.int64


def test_the_model_is_left_as_it_was(model_and_checkpoint) -> None:
    model, checkpoint = model_and_checkpoint()
    model.train()
    model.bert.encoder.eval()
    model.classifier.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    header, tensors = collect_statistics(model, checkpoint, batched(model, make_examples(model), 4), fisher="expected")
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    required = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert required == {"classifier.weight"} and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again, more = collect_statistics(  # dropout was off: nothing is random
        model, checkpoint, batched(model, make_examples(model), 4), fisher="expected"
    )
    assert header == again and all(torch.equal(tensors[name], more[name]) for name in tensors)


def test_hooks_go_when_a_batch_fails(model_and_checkpoint) -> None:
    model, checkpoint = model_and_checkpoint()
    model.train()

    def batches():  # type: ignore[no-untyped-def]
        yield from batched(model, make_examples(model), 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_statistics(model, checkpoint, batches())
    with pytest.raises(IndexError):
        collect_statistics(model, checkpoint, [{"input_ids": torch.full((3, 4), 99)}])
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_the_same_bytes_on_any_number_of_threads(model_and_checkpoint, tmp_path: Path, architecture: str) -> None:
    model, checkpoint = model_and_checkpoint(architecture)
    hashes = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result = collect_statistics(
                model, checkpoint, batched(model, make_examples(model, 20), 4), fisher="expected"
            )
            path = write_statistics(tmp_path / f"{threads}.safetensors", *result)
            hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    finally:
        torch.set_num_threads(before)
    assert len(hashes) == 1


def test_no_examples(model_and_checkpoint) -> None:
    model, checkpoint = model_and_checkpoint()
    with pytest.raises(DataError, match="no examples"):
        collect_statistics(model, checkpoint, [])


def test_a_misshapen_mask(model_and_checkpoint) -> None:
    model, checkpoint = model_and_checkpoint()
    batch = {"input_ids": torch.full((2, 4), 5), "attention_mask": torch.ones(2, 1, 4, 4)}
    with pytest.raises(DataError, match="attention_mask has the shape"):
        collect_statistics(model, checkpoint, [batch])


def test_activations_that_are_not_finite_name_the_layer(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.output.LayerNorm.weight[3] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(StatisticsError, match=r"inputs of layer bert\.encoder\.layer\.1\.intermediate\.dense"):
        collect_statistics(model, open_checkpoint(tmp_path), batched(model, make_examples(model), 4))


class Toy(nn.Module):
    """Two layers whose inputs may or may not be one tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        large = len(input_ids) == 7  # of the batch, and of no probe
        y = self.a(x)
        if self.kind == "in place":
            x += 1
        elif self.kind == "later" and large:
            x = x + 1
        if self.kind == "skips" and large:
            return y
        z = self.b(x) + y
        return self.b(z) if self.kind == "twice" else z


def toy_layers() -> list[Any]:
    from merganser.checkpoints.layers import Layer

    linear = [Layer(name, "linear", f"{name}.weight", f"{name}.bias", False) for name in "ab"]
    return [Layer("embed", "embedding", "embed.weight", None, False), *linear]


def observe(kind: str) -> tuple[Toy, Any, Observer]:
    from merganser.collection.gram import Workers

    torch.manual_seed(0)
    model = Toy(kind)
    batch = {"input_ids": torch.randint(0, 9, (7, 5))}
    with torch.no_grad(), Workers(1) as workers:
        wiring = discover(model, toy_layers(), batch)
        observer = Observer(model, wiring, workers, torch.device("cpu"))
        observer.add(batch)
        observer.finish()
    return model, wiring, observer


def test_a_tensor_that_is_changed_in_place_is_not_shared() -> None:
    _, wiring, _ = observe("")
    assert wiring.leaders == {"a": "a", "b": "a"}
    model, wiring, observer = observe("in place")
    assert wiring.leaders == {"a": "a", "b": "b"}
    gap = observer.grams["b"].mean() - observer.grams["a"].mean()
    assert torch.allclose(gap, torch.ones(4))
    assert model.training  # untouched by discover


def test_a_layer_that_is_called_twice_counts_both_inputs() -> None:
    _, wiring, observer = observe("twice")
    assert wiring.leaders == {"a": "a", "b": "b"}
    assert observer.grams["b"].rows == 2 * observer.grams["a"].rows == 70


@pytest.mark.parametrize(("kind", "what"), [("later", "no longer sees the same input as a"), ("skips", "less often")])
def test_structure_that_changes_with_the_data_is_an_error(kind: str, what: str) -> None:
    with pytest.raises(StatisticsError, match=what):
        observe(kind)


def test_large_widths_and_batches_use_tiles_and_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    from merganser.collection import gram

    monkeypatch.setattr(gram, "TILE", 3)
    torch.manual_seed(0)
    x = torch.randn(50, 8)
    for capacity in (0, 7, 20, 64):
        with gram.Workers(2) as workers:
            total = gram.Gram(8, capacity, torch.device("cpu"))
            for part in x.split([5, 30, 6, 9]):
                if not total.fits(len(part)):
                    workers.run(total.flush())
                place = total.reserve(len(part))
                if place is None:
                    workers.run(total.add(part))
                else:
                    gram.fill(place, torch.cat([part, part]), torch.arange(len(part)))
            workers.run(total.flush())
        assert total.rows == 50
        assert torch.allclose(total.mean(), x.mean(0), atol=1e-6)
        assert torch.allclose(total.mean_product().triu(), (x.T @ x / 50).triu(), atol=1e-5)


def test_buffers_stay_within_their_budget() -> None:
    from merganser.collection.gram import buffer_rows

    widths = [384] * 18 + [1536] * 6
    assert 4 * sum(widths) * buffer_rows(widths, 2**28) <= 2**28
    assert buffer_rows(widths, 2**28) > 4000
    assert buffer_rows([4096] * 1000, 2**28) == 0
    assert buffer_rows([8], 2**28) == 8192
