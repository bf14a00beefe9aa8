"""Which quantisation a checkpoint is in, from its configuration and the headers of its weights alone.

FP8 and FP4 codes with their scales can be read as numbers, one slice at a time: which tensor holds the codes, which the
scales, and how many weights share a scale is found here. Everything else (GPTQ, AWQ, bitsandbytes, …) is recognised so
that it can be refused: codes must never be averaged as if they were weights. A folder whose configuration forgot to say
that it is quantised is recognised by the names and dtypes of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from merganser.checkpoints.header import TensorInfo
from merganser.errors import CheckpointError

#: Methods (``quant_method``) whose FP8 and FP4 tensors all mean code × scale. Other codes of theirs are still refused.
_PRODUCTS = {None, "fp8", "mxfp8", "mxfp4", "fbgemm_fp8", "compressed-tensors", "quark", "modelopt"}
_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")  # U8: exponents of two, as F8_E8M0 has them
_USUAL_BLOCK = 128  # where the configuration does not tell: DeepSeek-V3 and all that follow it
_PACKED_GROUP = 16  # bytes of an MXFP4 group: 32 codes of 4 bits
_KEYS = ("quantization_config", "compression_config", "quantization")
_MLX = {"group_size", "bits"}
#: How transformers dequantises codes that are not read here, where the library of that name is installed.
_DEQUANTISE = {
    # bitsandbytes has no way back from numbers to its own format, in which transformers would like to save
    "bitsandbytes": "M.from_pretrained({!r}).dequantize()"
    ".save_pretrained('full-precision', save_original_format=False)",
    "compressed-tensors": "from transformers import CompressedTensorsConfig as C; "
    "M.from_pretrained({!r}, quantization_config=C(dequantize=True)).save_pretrained('full-precision')",
}
#: How the scales of activations and caches end; they belong to a way of computing that the result does not have.
_ACTIVATIONS = (
    "activation_scale", "activation_scale_inv", "input_scale", "input_scale_ub", "output_scale", "q_scale", "k_scale",
    "v_scale", "prob_output_scale", "qscale_act", "qscale_activation",
)  # fmt: skip
#: Names that only codes have, as the last part of a tensor's name or in it, and whose they are.
_TELLING = {
    "g_idx": "GPTQ", "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "absmax": "bitsandbytes, 4 bits",
    "quant_map": "bitsandbytes", "quant_state": "bitsandbytes, 4 bits", "SCB": "bitsandbytes, 8 bits",
    "weight_packed": "compressed-tensors", "weight_zero_point": "compressed-tensors",
    "weight_global_scale": "compressed-tensors (NVFP4)", "weight_scale_2": "NVFP4", "W_q": "HQQ",
    "codebooks": "AQLM", "_data": "quanto", "q_weight": "EXL2", "trellis": "EXL3",
    "bitmask": "compressed-tensors (sparse)",
}  # fmt: skip


@dataclass(frozen=True)
class Codes:
    """How one weight is stored: weight = code · scale, one scale for each block of codes.

    Attributes:
        codes: on-disk name of the codes.
        scale: on-disk name of the scales.
        shape: of the codes, counted one by one (two are packed into each byte of 4-bit ones).
        grid: the shape that the scales have as a grid over the codes: as many dimensions as ``shape``.
        blocks: how many codes share a scale along each dimension; the last block may be shorter.
        packed: the codes are FP4 numbers, two in a byte, the first in its lower half.
        transposed: the weight is the codes with their last two dimensions swapped.
    """

    codes: str
    scale: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    blocks: tuple[int, ...]
    packed: bool = False
    transposed: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape


@dataclass(frozen=True)
class Quantisation:
    """What is known of the quantisation of a checkpoint.

    Attributes:
        name: for people, such as ``FP8`` or ``gptq, 4 bits``.
        method: the ``quant_method`` that the configuration names, None where it does not.
        codes: how each weight that can be read as numbers is stored, by the weight's name.
        hidden: tensors that are part of the quantisation and no weights.
        unreadable: tensors whose codes cannot be read as numbers.
    """

    name: str
    method: str | None
    codes: Mapping[str, Codes] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    unreadable: tuple[str, ...] = ()

    @property
    def readable(self) -> bool:
        """Whether every weight can be read as numbers."""
        return self.method in _PRODUCTS and not self.unreadable


def find_quantisation(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Quantisation | None:
    """The quantisation of a checkpoint; None where its weights are plain numbers.

    Args:
        config: its ``config.json``.
        tensors: its tensors on disk.
    """
    settings = list(_declared(config))
    methods = [name for one in settings if (name := _method(one)) is not None]
    method = next((name for name in methods if name not in _PRODUCTS), methods[0] if methods else None)
    codes = _readable_codes(tensors, method, _block(settings))
    used = {name for one in codes.values() for name in (one.codes, one.scale)}
    modules = {one.codes.rpartition(".")[0] for one in codes.values()}
    left = [info for name, info in tensors.items() if name not in used]
    hidden = {info.name for info in left if (codes or settings) and _is_activation_scale(info, modules)}
    unreadable = tuple(info.name for info in left if info.name not in hidden and _is_code(info, tensors))
    unreadable += tuple(name for name in codes if codes[name].codes != name and name in tensors)
    if not settings and not codes and not unreadable:
        return None
    name = next((text for one in settings if _method(one) == method and (text := _describe(one))), "")
    if not name and unreadable:
        name = _told_by_names(unreadable) or _told_by_dtypes(unreadable, tensors)
    name = name or ("MXFP4" if codes and all(one.packed for one in codes.values()) else "FP8")
    return Quantisation(name, method, codes, frozenset((used | hidden) - set(codes)), unreadable)


def without_quantisation(config: Any) -> Any:
    """A configuration that says nothing of quantisation, at any depth."""
    if not isinstance(config, dict):
        return config
    return {key: without_quantisation(value) for key, value in config.items() if not _is_settings(key, value)}


class QuantisedWeights(CheckpointError):
    """Weights that are codes, and cannot be read as numbers."""


def refusal(place: str, config: Mapping[str, Any], quantisation: Quantisation) -> QuantisedWeights:
    """The one error for a whole checkpoint whose codes cannot be read, with what to do instead.

    Args:
        place: the checkpoint, as the user named it.
        config: its ``config.json``.
        quantisation: what was found.
    """
    codes, how = quantisation.unreadable, f"({quantisation.name})"
    if not codes and not quantisation.codes:
        return QuantisedWeights(
            f"config.json says that the weights are quantised {how}, but all of them are plain numbers",
            where=place,
            mend="give the model in full precision; if this is it, remove quantization_config from its config.json",
        )
    named = sorted(codes or quantisation.codes)
    more = f" and {len(named) - 1} more tensors hold" if len(named) > 1 else " holds"
    mend = "give the model in full precision that was quantised"
    if quantisation.method in _DEQUANTISE:
        name = next(iter(config.get("architectures") or ()), "AutoModel")
        code = f"from transformers import {name} as M; {_DEQUANTISE[quantisation.method].format(place)}"
        mend += (
            f", or dequantise this one where {quantisation.method} is installed: "
            f'python -c "{code}", and copy the tokenizer\'s files'
        )
    what = f"the weights are quantised {how}: {named[0]!r}{more} codes, and codes cannot be averaged"
    return QuantisedWeights(what, where=place, mend=mend)


def _is_settings(key: str, value: Any) -> bool:
    """Whether a configuration's entry is about quantisation; other things are called ``quantization``, too."""
    if not isinstance(value, dict):
        return key == _KEYS[0] and value is None
    return key in _KEYS and (key != "quantization" or set(value) >= _MLX)


def _declared(config: Any) -> Iterator[dict[str, Any]]:
    """Every quantisation that a configuration declares: its own, then those of the models inside it."""
    if isinstance(config, dict):
        yield from (value for key, value in config.items() if _is_settings(key, value) and value)
        for key, value in config.items():
            if key not in _KEYS:
                yield from _declared(value)


def _method(settings: Mapping[str, Any]) -> str | None:
    if any(settings.get(key) for key in ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")):
        return "bitsandbytes"
    method = settings.get("quant_method")
    if method is None:
        return "mlx" if set(settings) >= _MLX else None
    return str(method)


def _describe(settings: Mapping[str, Any]) -> str:
    method, details = _method(settings), []
    if method == "bitsandbytes":
        details.append("4 bits" if settings.get("load_in_4bit") or settings.get("_load_in_4bit") else "8 bits")
    elif isinstance(bits := settings.get("bits", settings.get("w_bit")), int):
        details.append(f"{bits} bits")
    details += [str(settings[key]) for key in ("format", "quant_algo") if isinstance(settings.get(key), str)]
    return ", ".join([*([method] if method else []), *details])


def _block(settings: list[dict[str, Any]]) -> tuple[int, int] | None:
    """The rows and columns that share a scale, where the configuration tells."""
    pending: list[Any] = list(settings)
    while pending:
        one = pending.pop(0)
        if isinstance(one, dict):
            for key in ("weight_block_size", "block_structure"):
                found = one.get(key)
                if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
                    return found[0], found[1]
            pending += one.values()
    return None


def _readable_codes(
    tensors: Mapping[str, TensorInfo], method: str | None, block: tuple[int, int] | None
) -> dict[str, Codes]:
    """The weights whose codes and scales fit together, by the weight's name."""
    found = {}
    for name, info in tensors.items():
        if name.endswith("_blocks") and info.dtype == "U8":
            plain = name.removesuffix("_blocks")
            one = _mxfp4(info, tensors.get(f"{plain}_scales"))
        elif info.dtype in _FP8 or (info.dtype == "I8" and method == "fp8"):
            plain, one = name, _scaled(info, tensors, method, block)
        else:
            continue
        if one is not None:
            found[plain] = one
    return found


def _mxfp4(codes: TensorInfo, scale: TensorInfo | None) -> Codes | None:
    """Experts as gpt-oss has them: codes (E, out, groups, 16), of the weight (E, in, out)."""
    if scale is None or scale.dtype not in ("U8", "F8_E8M0") or len(codes.shape) != 4:
        return None
    experts, rows, groups, width = codes.shape
    if width != _PACKED_GROUP or scale.shape != (experts, rows, groups):
        return None
    shape = (experts, rows, groups * 2 * width)
    return Codes(codes.name, scale.name, shape, scale.shape, (1, 1, 2 * width), packed=True, transposed=True)


def _scaled(
    codes: TensorInfo, tensors: Mapping[str, TensorInfo], method: str | None, block: tuple[int, int] | None
) -> Codes | None:
    """FP8 codes with the scales beside them, or FP4 codes that are two in each byte of an I8 tensor."""
    stem = codes.name.removesuffix("weight")
    beside = [f"{codes.name}_scale_inv", f"{codes.name}_scale"]
    beside += [f"{stem}scale", f"{stem}qscale_weight"] if stem != codes.name else []
    scale = next((tensors[name] for name in beside if name in tensors), None)
    if scale is None or scale.dtype not in _SCALES or len(codes.shape) not in (2, 3):
        return None
    packed = codes.dtype == "I8"
    shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if packed else codes.shape
    grid = _grid(shape, scale.shape, method)
    if grid is None:
        return None
    sides: list[int] = []
    for number, (size, scales) in enumerate(zip(shape, grid, strict=True)):
        from_end = number - len(shape)
        wanted = block[from_end] if block and from_end >= -2 else _USUAL_BLOCK
        side = _side(size, scales, wanted)
        if side is None:
            return None
        sides.append(side)
    return Codes(codes.name, scale.name, shape, grid, tuple(sides), packed)


def _grid(shape: tuple[int, ...], scale: tuple[int, ...], method: str | None) -> tuple[int, ...] | None:
    """The shape of the scales as a grid over the codes, with as many dimensions; None where they do not fit."""
    if math.prod(scale) == 1:
        return (1,) * len(shape)
    if len(scale) == 1 and scale[0] == shape[0]:  # one scale a row, or one an expert
        return (*scale, *(1,) * (len(shape) - 1))
    if len(scale) != len(shape):
        return None
    if len(shape) == 3 and scale[1:] == (shape[2], 1) and (method == "fbgemm_fp8" or shape[1] != shape[2]):
        return (scale[0], 1, scale[1])  # fbgemm stores the experts' scales by the output, which is the last dimension
    return scale


def _side(size: int, scales: int, wanted: int) -> int | None:
    """How many codes share one of ``scales`` scales along a dimension of ``size`` codes."""
    if scales == 1:
        return max(size, 1)
    if scales == size:
        return 1
    if math.ceil(size / wanted) == scales:
        return wanted
    return size // scales if scales and size % scales == 0 else None


def _is_activation_scale(info: TensorInfo, modules: set[str]) -> bool:
    """Whether a tensor scales what a quantised module takes or returns, or a cache of keys and values."""
    module, _, last = info.name.rpartition(".")
    return last.endswith(_ACTIVATIONS) and (math.prod(info.shape) == 1 or module in modules)


def _is_code(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor holds codes or belongs to some, as its name, dtype and neighbours tell."""
    if info.dtype.startswith("F8_"):
        return True
    parts = info.name.split(".")
    last = parts[-1]
    if last in _TELLING or "quant_state" in parts:
        return True
    if last in ("weight_scale", "weight_scale_inv"):  # of what is no code: somebody's half of a conversion
        return info.name.removesuffix(last) + "weight" in tensors
    if info.dtype in ("F64", "F32", "F16", "BF16", "BOOL"):
        return False
    scaled = any(f"{info.name}{end}" in tensors for end in ("_scale", "_scale_inv", "_scales"))
    packed = info.dtype == "U8" and last.endswith(("_blocks", "_scales"))
    return scaled or packed or last.startswith("weight") or last.endswith("_proj")  # other integers are buffers


def _told_by_names(names: tuple[str, ...]) -> str:
    """Whose codes have such names; empty where they tell nothing."""
    parts = {part for name in names for part in name.split(".")}
    return next((kind for part, kind in _TELLING.items() if part in parts), "")


def _told_by_dtypes(names: tuple[str, ...], tensors: Mapping[str, TensorInfo]) -> str:
    dtypes = sorted({tensors[name].dtype for name in names if name in tensors})
    return f"stored as {', '.join(dtypes)}, its configuration does not say how"
