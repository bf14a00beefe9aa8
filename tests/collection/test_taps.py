"""What layers are given, where that is more than the argument of a module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from collection.test_padding import SMALL, check, inputs_of, saved
from merganser.collection import collect_statistics, inputs
from merganser.collection.taps import patches
from merganser.tensors import unpack_upper
from statistics_examples import alone, batched, make_examples


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(3, 5, 4, stride=2, padding=1), (2, 3, 11)),
        (nn.Conv1d(3, 5, 3, padding="same", dilation=2), (2, 3, 11)),
        (nn.Conv1d(3, 5, 3, padding=2, padding_mode="reflect"), (3, 11)),
        (nn.Conv2d(3, 5, (2, 3), stride=(2, 3)), (2, 3, 8, 9)),
        (nn.Conv2d(3, 5, 3, padding=(1, 2), dilation=(1, 2)), (2, 3, 8, 9)),
        (nn.Conv3d(2, 4, (2, 3, 2), stride=2, padding=(0, 1, 1)), (2, 2, 4, 6, 5)),
    ],
)
def test_a_convolution_is_a_linear_map_of_its_patches(module: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = patches(module, x) @ module.weight.flatten(1).T + module.bias
    expected = module(x if x.ndim == module.weight.ndim else x[None])
    assert torch.allclose(found.movedim(-1, 1), expected, atol=1e-5)


def squeeze() -> Any:
    groups = dict.fromkeys(
        ("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups", "output_groups"), 1
    )
    return t.SqueezeBertForSequenceClassification(t.SqueezeBertConfig(**SMALL, embedding_size=16, **groups))


def test_convolutions_of_text_have_gram_matrices_of_real_tokens(tmp_path: Path) -> None:
    model, checkpoint = saved(squeeze, tmp_path)
    examples = make_examples(model)
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, n=name: found.setdefault(n, []).append(args[0][0].T))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d)
    ]
    with torch.no_grad():
        for example in examples:
            model(**alone(model, example))
    for handle in handles:
        handle.remove()
    header, tensors = collect_statistics(model, checkpoint, batched(model, examples, 4))
    convolutions = {layer.module: layer for layer in header.layers if layer.kind == "convolution"}
    assert header.protocol == 4 and convolutions.keys() == found.keys()
    for name, rows in found.items():  # their kernels are one wide
        x = torch.cat(rows).double()
        gram = unpack_upper(tensors[f"gram.{convolutions[name].input}"]).double()
        expected = x.T @ x / len(x)
        assert convolutions[name].rows == len(x) == header.tokens
        assert (gram - expected).abs().max() <= 5e-6 * expected.abs().max(), name


def test_patches_that_are_too_wide_are_left_out_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "WIDEST_PATCH", 15)
    model, checkpoint = saved(squeeze, tmp_path)
    header, _ = collect_statistics(model, checkpoint, batched(model, make_examples(model), 4))
    assert header.layers and all(layer.kind != "convolution" for layer in header.layers)
    assert sum("patches of more than 15 numbers" in note for note in header.notes) == 12


def test_routers_and_weights_that_stand_on_the_left_are_linear_maps(tmp_path: Path) -> None:
    mixtral = t.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    model, checkpoint = saved(lambda: t.MixtralForCausalLM(mixtral), tmp_path / "mixtral")
    examples = make_examples(model)
    gate = model.model.layers[1].mlp.gate
    found: list[Tensor] = []
    handle = gate.register_forward_pre_hook(lambda _, args: found.append(args[0].reshape(-1, 16)))
    truth = inputs_of(model, examples)
    handle.remove()
    header, tensors = collect_statistics(model, checkpoint, batched(model, examples, 4))
    layer = next(layer for layer in header.layers if layer.module == "model.layers.1.mlp.gate")
    x = torch.cat(found).double()
    gram = unpack_upper(tensors[f"gram.{layer.input}"]).double()
    assert layer.rows == len(x) and (gram - x.T @ x / len(x)).abs().max() <= 1e-5 * gram.max()
    check(model, header, tensors, truth)

    mamba = t.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    model, checkpoint = saved(lambda: t.MambaForCausalLM(mamba), tmp_path / "mamba")
    mixer = model.backbone.layers[1].mixer
    found.clear()
    plain = mixer.dt_proj.weight

    class Left(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in ("matmul", "__matmul__") and args[0] is plain:
                found.append(args[1].transpose(1, 2).reshape(-1, args[1].shape[1]))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Left():
        for example in examples:
            model(**alone(model, example))
    header, tensors = collect_statistics(model, checkpoint, batched(model, examples, 4))
    layer = next(layer for layer in header.layers if layer.module == "backbone.layers.1.mixer.dt_proj")
    x = torch.cat(found).double()
    gram = unpack_upper(tensors[f"gram.{layer.input}"]).double()
    assert layer.rows == len(x) and (gram - x.T @ x / len(x)).abs().max() <= 1e-5 * gram.max()
