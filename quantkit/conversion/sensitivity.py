"""How much KL divergence each layer's rounding would cause, by each scheme it may take: measured once, in one pass forward and one back.

A small change dW of a layer changes its output by dy = dW x, and the model's distributions by a KL of about 1/2 E[(g . dy)^2], where g is the
gradient of ln p(token) by that output and the token is drawn from the model's own distribution (the Fisher information). Hidden states
between blocks are kept; backward, each block is run again with its weights alone in memory. Products of different places and of different
layers are left out of the square: rounding errors are as good as independent, and the sum of many samples has far less noise. Experts are measured
on the tokens routed to them, however they will be calibrated: what they do to others is not part of any output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.allocator import give_back
from quantkit.conversion.calibration import CalibrationSet
from quantkit.conversion.hidden_states import HiddenStates, room_for
from quantkit.conversion.layer_plan import LayerPlan
from quantkit.conversion.rounding import MIN_TOKENS, affordable, finite_weight
from quantkit.conversion.statistics import HessianCollector
from quantkit.methods.base import Statistics
from quantkit.models.architecture import Block
from quantkit.models.compare import TokenRows, logit_places
from quantkit.models.experts import skipping_padding
from quantkit.models.streaming import BlockRunner, Place, Weights, decoder_linears

MEASURED_TOKENS = 8192
"""Tokens measured on: samples of a mean whose error falls with their root."""

Losses = dict[str, dict[str, float]]
"""Nats a token, by layer and scheme."""


class SensitivityPass:
    """One measurement.

    Args:
        candidates: the ways each layer may be stored and rounded, by checkpoint name.
        folder: where hidden states may be spilled.
        stage: told what is being done.
    """

    def __init__(
        self, runner: BlockRunner, weights: Weights, rows: CalibrationSet, candidates: Mapping[str, Sequence[LayerPlan]],
        scale_dtype: torch.dtype, folder: Path, stage: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.runner, self.weights, self.rows, self.candidates = runner, weights, rows, candidates
        self.scale_dtype, self.stage = scale_dtype, stage
        self.blocks = runner.architecture.blocks
        self._width = runner.architecture.config.get_text_config().hidden_size
        self.borders = room_for((len(self.blocks) + 1, *rows.input_ids.shape, self._width), runner.dtype, folder, "borders")
        self.states = HiddenStates(rows, self._width, runner.dtype, folder, "sensitivity")
        self.counted = TokenRows.of_texts(rows.input_ids, rows.position_ids, rows.valid).counted

    def run(self, seed: int = 0) -> Losses:
        """The losses of every candidate, and with `seed` the same at every run on one kind of device."""
        self._forward()
        gradient = self._at_the_head(torch.Generator(self.runner.device).manual_seed(seed))
        losses: Losses = {}
        for index in reversed(range(len(self.blocks))):
            self.stage(f"measuring sensitivity, block {index + 1} of {len(self.blocks)} backward")
            self.runner.load(self.blocks[index].path, self.weights)
            gradient = self._back(index, gradient, losses)
            self.runner.unload(self.blocks[index].path)
            give_back()
        return {name: losses[name] for name in self.candidates}

    def _forward(self) -> None:
        self.stage("embedding")
        self.runner.load_outside(self.weights)
        self.states.embed(self.runner)
        self.runner.settle(self.states.states, self.rows.input_ids, self.rows.position_ids)
        self.runner.unload_outside()
        self.borders[0] = self.states.states
        for index, block in enumerate(self.blocks):
            self.stage(f"measuring sensitivity, block {index + 1} of {len(self.blocks)} forward")
            self.runner.load(block.path, self.weights)
            self.states.advance(self.runner, index)
            self.borders[index + 1] = self.states.states
            self.runner.unload(block.path)

    def _at_the_head(self, generator: torch.Generator) -> Tensor:
        """The gradient [R, T, H] by the last hidden states, of the sum of ln p of a token drawn at every counted place."""
        self.runner.load_outside(self.weights)
        gradient = torch.zeros_like(self.borders[-1])
        vocabulary = int(self.runner.architecture.config.get_text_config().vocab_size)
        for at in logit_places(self.rows.input_ids.shape, vocabulary):
            hidden = self.borders[-1][at].to(self.runner.device).requires_grad_()
            with self.runner.differentiating():
                logits = self.runner.logits(hidden, self.rows.input_ids[at], self.rows.position_ids[at])
            with torch.enable_grad():
                log_p = logits.log_softmax(-1).flatten(0, -2)
                drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
                score = log_p.gather(-1, drawn)[self.counted[at].flatten().to(log_p.device)].sum()
            gradient[at] = torch.autograd.grad(score, hidden)[0].to(gradient)
        self.runner.unload_outside()
        return gradient

    def _back(self, index: int, gradient: Tensor, losses: Losses) -> Tensor:
        """Measure a block's layers, and turn the gradient by its output into that by its input."""
        block = self.blocks[index]
        modules = {name: module for name, module in decoder_linears(block, self.runner.architecture.model).items() if name in self.candidates}
        collector, record = HessianCollector(modules), _Record(modules)
        before = torch.empty_like(gradient)
        for batch in self.states.batches(self.runner, index):
            before[batch] = self._back_batch(index, block, batch, gradient[batch], collector, record).to(before)
        for names, statistics in collector.shared():
            for name in names:
                losses[name] = self._losses(name, statistics, record)
        return before

    def _back_batch(self, index: int, block: Block, batch: Place, gradient: Tensor, collector: HessianCollector, record: _Record) -> Tensor:
        hidden = self.borders[index][batch].to(self.runner.device).requires_grad_()
        valid = self.rows.valid[batch]
        with self.runner.differentiating(), collector.watching(valid), skipping_padding(block.module, valid), record.watching() as seen:
            output = self.runner.block(index, hidden, self.rows.input_ids[batch], self.rows.position_ids[batch])
        by_hidden, *by_outputs = torch.autograd.grad(output, [hidden, *(y for _, _, y in seen)], gradient.to(output), allow_unused=True)
        record.add(seen, by_outputs)
        return by_hidden

    def _losses(self, name: str, statistics: Statistics | None, record: _Record) -> dict[str, float]:
        """Nats a token by scheme; 0 for a layer that no token reached."""
        plans = self.candidates[name]
        pairs = record.take(name)
        weight = finite_weight(plans[0], self.weights).to(self.runner.device)
        known = statistics if statistics is not None and statistics.num_tokens >= MIN_TOKENS else None
        losses: dict[str, float] = {}
        for plan in plans:
            assert plan.scheme.weight is not None
            rounding, _ = affordable(plan.rounding, known, weight.shape[1])
            change = (rounding(weight, plan.scheme.weight, self.scale_dtype, known).dequantize() - weight).T
            squares = sum(((x.float() @ change) * g.float()).sum(-1).square().sum().item() for x, g in pairs)
            losses[plan.scheme.name] = squares / 2 / max(1, int(self.counted.sum()))
        return losses


_Seen = list[tuple[str, Tensor, Tensor]]
"""A linear's name, input and output in one pass."""


class _Record:
    """Inputs [n, K] of a block's linears and gradients [n, N] by their outputs."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    @contextmanager
    def watching(self) -> Iterator[_Seen]:
        seen: _Seen = []

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            return lambda module, inputs, output: seen.append((name, inputs[0].detach(), output))

        handles = [module.register_forward_hook(hook(name)) for name, module in self._modules.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def add(self, seen: _Seen, by_outputs: Sequence[Tensor | None]) -> None:
        for (name, x, _), gradient in zip(seen, by_outputs, strict=True):
            if gradient is not None:
                self._pairs[name].append((x.flatten(0, -2), gradient.flatten(0, -2)))

    def take(self, name: str) -> list[tuple[Tensor, Tensor]]:
        return self._pairs.pop(name)
