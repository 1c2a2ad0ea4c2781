"""What headers alone tell of a checkpoint's linears: shapes, types, packing, and which are quantized where the container is not decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import torch

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.safetensors_header import TensorInfo
from quantkit.core.packing import packed_words
from quantkit.core.scheme import Scheme
from quantkit.errors import CheckpointError, FormatError, QuantkitError
from quantkit.formats.base import is_of_weights, plan_shapes
from quantkit.formats.opened import OpenedCheckpoint, stems
from quantkit.models.architecture import Architecture, Linear

_OPTIONAL_PARTS = {"g_idx", "weight_g_idx", "weight_format"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def stored_shape(opened: OpenedCheckpoint, module: str) -> tuple[int, int]:
    """(N, K) of a quantized module; reads at most the two numbers of a `weight_shape`.

    Raises:
        CheckpointError: the part that tells is absent, or is no matrix.
    """
    reader = opened.reader
    assert opened.format is not None
    infos = {name.removeprefix(f"{module}."): reader.info(name) for name in opened.parts(module)}
    try:
        return opened.format.stored_shape(infos, opened.schemes[module], lambda part: reader.get(f"{module}.{part}"))
    except (FormatError, ValueError) as error:
        raise CheckpointError(f"{module} is quantized, but of what shape is not stored: {error}") from error


def wrong_parts(opened: OpenedCheckpoint) -> list[str]:
    """Parts of quantized layers that are absent, or not of the type and shape their scheme calls for."""
    if opened.format is None:
        return []
    problems = []
    for module, scheme in opened.schemes.items():
        try:
            planned = plan_shapes(opened.format, scheme, stored_shape(opened, module), opened.dtype)
        except QuantkitError as error:
            problems.append(str(error))
            continue
        for part, (dtype, shape) in planned.items():
            name = f"{module}.{part}"
            if name not in opened.reader:
                problems += [] if part in _OPTIONAL_PARTS else [f"{name} is missing"]
                continue
            info = opened.reader.info(name)
            may_differ = dtype.is_floating_point and dtype.itemsize > 1  # plain scales come in any float type
            older = _older_shape(part, scheme, stored_shape(opened, module))
            right_type = info.dtype.is_floating_point if may_differ else info.dtype == dtype
            if not right_type or not (_same_shape(info, shape) or tuple(info.shape) == older or _is_text(part)):
                problems.append(f"{name} is {info.dtype} {list(info.shape)}; {scheme.name} wants {dtype} {list(shape)}".replace("torch.", ""))
    return problems


def scale_dtype(opened: OpenedCheckpoint) -> torch.dtype | None:
    """The type of the first quantized layer's scales."""
    ends = (".scales", ".weight_scale")
    plain = (m for m, scheme in opened.schemes.items() if scheme.weight is not None and scheme.weight.scale == "float")
    first = next((name for module in plain for name in opened.parts(module) if name.endswith(ends)), None)
    return opened.reader.info(first).dtype if first else None


def packs_whole_words(opened: OpenedCheckpoint, shapes: dict[str, tuple[int, int]]) -> bool:
    """Whether a layer is packed with 32 // bits codes a word where that differs from a dense stream."""
    for module, scheme in opened.schemes.items():
        name = f"{module}.weight_packed"
        if scheme.weight is not None and scheme.weight.kind == "int" and name in opened.reader:
            words = opened.reader.info(name).shape[1]
            if words != packed_words(shapes[module][1], scheme.weight.bits):
                return True
    return False


def plain_linears(reader: CheckpointReader, names: Iterable[str]) -> tuple[str, ...]:
    """Modules of projections whose weight is stored as it is."""
    return tuple(name.removesuffix(".weight") for name in names if name.endswith("_proj.weight") and reader.info(name).dtype in _FLOATS)


def quantized_linears(reader: CheckpointReader, architecture: Architecture) -> list[tuple[Linear, int]]:
    """The model's linears that are stored as something else than one floating-point weight, with the bytes stored of each's weights."""
    by_module: dict[str, list[str]] = {}
    linears = [linear for block in architecture.blocks for linear in block.linears] + architecture.outside
    known = {linear.name for linear in linears}
    for name in reader.names:
        module = next((stem for stem in stems(name) if stem in known), None)
        if module is not None and name != f"{module}.bias":
            by_module.setdefault(module, []).append(name)
    found = []
    for linear in linears:
        infos = [reader.info(name) for name in by_module.get(linear.name, ())]
        if infos and not (len(infos) == 1 and infos[0].dtype in _FLOATS):
            found.append((linear, sum(info.nbytes for info in infos if is_of_weights(info.name))))
    return found


def main_dtype(reader: CheckpointReader, names: Sequence[str]) -> torch.dtype:
    """The floating-point type of most bytes of these tensors."""
    sizes: dict[torch.dtype, int] = {}
    for info in map(reader.info, names):
        if info.dtype in _FLOATS:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32


def _is_text(part: str) -> bool:
    """A text's length depends on what it says; whether it can be read shows when the layer's shape is."""
    return part.startswith("weight.quant_state.")


def _same_shape(info: TensorInfo, wanted: tuple[int, ...]) -> bool:
    """A scale a row may be [N] or [N, 1], one alone [] or [1]."""
    found = tuple(info.shape)
    return found == wanted or (prod(found) == prod(wanted) == 1) or (len(wanted) == 2 and wanted[1] == 1 and found == wanted[:1])


def _older_shape(part: str, scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int] | None:
    """Of words that compressed-tensors filled with whole codes until 2026, 32 // bits of them."""
    spec = scheme.weight
    if spec is None or part not in ("weight_packed", "weight_zero_point") or spec.kind != "int":
        return None
    rows, columns = shape
    each = 32 // spec.bits
    return (rows, -(-columns // each)) if part == "weight_packed" else (-(-rows // each), spec.num_groups(columns))


class AnyPart:
    """Checkpoint names for finding linears whatever their parts are called: a module that has any part has a weight."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {stem for name in names for stem in (name, *(f"{stem}.weight" for stem in stems(name)))}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)
