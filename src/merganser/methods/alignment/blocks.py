"""Blocks whose hidden units or heads may stand in any order, and merging by putting them in one order first.

The hidden units of a feed-forward block may stand in any order without changing what it computes, and so may the heads
of an attention block: rows into a unit, their biases and columns out of it move together. The residual stream keeps its
order, since fine-tunes of one model share it; so the order of one block does not depend on that of another. Where
several query heads share a key and a value, they move together: the groups may stand in any order, and the heads of a
group keep theirs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from merganser.methods.base import Facts, Merged, Method, Options, Share, Unit, elements, transposed


@dataclass(frozen=True)
class AlignedBlock:
    """How a block's layers are called: the ends of their names, after a common beginning.

    Attributes:
        kind: ``feed-forward`` or ``heads``.
        rows: layers whose outputs are the units.
        columns: the layer whose inputs they are.
        maybe: further layers of the first kind, which only some configurations have.
        fused: how many layers' outputs the first holds one after another.
        fixed: why the units cannot be permuted, where they cannot.
    """

    kind: str
    rows: tuple[str, ...]
    columns: str
    maybe: tuple[str, ...] = ()
    fused: int = 1
    fixed: str | None = None


_SHARED_BIAS = "a relative position bias, shared by all layers, fixes the order of the heads"

BLOCKS = (
    AlignedBlock("feed-forward", ("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, DeBERTa, MPNet
    AlignedBlock("feed-forward", ("ffn.lin1",), "ffn.lin2"),  # DistilBERT
    AlignedBlock("feed-forward", ("DenseReluDense.wi",), "DenseReluDense.wo"),  # T5
    AlignedBlock("feed-forward", ("DenseReluDense.wi_0", "DenseReluDense.wi_1"), "DenseReluDense.wo"),  # T5 1.1
    AlignedBlock("feed-forward", ("mlp.c_fc",), "mlp.c_proj"),  # GPT-2
    AlignedBlock("feed-forward", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),  # Llama, Qwen, Gemma
    AlignedBlock("feed-forward", ("mlp.gate_up_proj",), "mlp.down_proj", fused=2),  # Phi-3, GLM
    AlignedBlock("feed-forward", ("mlp.Wi",), "mlp.Wo", fused=2),  # ModernBERT
    AlignedBlock("feed-forward", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    AlignedBlock("feed-forward", ("fc1",), "fc2"),  # OPT, BART, Phi, Whisper, CLIP
    AlignedBlock(
        "heads", ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense"
    ),  # BERT, RoBERTa
    AlignedBlock(
        "heads",
        ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        "attention.output.dense",
        maybe=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
    ),  # DeBERTa-v2, v3
    AlignedBlock("heads", ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin"),  # DistilBERT
    AlignedBlock("heads", ("attn.c_attn",), "attn.c_proj", fused=3),  # GPT-2
    AlignedBlock("heads", ("attn.Wqkv",), "attn.Wo", fused=3),  # ModernBERT
    AlignedBlock("heads", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),  # Llama
    AlignedBlock("heads", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"),  # OPT
    AlignedBlock("heads", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.dense"),  # Phi
    AlignedBlock("heads", ("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v"), "EncDecAttention.o"),  # T5
    AlignedBlock(
        "heads", ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"), "SelfAttention.o", fixed=_SHARED_BIAS
    ),  # T5
    AlignedBlock(
        "heads", ("attention.attn.q", "attention.attn.k", "attention.attn.v"), "attention.attn.o", fixed=_SHARED_BIAS
    ),  # MPNet
)


class AlignedOptions(Options):
    """Options of every method that aligns."""

    heads: bool = Field(True, description="match attention heads, too")


@dataclass(frozen=True, kw_only=True)
class Aligned(Method):
    """Average of blocks whose units were put in one order. It has no shape of others: its units are blocks."""

    @property
    def streaming(self) -> str:
        """Models are read one after the other."""
        return "one block of one model, and of the result"

    @abstractmethod
    def orders(self, unit: Unit, shares: Sequence[Share]) -> list[Tensor]:
        """The order of each contributor's units, (units,): the merge's unit j is its unit order[j]."""

    def units(self, facts: Sequence[Facts]) -> tuple[list[Unit], dict[str, str]]:
        """The blocks of :data:`BLOCKS`, each one unit."""
        by_name = {fact.name: fact for fact in facts if fact.stack is None}
        units: list[Unit] = []
        reasons: dict[str, str] = {}
        for fact in facts:
            for block in BLOCKS:
                prefix = _prefix(fact.name, block.columns)
                if (
                    fact.stack is not None
                    or prefix is None
                    or any(f"{prefix}{end}.weight" not in by_name for end in block.rows)
                ):
                    continue
                names = [f"{prefix}{end}.weight" for end in (*block.rows, *block.maybe)]
                rows = [by_name[name] for name in names if name in by_name]
                biases = [bias for row in rows if row.layer and (bias := by_name.get(row.layer.bias or ""))]
                reason = self._reason(block, prefix, rows, fact, by_name)
                members = [*rows, *biases, fact]
                if reason is None:
                    units.append(Unit(tuple(member.name for member in members), block.kind, tuple(members)))
                else:
                    reasons.update({member.name: reason for member in members})
        treated = {name for unit in units for name in unit.names}
        for fact in facts:
            if fact.name not in treated:
                reasons.setdefault(fact.name, "not of a hidden unit or head that can be matched")
        return units, reasons

    def merge(self, unit: Unit, shares: Sequence[Share]) -> Merged:
        """Put every contributor's units in their order and average."""
        total = sum(share.coefficient for share in shares)
        places, count = [axis_of(fact, unit) for fact in unit.facts], unit_count(unit)
        orders = self.orders(unit, shares)
        merged: dict[str, Tensor] = {}
        for share, order in zip(shares, orders, strict=True):
            for name, place in zip(unit.names, places, strict=True):
                part = split(share.tensor(name), place, count)
                scaled = join(part[order], place).to(torch.float64) * (share.coefficient / total)
                merged[name] = merged[name].add_(scaled) if name in merged else scaled
        moved = sum(int((order != torch.arange(count)).sum()) for order in orders)
        noun = "heads" if unit.kind == "heads" else "hidden units"
        return Merged(merged, f"{moved} of {count * (len(shares) - 1)} {noun} moved")

    def memory(self, unit: Unit, contributors: int) -> int:
        """Both sides to match in float64 with the sum; the costs, the transport plan and its solver's own."""
        matching = 5 * unit_count(unit) ** 2 if unit.kind == "feed-forward" else 0
        return elements(unit) * 8 * 6 + matching * 8

    def _reason(
        self, block: AlignedBlock, prefix: str, rows: Sequence[Facts], columns: Facts, by_name: dict[str, Facts]
    ) -> str | None:
        """Why a block's units are not matched; None where they are."""
        layers = [fact.layer for fact in (*rows, columns) if fact.layer and fact.layer.kind != "embedding"]
        if len(layers) <= len(rows):
            return "not a plain linear map"
        if any(layer.tied for layer in layers):
            return "tied: one tensor serves several layers"
        if any(layer.bias and layer.bias not in by_name for layer in layers[:-1]):
            return "a bias of its block is not merged with it"
        outputs = {_size(fact, outputs=True) for fact in rows}
        if block.kind == "heads":
            if not self.options.heads:
                return "heads are switched off"
            if block.fixed:
                return block.fixed
            width = _size(columns, outputs=False) // (columns.heads or 1)  # of a head
            if not columns.heads or not width or any(size % (width * block.fused) for size in outputs):
                return "the configuration does not say how many heads there are"
            groups = min(outputs) // (width * block.fused)
            if groups < columns.heads and (groups == 1 or columns.heads % groups):
                return "grouped-query attention with one key and value, which all query heads share"
        sizes = {max(outputs)} if block.kind == "heads" else outputs
        if sizes != {_size(columns, outputs=False) * block.fused}:
            return "the outputs of the block's first layers are not the inputs of its second"
        known = {columns.layer.bias if columns.layer else None, columns.name}
        known |= {name for fact in rows if fact.layer for name in (fact.name, fact.layer.bias)}
        inside, dot, _ = block.rows[0].rpartition(".")
        inside = f"{prefix}{inside}{dot}"
        for name, fact in by_name.items():
            if name.startswith(inside) and name not in known and {*outputs, columns.heads} & {*fact.shape[:1]}:
                return f"{name.removeprefix(prefix)} may be ordered like its units"
        return None


@dataclass(frozen=True)
class UnitAxis:
    """Where the units of a block are in one of its tensors.

    Attributes:
        axis: the dimension that they run along.
        fused: how many times, one after another.
    """

    axis: int
    fused: int


def axis_of(fact: Facts, unit: Unit) -> UnitAxis:
    """Where the units are: along the outputs of the first layers, along the inputs of the last."""
    if fact.layer is None:
        return UnitAxis(0, _fused(unit))
    if fact.name == unit.names[-1]:
        return UnitAxis(0 if transposed(fact) else 1, 1)
    return UnitAxis(1 if transposed(fact) else 0, _fused(unit))


def unit_count(unit: Unit) -> int:
    """How many hidden units or heads a block has; where query heads share keys and values, how many groups of heads."""
    last = unit.facts[-1]
    inputs = _size(last, outputs=False)
    if unit.kind != "heads" or not last.heads:
        return inputs
    smallest = min(_size(fact, outputs=True) for fact in unit.facts[:-1] if fact.layer)
    return smallest * last.heads // (inputs * _fused(unit))


def split(tensor: Tensor, place: UnitAxis, count: int) -> Tensor:
    """A tensor with its units in front, (units, fused, width, rest); :func:`join` is the inverse."""
    front = tensor.movedim(place.axis, 0)
    return front.reshape(place.fused, count, -1, *front.shape[1:]).transpose(0, 1)


def join(parts: Tensor, place: UnitAxis) -> Tensor:
    """A tensor in on-disk orientation from (units, fused, width, rest)."""
    return parts.transpose(0, 1).flatten(0, 2).movedim(0, place.axis)


def features(unit: Unit, share: Share) -> Tensor:
    """All numbers that belong to each unit of a contributor's block, (units, numbers) in float64."""
    places, count = [axis_of(fact, unit) for fact in unit.facts], unit_count(unit)
    parts = (split(share.tensor(name), place, count) for name, place in zip(unit.names, places, strict=True))
    return torch.cat([part.flatten(1).to(torch.float64) for part in parts], dim=1)


def _prefix(name: str, end: str) -> str | None:
    """What stands before ``end`` in the name of a weight; None where it is no such weight."""
    beginning = name.removesuffix(f"{end}.weight")
    return beginning if beginning != name and (not beginning or beginning.endswith(".")) else None


def _size(fact: Facts, *, outputs: bool) -> int:
    """The number of outputs or inputs of a layer, by the shape of its weight."""
    return fact.shape[int(transposed(fact) == outputs)]


def _fused(unit: Unit) -> int:
    """How many layers' outputs the first layer of a block holds."""
    return _size(unit.facts[0], outputs=True) // _size(unit.facts[-1], outputs=False)
