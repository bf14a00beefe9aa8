"""Small things about tensors."""

from __future__ import annotations

import pytest
import torch

from merganser.tensors import byte_view, is_finite, mirror_upper, pack_upper, unpack_upper


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_the_bytes_of_a_tensor_are_seen_and_written_through(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    view = byte_view(tensor)
    assert bytes(view) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    view[:] = bytes(len(view))
    assert not tensor.any()
    assert len(byte_view(tensor[:0])) == 0


def test_what_does_not_lie_in_a_row_has_no_view_of_its_bytes() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        byte_view(torch.zeros(3, 2).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 127, 128, 1500])
def test_a_packed_triangle_is_unpacked_to_the_symmetric_matrix(dtype: torch.dtype, width: int) -> None:
    """Up to a width that is held in huge pages."""
    half = torch.randn(width, width, generator=torch.Generator().manual_seed(width))
    symmetric = (half + half.T).to(dtype)
    assert torch.equal(unpack_upper(pack_upper(symmetric)), symmetric)
    assert torch.equal(mirror_upper(symmetric.triu()), symmetric)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_what_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    numbers = [[0.0, -0.0, largest], [-largest, torch.finfo(dtype).tiny, -1.0]]
    sound = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    assert is_finite(sound) and is_finite(sound[:0]) and is_finite(sound.T)
    for value in (float("inf"), -float("inf"), float("nan"), -float("nan")):
        for place in range(6):
            broken = sound.clone()
            broken[place // 3, place % 3] = value
            assert not is_finite(broken), (value, place)
