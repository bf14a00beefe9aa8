"""Who decides how much of a merge that is weighted by statistics: shares of Σ cᵢGᵢ, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser.text import listed

DIGITS = 6  # of a share, more than any reading of it needs


@dataclass(frozen=True)
class Influence:
    """The contributors' shares of the summed metric.

    Attributes:
        of: what is summed: ``gram`` (the trace of each layer's Gram matrices, times the coefficients), ``fisher``
            (the Fisher information of each tensor, likewise) or ``kfac`` (the trace of the product of both factors).
        contributors: what they are called, in the order of the merge.
        overall: the share of each in the whole merge: the mean of its shares, each layer counting by its numbers.
        layers: the share of each in each layer (for Fisher information, tensor).
    """

    of: str
    contributors: tuple[str, ...]
    overall: tuple[float, ...]
    layers: Mapping[str, tuple[float, ...]]

    @classmethod
    def of_parts(
        cls, of: str, contributors: Sequence[str], parts: Sequence[tuple[str, int, Sequence[float]]]
    ) -> Influence | None:
        """From what each contributor brings to each layer.

        Args:
            of: see the class.
            contributors: what they are called.
            parts: of each layer its name, how many numbers are merged there, and each cᵢ times the size of the metric.
        """
        layers: dict[str, tuple[float, ...]] = {}
        overall, weight = [0.0] * len(contributors), 0
        for name, numbers, sizes in parts:
            if (total := sum(sizes)) <= 0:
                continue
            shares = [size / total for size in sizes]
            layers[name] = tuple(_rounded(share) for share in shares)
            overall = [whole + numbers * share for whole, share in zip(overall, shares, strict=True)]
            weight += numbers
        if not weight:
            return None
        return cls(of, tuple(contributors), tuple(_rounded(whole / weight) for whole in overall), layers)

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """For each contributor its name, its share overall, and the smallest and largest of a layer, as text."""
        found = []
        for number, title in enumerate(self.contributors):
            smallest, largest = (
                pick(self.layers, key=lambda name: (self.layers[name][number], name)) for pick in (min, max)
            )
            ends = [f"{self.layers[name][number]:.1%} ({name})" for name in (smallest, largest)]
            found.append((title, f"{self.overall[number]:.1%}", *ends))
        return [(title, whole, low, high) for title, whole, low, high in found]

    def __str__(self) -> str:
        """One line: ``a 51.0%, b 49.0%``."""
        shown = [f"{title} {share:.1%}" for title, share in zip(self.contributors, self.overall, strict=True)]
        return listed(shown, 8)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        layers = {name: list(shares) for name, shares in self.layers.items()}
        return {"of": self.of, "overall": list(self.overall), "layers": layers}

    def section(self) -> str:
        """A section of the model card, in Markdown."""
        rows = "\n".join(f"| {' | '.join(row)} |" for row in self.rows)
        what = {
            "gram": "Gram matrices",
            "fisher": "Fisher information",
            "kfac": "Kronecker-factored Fisher information",
        }[self.of]
        return (
            f"\n## Influence\n\nEach contributor's share of the summed {what}, which is how much it decides.\n\n"
            f"| contributor | overall | least | most |\n|---|---|---|---|\n{rows}\n"
        )


def _rounded(share: float) -> float:
    return float(f"{share:.{DIGITS}g}")
