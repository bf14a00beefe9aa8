"""A contributor of one tensor that lies in memory, for methods that are tried without files."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class InMemory:
    """A share of one tensor, or of some of its rows, and of the base model's."""

    number: int
    coefficient: float
    weight: Tensor
    origin: Tensor

    def stored(self, name: str) -> Tensor:
        return self.weight.clone()

    def tensor(self, name: str) -> Tensor:
        return self.weight.clone()

    def base(self, name: str) -> Tensor:
        return self.origin.clone()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.weight[start:stop].clone() if self.weight.dim() else self.weight.clone()

    def base_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.origin[start:stop].clone() if self.origin.dim() else self.origin.clone()
