"""The layers of a plan without calibration, tensor by tensor: rounded, or, of a quantized source, moved as they are."""

from __future__ import annotations

from quantkit.conversion.report import AS_IT_WAS, LayerResult
from quantkit.conversion.rounding import round_together, shared_ranges
from quantkit.conversion.workplace import Workplace
from quantkit.core.difference import difference
from quantkit.errors import FormatError, SourceError
from quantkit.formats.moves import moved
from quantkit.models.architecture import Block


def round_without_data(place: Workplace, blocks: list[Block]) -> list[LayerResult]:
    """Tensor in, tensor out; nothing is built and nothing is run."""
    every: list[LayerResult] = []
    for index, block in enumerate(blocks):
        done = place.finished(block.path)
        results = _round_block(place, block) if done is None else done
        place.listener.block(index, results, resumed=done is not None)
        every += results
    return every + _round_outside(place, blocks)


def _round_block(place: Workplace, block: Block) -> list[LayerResult]:
    return _round_unit(place, block.path, place.layers_of(block))


def _round_outside(place: Workplace, blocks: list[Block]) -> list[LayerResult]:
    """Layers in no block: a quantized source may have some, such as its head."""
    inside = {name for block in blocks for name in place.layers_of(block)}
    outside = [name for name in place.plan.layers if name not in inside]
    done = place.finished("outside") if outside else []
    return _round_unit(place, "outside", outside) if done is None else done


def _round_unit(place: Workplace, unit: str, layers: list[str]) -> list[LayerResult]:
    results, names = [], []
    ranges = shared_ranges([layer for layer in layers if place.plan.layers[layer].kept is None], place.plan, place.source)
    for layer in layers:
        written, result = _move(place, layer) if place.plan.layers[layer].kept is not None else _round(place, layer, ranges.get(layer))
        names += written
        results.append(result)
        place.listener.layer(result)
    place.finish(unit, results, names)
    return results


def _round(place: Workplace, layer: str, largest: float | None) -> tuple[list[str], LayerResult]:
    ((name, q, result),) = round_together([layer], place.plan, place.source, None, place.model_dtype, place.device, largest)
    written = place.write(name, q)
    if place.plan.keeps_codes:
        change = difference(place.source.quantized(name), place.read(name))
        result.lossless, result.max_error, result.error = change.is_none, change.largest, change.relative
    return written, result


def _move(place: Workplace, name: str) -> tuple[list[str], LayerResult]:
    """Write a layer of a quantized source as it is, and look at what was written.

    Raises:
        SourceError: it holds NaN or infinity.
        FormatError: it does not dequantize to what it did.
    """
    layer, before = place.plan.layers[name], place.source.quantized(name)
    assert layer.kept is not None
    written = place.write(name, moved(before, layer.scheme, layer.kept))
    change = difference(before, place.read(name))
    if not change.is_finite:
        raise SourceError(f"{name} holds NaN or infinite values; the source model is damaged")
    if not change.is_none:
        loss = f"by up to {change.largest:.3g}, ||W - Q||² / ||W||² {change.relative:.2g}"
        way = "give a recipe and --requantize to quantize the decoded weights, or take bf16"
        raise FormatError(f"{name} would not be what it was in {place.plan.format.name}: its weights change {loss}; {way}")
    return written, LayerResult(name, layer.scheme.name, AS_IT_WAS, 0.0, lossless=True, max_error=0.0)
