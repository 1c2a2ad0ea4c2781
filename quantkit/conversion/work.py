"""The layers of a plan by calibration, block by block, each made durable once it is done.

Every unit is synced and then recorded in the ledger, so a killed run goes on where it was. What a calibrated run must know of finished blocks,
their output on the calibration rows, it gets by running them again from what was written; so the resumed output is the same to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from quantkit.allocator import give_back
from quantkit.conversion.calibration import CalibrationSet
from quantkit.conversion.hidden_states import HiddenStates
from quantkit.conversion.input_scales import input_scales, peaks_of
from quantkit.conversion.kv_cache import KVPeaks
from quantkit.conversion.report import LayerResult
from quantkit.conversion.rounding import round_together, shared_ranges
from quantkit.conversion.statistics import HessianCollector
from quantkit.conversion.transforms import Transformed, transform_block
from quantkit.conversion.tuning import Rounded, TunedBlock, tuning_of
from quantkit.conversion.workplace import Workplace
from quantkit.core.divergence import Divergence, DivergenceResult
from quantkit.core.qtensor import QuantizedTensor
from quantkit.formats.fusion import joint_name
from quantkit.formats.kv_scales import rounded_states
from quantkit.methods.tuned import Tuned
from quantkit.models.activations import fake_quantize_inputs
from quantkit.models.architecture import Block
from quantkit.models.compare import TokenRows, logit_places
from quantkit.models.experts import skipping_padding
from quantkit.models.kv_states import handling_keys_and_values
from quantkit.models.routing import Routing
from quantkit.models.streaming import BlockRunner, Place, Weights, decoder_linears

_PROBED_TOKENS = 64
"""A transform's folds are proved on so many tokens; experts that none of them reaches go with those alike."""


@dataclass(frozen=True, eq=False, slots=True)
class RunModel:
    """A model that is run block by block, and its weights."""

    runner: BlockRunner
    weights: Weights


class CalibratedWork:
    """Streams of hidden states through the blocks: the calibration rows (with the quantized model's own errors in them; where layers are tuned,
    the original model's too), and held-out rows twice, through the original and through the quantized blocks, which the head at the end turns
    into perplexity and KL.

    Args:
        held_out: rows to measure on, None to measure nothing.
        folder: where states may be spilled.
        as_it_was: the model to measure against, where the one that is converted was rotated first.
    """

    def __init__(
        self, place: Workplace, runner: BlockRunner, rows: CalibrationSet, held_out: CalibrationSet | None, folder: Path,
        as_it_was: RunModel | None = None,
    ) -> None:  # fmt: skip
        self.place, self.runner, self.held_out, self.as_it_was = place, runner, held_out, as_it_was
        width = runner.architecture.config.get_text_config().hidden_size
        self.calibration = HiddenStates(rows, width, runner.dtype, folder, "calibration")
        self.tuned = tuning_of(place.plan)
        self.original = [HiddenStates(rows, width, runner.dtype, folder, "calibration.original")] if place.plan.needs_original else []
        self.measured = [HiddenStates(held_out, width, runner.dtype, folder, name) for name in ("original", "quantized")] if held_out else []
        self.schemes = {name: layer.scheme for name, layer in place.plan.layers.items()}

    def run(self) -> tuple[list[LayerResult], DivergenceResult | None]:
        self._embed()
        every: list[LayerResult] = []
        for index, block in enumerate(self.runner.architecture.blocks):
            done = self.place.finished(block.path)
            self._advance_as_it_was(index, block)
            self.runner.load(block.path, self.place.source)
            seen = self._watch(index, block) if done is None else None
            if self.original and (done is not None or not self.place.plan.needs_drift):
                for batch in self.calibration.batches(self.runner, index):
                    self._advance_original(index, block, batch)
            if self.measured and not self.as_it_was:
                self.measured[0].advance(self.runner, index)
            results = self._quantize(index, block, *seen) if seen is not None else done
            static_scales = self._use_quantized(block, done is not None)
            self._advance(index, block, static_scales)
            self.runner.unload(block.path)
            give_back()
            self.place.listener.block(index, results, resumed=done is not None)
            every += results
        self.place.listener.stage("measuring")
        return every, self._measure()

    def _embed(self) -> None:
        self.place.listener.stage("embedding")
        self.runner.load_outside(self.place.source)
        for states in (self.calibration, *self.original, *self.measured[1 if self.as_it_was else 0 :]):
            states.embed(self.runner)
        rows = self.calibration.rows
        self.runner.settle(self.calibration.states, rows.input_ids, rows.position_ids)
        self.runner.unload_outside()
        if self.as_it_was and self.measured:
            before = self.as_it_was.runner
            before.load_outside(self.as_it_was.weights)
            self.measured[0].embed(before)
            before.settle(self.measured[0].states, self.measured[0].rows.input_ids, self.measured[0].rows.position_ids)
            before.unload_outside()

    def _advance_as_it_was(self, index: int, block: Block) -> None:
        """Held-out states through a block of the model that was not rotated, before the rotated one is in memory."""
        if self.as_it_was and self.measured:
            self.as_it_was.runner.load(block.path, self.as_it_was.weights)
            self.measured[0].advance(self.as_it_was.runner, index)
            self.as_it_was.runner.unload(block.path)

    def _watch(self, index: int, block: Block) -> tuple[HessianCollector, Routing]:
        """What the block's linears are given, with the block's own weights, and where tokens were routed.

        Where drift is asked for, the original model's states are taken through the block on the way.
        """
        plan = self.place.plan
        collector = HessianCollector(self._modules(block), sizes=block.path in plan.moved or plan.has_static_inputs)
        routing = Routing(block.module, shows_all=plan.calibrates_all_experts)
        for batch in self.calibration.batches(self.runner, index):
            valid = self.calibration.rows.valid[batch]
            if plan.needs_drift:
                with collector.watching_original():
                    self._advance_original(index, block, batch)
            with collector.watching(valid, whole=False), routing.watching(valid):
                self.calibration.through(self.runner, index, batch)
        return collector, routing

    def _advance_original(self, index: int, block: Block, batch: Place) -> None:
        """The same with and without a watching collector: where padding goes, other tokens' last bits may depend on it."""
        states = self.original[0]
        with skipping_padding(block.module, states.rows.valid[batch]):
            states.states[batch] = states.through(self.runner, index, batch).to(states.states.device)

    def _modules(self, block: Block) -> dict[str, nn.Module]:
        wanted = set(self.place.layers_of(block))
        return {name: module for name, module in decoder_linears(block, self.runner.architecture.model).items() if name in wanted}

    def _quantize(self, index: int, block: Block, collector: HessianCollector, routing: Routing) -> list[LayerResult]:
        place, modules = self.place, self._modules(block)
        moved = place.plan.moved.get(block.path)
        done = Transformed(place.source, collector.shared()) if moved is None else self._transform(index, block, collector)
        peaks = collector.peaks() if moved is None else peaks_of(done.groups)
        scales, notes = input_scales([place.plan.layers[name] for name in modules], peaks, place.plan.format.scale_dtype(place.model_dtype))
        results, names, routed = [], [], routing.tokens(modules)
        for name, q, result in self._rounded(index, done, modules):
            result.transform, result.routed_tokens = done.words.get(name), routed.get(name)
            result.note = "; ".join(note for note in (result.note, notes.get(name)) if note) or None
            names += place.write(name, replace(q, input_scale=scales.get(name)))
            results.append(result)
            place.listener.layer(result)
        for name in moved or ():
            place.keep(name, done.weights)
        place.finish(block.path, results, names + (moved or []))
        return results

    def _rounded(self, index: int, done: Transformed, modules: dict[str, nn.Module]) -> Iterator[tuple[str, QuantizedTensor, LayerResult]]:
        place, to_tune = self.place, {}
        for group, statistics in done.groups:
            largest = self._shared_range(group[0], modules, done.weights) if statistics is None else None
            for name, q, result in round_together(group, place.plan, done.weights, statistics, place.model_dtype, place.device, largest):
                if statistics is not None and result.rounding == Tuned.__name__:
                    to_tune[name] = Rounded(place.plan.layers[name], q, result, statistics)
                else:
                    yield name, q, result
        if self.tuned and to_tune:
            self.runner.load(self.runner.architecture.blocks[index].path, done.weights)  # with its norms as transforms left them
            tuning = TunedBlock(self.runner, index, self.calibration, self.original[0])
            yield from tuning.tune(to_tune, modules, done.weights, self.tuned, place.listener.stage)

    def _shared_range(self, name: str, modules: dict[str, nn.Module], weights: Weights) -> float | None:
        """Of a layer that no token reached, which therefore was not found to read one input with those it is joined with."""
        joined = [other for other in modules if joint_name(other) == joint_name(name)]
        return shared_ranges(joined, self.place.plan, weights).get(name)

    def _transform(self, index: int, block: Block, collector: HessianCollector) -> Transformed:
        few = slice(0, 1), slice(0, _PROBED_TOKENS)
        place, architecture = self.place, self.runner.architecture

        def run() -> Tensor:
            return self.calibration.through(self.runner, index, few)

        return transform_block(block, architecture, place.plan, place.source, collector.shared(), run, place.model_dtype)

    def _use_quantized(self, block: Block, resumed: bool) -> dict[str, Tensor]:
        """Put what was written, decoded, into the block, and give the scales of static inputs; the same after a resume as without one."""
        if resumed:
            self.place.listener.stage("replaying finished blocks")
        static_scales = {}
        for name, module in decoder_linears(block, self.runner.architecture.model).items():
            if name in self.place.plan.layers:
                q = self.place.read(name)
                if q.input_scale is not None:
                    static_scales[name] = q.input_scale.to(self.runner.device)
                weight = q.dequantize(self.runner.dtype)
                weight = weight.T.contiguous() if self.place.plan.layers[name].linear.is_transposed else weight
                module.weight.data = weight.to(self.runner.device)
        for path, parameter in block.module.named_parameters(block.path):
            name = self.runner.architecture.stored.find(path)
            if name in self.place.plan.moved.get(block.path, ()):
                parameter.data = self.place.writer.read(name).to(self.runner.device, self.runner.dtype)
        return static_scales

    def _advance(self, index: int, block: Block, static_scales: dict[str, Tensor]) -> None:
        modules, kv_cache = decoder_linears(block, self.runner.architecture.model), self.place.plan.kv_cache
        is_last = index + 1 == len(self.runner.architecture.blocks)
        unit = f"{block.path}.kv_cache"
        watching = None
        if kv_cache is not None and self.place.finished(unit) is None:
            peaks = KVPeaks()
            watching = partial(peaks.watching, block.module)
        with fake_quantize_inputs(modules, self.schemes, static_scales):
            if watching is not None or not is_last:
                self.calibration.advance(self.runner, index, watching)
            if watching is not None:
                self._write_kv_scales(unit, block, peaks)
            with self._cached(block):
                for states in self.measured[1:]:
                    states.advance(self.runner, index)

    def _write_kv_scales(self, unit: str, block: Block, peaks: KVPeaks) -> None:
        place, plan = self.place, self.place.plan.kv_cache
        assert plan is not None
        written = []
        for layer in plan.layers_of(block.module):
            for name, scale in peaks.scales(plan, layer, place.plan.format.scale_dtype(place.model_dtype)).items():
                place.writer.add(name, scale)
                written.append(name)
        place.finish(unit, [], written)

    def _cached(self, block: Block) -> AbstractContextManager[None]:
        """Keys and values go through the cache that the output asks for."""
        plan, read = self.place.plan.kv_cache, self.place.writer.read
        if plan is None:
            return nullcontext()
        scales = {layer: tuple(read(name).float().flatten() for name in plan.layers[layer]) for layer in plan.layers_of(block.module)}
        return handling_keys_and_values(block.module, partial(rounded_states, scales))

    def _measure(self) -> DivergenceResult | None:
        if self.held_out is None:
            return None
        self.runner.load_outside(self.place.source)
        before = self.as_it_was.runner if self.as_it_was else self.runner
        if self.as_it_was:
            before.load_outside(self.as_it_was.weights)
        rows = TokenRows.of_texts(self.held_out.input_ids, self.held_out.position_ids, self.held_out.valid)
        divergence = Divergence()
        vocabulary = int(self.runner.architecture.config.get_text_config().vocab_size)
        for at in logit_places(rows.input_ids.shape, vocabulary):
            baseline, quantized = (
                runner.logits(states.states[at], rows.input_ids[at], rows.position_ids[at])
                for runner, states in zip((before, self.runner), self.measured, strict=True)
            )
            divergence.add(baseline, quantized, rows.targets[at].to(baseline.device), rows.counted[at].to(baseline.device))
        self.runner.unload_outside()
        if self.as_it_was:
            before.unload_outside()
        return divergence.result()
