"""What every unit of a conversion needs to read, write and make durable, and the tensors that are only copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.checkpoint.ledger import Ledger
from quantkit.checkpoint.writer import CheckpointWriter
from quantkit.conversion.plan import Plan
from quantkit.conversion.report import DECODED, LayerResult
from quantkit.conversion.rotating import RotatedWeights
from quantkit.core.difference import difference
from quantkit.core.qtensor import QuantizedTensor
from quantkit.errors import SourceError
from quantkit.formats.streamed import FileOrder
from quantkit.models.architecture import Block
from quantkit.models.streaming import Weights

_LOOKED_AT_ONCE = 1 << 24
_CARRIED_AT_ONCE = 256 << 20
"""Bytes of copied tensors between two entries of the ledger."""


class Listener(Protocol):
    """Told how the work goes."""

    def started(self, num_blocks: int) -> None: ...

    def layer(self, result: LayerResult) -> None: ...

    def block(self, index: int, results: list[LayerResult], *, resumed: bool) -> None: ...

    def stage(self, text: str) -> None: ...


@dataclass(eq=False, slots=True)
class Workplace:
    """What every unit of work needs."""

    source: FileOrder | RotatedWeights
    plan: Plan
    writer: CheckpointWriter
    ledger: Ledger
    listener: Listener
    model_dtype: torch.dtype
    device: torch.device

    def finished(self, unit: str) -> list[LayerResult] | None:
        """The results of a unit that an earlier run finished, else None."""
        return [LayerResult(**entry) for entry in self.ledger.entry(unit)["layers"]] if self.ledger.is_done(unit) else None

    def finish(self, unit: str, results: list[LayerResult], names: list[str]) -> None:
        self.writer.sync()
        self.ledger.record(unit, {"layers": [asdict(r) for r in results], "tensors": names})

    def write(self, name: str, q: QuantizedTensor) -> list[str]:
        """Encode and write one layer; the names of its tensors."""
        parts = self.plan.format.encode(q.to("cpu"), self.plan.layers[name].scheme)
        for part, tensor in parts.items():
            self.writer.add(f"{name}.{part}", tensor)
        return [f"{name}.{part}" for part in parts]

    def keep(self, name: str, weights: Weights) -> Tensor:
        """Write one tensor that is not quantized; what it was before it got its type."""
        tensor = weights.get(name)
        self.writer.add(name, _as_type(name, tensor, self.plan.planned[name].dtype))
        return tensor

    def read(self, name: str) -> QuantizedTensor:
        """A layer as an earlier run wrote it."""
        scheme = self.plan.layers[name].scheme
        parts = [part for part in self.plan.format.part_names(scheme) if f"{name}.{part}" in self.plan.planned]
        return self.plan.format.decode({part: self.writer.read(f"{name}.{part}") for part in parts}, scheme)

    def layers_of(self, block: Block) -> list[str]:
        return [linear.name for linear in block.linears if linear.name in self.plan.layers]


def carry(place: Workplace) -> list[LayerResult]:
    """Copy every tensor that is not quantized; the accounts of those that were in the source."""
    every: list[LayerResult] = []
    for number, names in enumerate(_portions(place)):
        unit = f"carried.{number}"
        results = place.finished(unit)
        if results is None:
            results = [result for name in names if (result := _carry(place, name)) is not None]
            place.finish(unit, results, names)
        every += results
    return every


def _carry(place: Workplace, name: str) -> LayerResult | None:
    before, module = place.keep(name, place.source), name.removesuffix(".weight")
    if module not in place.source.schemes or not name.endswith(".weight"):
        return None
    change = difference(before, place.writer.read(name))
    dtype = str(place.plan.planned[name].dtype).removeprefix("torch.")
    result = LayerResult(module, dtype, DECODED, change.relative, lossless=change.is_none, max_error=change.largest)
    place.listener.layer(result)
    return result


def _as_type(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Raises SourceError where the tensor holds NaN or infinity, or would once it has the type."""
    if not _is_finite(tensor):
        raise SourceError(f"{name} holds NaN or infinite values; the source model is damaged")
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and not _is_finite(cast):
        largest = f"{tensor.abs().max():.3g}"
        raise SourceError(f"{name} holds values up to {largest}, which {str(dtype).removeprefix('torch.')} cannot; use --dtype bfloat16 or auto")
    return cast


def _is_finite(tensor: Tensor) -> bool:
    """In slices, as 8-bit floats must be widened to be looked at."""
    slices = tensor.split(max(1, _LOOKED_AT_ONCE * len(tensor) // tensor.numel())) if tensor.ndim and tensor.numel() else [tensor]
    return not tensor.is_floating_point() or all(bool(torch.isfinite(part.float()).all()) for part in slices)


def _portions(place: Workplace) -> Iterator[list[str]]:
    carried = set(place.plan.carried)
    portion: list[str] = []
    total = 0
    for name in (t.name for t in place.plan.tensors if t.name in carried):
        portion.append(name)
        total += place.plan.planned[name].nbytes
        if total >= _CARRIED_AT_ONCE:
            yield portion
            portion, total = [], 0
    if portion:
        yield portion
