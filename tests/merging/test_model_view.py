"""Contributors of one model whose files differ meet in the model, and what is written opens as the merge in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import merganser
from architectures.tiny import TINY
from merganser.checkpoints import open_checkpoint
from merganser.checkpoints.model_view import aligned, view_of
from merganser.checkpoints.sources import read_source
from merganser.collection.collector import collect_statistics
from merganser.collection.stacks import Experts
from merganser.errors import CheckpointError, Problems, RecipeError, UserError
from merganser.statistics import FILE_NAME as STATISTICS
from merganser.statistics import write_statistics

WEIGHTS = "model.safetensors"
Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def make(name: str, **changes: Any) -> nn.Module:
    """A tiny model of a class, with other values in its configuration."""
    model = TINY[name].build(seed=0)
    if not changes:
        return model
    values = {**model.config.to_dict(), **changes}
    torch.manual_seed(0)
    return type(model)(type(model.config).from_dict(values))


def vary(model: nn.Module, seed: int) -> nn.Module:
    """Noise on every parameter; tied ones stay one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def store(model: nn.Module, folder: Path, edit: Edit | None = None) -> Path:
    """Save a model; ``edit`` changes what its file holds."""
    model.save_pretrained(folder)
    if edit is not None:
        save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def open_whole(folder: Path, name: str) -> nn.Module:
    """The model that opens, with no key missing, unexpected or mismatched."""
    model, said = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in model.named_parameters(remove_duplicate=False)}


def assert_average(merged: nn.Module, *models: nn.Module) -> None:
    """Every parameter of what opens is the mean of those in memory, in float64."""
    states = [state(model) for model in models]
    for name, value in state(merged).items():
        wanted = torch.stack([one[name] for one in states]).mean(0)
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def pack(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mixtral's experts as the model class has them: one tensor for all, gate above up."""
    found = {name: value for name, value in stored.items() if ".experts." not in name}
    for layer in (0, 1):
        stem = f"model.layers.{layer}.block_sparse_moe.experts"
        count = len([name for name in stored if name.startswith(stem) and name.endswith("w1.weight")])
        parts = [[stored[f"{stem}.{e}.{w}.weight"] for e in range(count)] for w in ("w1", "w2", "w3")]
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(parts[0], parts[2], strict=True)]
        )
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(parts[1])
    return found


def renamed(old: str, new: str) -> Edit:
    return lambda stored: {name.replace(old, new): value for name, value in stored.items()}


def with_copy(name: str, of: str, factor: float = 1.0) -> Edit:
    return lambda stored: {**stored, name: stored[of] * factor}


#: The class, and how the second contributor's file (or the first's) is written otherwise.
OTHERWISE: dict[str, tuple[str, Edit]] = {
    "packed experts": ("MixtralForCausalLM", pack),
    "gamma and beta": (
        "BertForSequenceClassification",
        lambda stored: {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for name, value in stored.items()
        },
    ),
    "language_model.model": (
        "Gemma3ForConditionalGeneration",
        lambda stored: {
            name.replace("model.language_model.", "language_model.model.")
            .replace("model.vision_tower.", "vision_tower.")
            .replace("model.multi_modal_projector.", "multi_modal_projector."): value
            for name, value in stored.items()
        },
    ),
    "tied copy stored": ("LlamaForCausalLM", with_copy("lm_head.weight", "model.embed_tokens.weight")),
    "copies of shared": (
        "T5ForConditionalGeneration",
        lambda stored: {
            **stored,
            "encoder.embed_tokens.weight": stored["shared.weight"].clone(),
            "decoder.embed_tokens.weight": stored["shared.weight"].clone(),
        },
    ),
    "old buffers": (
        "LlamaForCausalLM",
        lambda stored: {**stored, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    ),
    "position ids": (
        "BertForSequenceClassification",
        lambda stored: {**stored, "bert.embeddings.position_ids": torch.arange(16)[None]},
    ),
}


@pytest.mark.parametrize("first", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("case", OTHERWISE)
def test_contributors_whose_files_differ_meet(case: str, first: bool, tmp_path: Path) -> None:
    """Whichever comes first gives the names; what opens is the mean of the models in memory."""
    name, edit = OTHERWISE[case]
    changes = {"tie_word_embeddings": True} if "tied" in case else {}
    a, b = vary(make(name, **changes), 1), vary(make(name, **changes), 2)
    edits = (edit, None) if first else (None, edit)
    places = [store(model, tmp_path / key, one) for model, key, one in zip((a, b), "ab", edits, strict=True)]
    result = merganser.merge([*map(str, places)], tmp_path / "out", method="simple")
    assert_average(open_whole(tmp_path / "out", name), a, b)
    ours, theirs = open_checkpoint(tmp_path / "out").tensors, open_checkpoint(places[0]).tensors
    assert set(ours) <= set(theirs)  # the first contributor's names
    base = store(make(name, **changes), tmp_path / "base", None if first else edit)
    by_actmat = merganser.merge([*map(str, places)], tmp_path / "actmat", method="actmat", base=str(base))
    assert by_actmat.coverage.share == 1 and result.coverage.share == 1
    open_whole(tmp_path / "actmat", name)


def test_canonical_names_are_those_that_transformers_would_save(tmp_path: Path) -> None:
    """Whatever the contributors' files say; a method with a base and each expert's statistics reads what lies there."""
    a, b = vary(make("MixtralForCausalLM"), 1), vary(make("MixtralForCausalLM"), 2)
    places = [store(a, tmp_path / "a", pack), store(b, tmp_path / "b", pack)]
    base = store(make("MixtralForCausalLM"), tmp_path / "base")
    for method in ("simple", "actmat"):
        out = tmp_path / method
        result = merganser.merge([*map(str, places)], out, method=method, base=str(base), names="canonical")
        assert result.coverage.share == 1
        assert load_file(out / WEIGHTS).keys() == load_file(base / WEIGHTS).keys()
        merged = open_whole(out, "MixtralForCausalLM")
        if method == "simple":
            assert_average(merged, a, b)
        merganser.verify(out)
        assert merganser.reproduce(out) == []
    with pytest.raises(RecipeError, match="keep_separate"):
        merganser.merge([*map(str, places)], tmp_path / "x", names="canonical", keep_separate=["lm_head*"])


def test_every_way_round_is_read(tmp_path: Path) -> None:
    """Sources of packed experts in separate ones and of separate ones in packed, to the bit."""
    model = vary(make("MixtralForCausalLM"), 1)
    apart, packed = store(model, tmp_path / "apart"), store(model, tmp_path / "packed", pack)
    for one, other in ((apart, packed), (packed, apart)):
        mine, theirs = open_checkpoint(one), open_checkpoint(other)
        sources = aligned(view_of(mine), view_of(theirs))
        assert set(sources) == set(mine.tensors)
        for name, source in sources.items():
            whole = mine.read(name)
            assert source.shape(theirs) == tuple(whole.shape)
            assert torch.equal(read_source(theirs, source), whole), name
            assert torch.equal(read_source(theirs, source, 1, 3), whole[1:3]), name


@pytest.mark.parametrize("experts", ["exact", "shared"])
def test_each_expert_s_statistics_are_found_however_experts_lie(experts: Experts, tmp_path: Path) -> None:
    """RegMean of packed and separate contributors, each with the statistics of its own files: the same to the bit.

    The statistics are of models in memory: where files lie in it, products are rounded differently on some processors.
    """
    name, found = "MixtralForCausalLM", []
    for packed in ((False, False), (False, True), (True, False), (True, True)):
        places = []
        for seed, one in enumerate(packed, 1):
            model = vary(make(name), seed)
            place = store(model, tmp_path / f"{packed}-{seed}", pack if one else None)
            batches = [TINY[name].batch(seed=seed)]
            collected = collect_statistics(model, open_checkpoint(place), batches, experts=experts)
            write_statistics(place / STATISTICS, *collected)
            places.append(str(place))
        result = merganser.merge(places, tmp_path / f"out-{packed}", method="regmean")
        assert result.coverage.share == 1
        found.append(state(open_whole(tmp_path / f"out-{packed}", name)))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], value) for name, value in other.items())


def test_a_tied_and_an_untied_contributor(tmp_path: Path) -> None:
    """The untied one first: its head is averaged with the other's embedding; else it would be lost."""
    tied = vary(make("LlamaForCausalLM", tie_word_embeddings=True), 1)
    untied = vary(make("LlamaForCausalLM", tie_word_embeddings=False), 2)
    a, b = store(tied, tmp_path / "tied"), store(untied, tmp_path / "untied")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        merganser.merge([str(b), str(a)], tmp_path / "out", method="simple")
    for chosen in ("untied", "tied"):  # whosever configuration it is, it says of ties what the tensors are
        out = merganser.merge([str(b), str(a)], tmp_path / f"out-{chosen}", method="simple", config_from=chosen)
        assert_average(open_whole(Path(out), "LlamaForCausalLM"), tied, untied)
        assert json.loads((Path(out) / "config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(UserError, match="lm_head"):
        merganser.merge([str(a), str(b)], tmp_path / "other", method="simple", config_from="tied")


def test_copies_of_tied_tensors_that_differ_are_tensors_of_their_own(tmp_path: Path) -> None:
    """As transformers opens them; where only one contributor's differ, the result is tied no more and says so."""
    edit = with_copy("lm_head.weight", "model.embed_tokens.weight", 2.0)
    same = with_copy("lm_head.weight", "model.embed_tokens.weight")
    a, b = (vary(make("LlamaForCausalLM", tie_word_embeddings=True), seed) for seed in (1, 2))
    for edits, stated in (((edit, edit), True), ((same, edit), False)):
        places = [
            store(model, tmp_path / f"{stated}-{key}", one) for model, key, one in zip((a, b), "ab", edits, strict=True)
        ]
        out = tmp_path / f"out-{stated}"
        result = merganser.merge([*map(str, places)], out, method="simple")
        merged = open_whole(out, "LlamaForCausalLM")
        heads = [open_whole(place, "LlamaForCausalLM").lm_head.weight.detach() for place in places]
        torch.testing.assert_close(merged.lm_head.weight.detach(), torch.stack(heads).mean(0))
        assert_average(merged.model, a.model, b.model)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is stated
        assert any("tied to model.embed_tokens.weight no more" in note for note in result.notes) is not stated
    with pytest.raises(UserError, match=r"lm_head.*would be lost"):  # the first stores no head of its own
        first = store(a, tmp_path / "first")
        merganser.merge([str(first), str(tmp_path / "False-b")], tmp_path / "none", method="simple")


@pytest.mark.parametrize("name", ["FlaubertForSequenceClassification", "ResNetForImageClassification"])
def test_labels_are_matched_in_the_head_that_the_model_has(name: str, tmp_path: Path) -> None:
    """Whatever its tensor is called: rows of one label are averaged, in another order too."""
    labels, order = ["x", "y", "z"], [2, 0, 1]

    def labelled(names: list[str]) -> dict[str, Any]:
        return {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}

    a = vary(make(name, **labelled(labels)), 1)
    b = vary(make(name, **labelled([labels[i] for i in order])), 2)
    places = [store(model, tmp_path / key) for model, key in ((a, "a"), (b, "b"))]
    heads = {n for n, p in a.named_parameters() if p.shape[0] == 3 and ("classifier" in n or "summary" in n)}
    assert heads
    result = merganser.merge([*map(str, places)], tmp_path / "out", method="simple")
    assert any("matched by label name" in note for note in result.notes)
    with torch.no_grad():
        for parameter_name, parameter in b.named_parameters():
            if parameter_name in heads:
                parameter.copy_(parameter[[order.index(i) for i in range(3)]])
    assert_average(open_whole(tmp_path / "out", name), a, b)


def test_coverage_is_said_and_can_be_required(tmp_path: Path) -> None:
    base = store(make("BertForSequenceClassification"), tmp_path / "base")
    places = [store(vary(make("BertForSequenceClassification"), seed), tmp_path / str(seed)) for seed in (1, 2)]
    people = [*map(str, places)]
    settings: dict[str, Any] = {"method": "actmat", "base": str(base), "exclude": ["*.output.dense.weight"]}
    result = merganser.merge(people, tmp_path / "out", **settings)
    tensors = load_file(places[0] / WEIGHTS)
    linear = {n: v.numel() for n, v in tensors.items() if v.dim() == 2 and "embeddings" not in n}
    left_out = sum(size for name, size in linear.items() if name.endswith(".output.dense.weight"))
    assert (result.coverage.linear, result.coverage.reached) == (sum(linear.values()), sum(linear.values()) - left_out)
    assert result.coverage.others == {"excluded by '*.output.dense.weight'": left_out}
    assert any("reaches only" in note for note in result.notes)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["coverage"]["reached"] == result.coverage.reached
    assert f"{result.coverage.share:.1%} of the linear weights" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(RecipeError, match=r"reaches only .*excluded by"):
        merganser.merge(people, tmp_path / "more", require_coverage=0.95, **settings)
    assert not (tmp_path / "more").exists()


def test_a_configuration_that_does_not_fit_its_weights_is_found(tmp_path: Path) -> None:
    """What would open with random numbers is an error, before anything is written."""
    places = [store(vary(make("BertForSequenceClassification"), seed), tmp_path / str(seed)) for seed in (0, 1, 2)]
    for place in places:
        change_config(place, intermediate_size=99)
    base, *people = map(str, places)
    with pytest.raises((CheckpointError, Problems), match=r"intermediate|99"):
        merganser.merge(people, tmp_path / "out", method="actmat", base=base)
    assert not (tmp_path / "out").exists()


def test_what_no_contributor_stores_is_said(tmp_path: Path) -> None:
    edit: Edit = lambda stored: {n: v for n, v in stored.items() if not n.startswith("classifier")}  # noqa: E731
    places = [store(vary(make("BertForSequenceClassification"), s), tmp_path / str(s), edit) for s in (0, 1, 2)]
    base, *people = map(str, places)
    result = merganser.merge(people, tmp_path / "out", method="actmat", base=base)
    assert any("classifier.weight" in note and "random numbers" in note for note in result.notes)


def test_half_and_brain_floats_open_as_what_is_stored(tmp_path: Path) -> None:
    """A norm of 3e5 fits bfloat16 and not float16: the configuration says float32, which is what is stored."""
    a, b = vary(make("LlamaForCausalLM"), 1), vary(make("LlamaForCausalLM"), 2)
    with torch.no_grad():
        b.model.norm.weight.fill_(3e5)
    places = [store(a.to(torch.float16), tmp_path / "a"), store(b.to(torch.bfloat16), tmp_path / "b")]
    merganser.merge([*map(str, places)], tmp_path / "out", method="simple")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32 and bool(torch.isfinite(model.model.norm.weight).all())


def test_a_model_that_transformers_does_not_know_is_read_by_its_names(tmp_path: Path) -> None:
    for key, seed in (("base", 0), ("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        (tmp_path / key).mkdir()
        save_file({"net.0.weight": torch.randn(4, 3), "net.0.bias": torch.randn(4)}, tmp_path / key / WEIGHTS)
        (tmp_path / key / "config.json").write_text(json.dumps({"model_type": "of-my-own", "auto_map": {}}))
    people = [str(tmp_path / "a"), str(tmp_path / "b")]
    result = merganser.merge(people, tmp_path / "out", method="actmat", base=str(tmp_path / "base"))
    assert any("names on disk" in note for note in result.notes) and result.coverage.share == 1
